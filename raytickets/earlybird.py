"""The stop rule: has the mask of a prune ratio stopped changing?"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytickets.config import StopRule
from raytickets.masks import thresholds


@dataclass(frozen=True)
class Verdict:
    """What one check says of one prune ratio."""

    distances: tuple[float, ...]
    """From the newest mask to each older one, oldest first; empty until the window is full."""
    converged: bool

    @property
    def distance(self) -> float | None:
        return max(self.distances, default=None)


class MaskWindow:
    """The last `rule.window` masks of every prune ratio.

    `paper` is the published rule (You et al. 2020, arXiv 1909.11957, algorithm 1, as in the
    authors' code): the distance is the share of channels in which two masks differ, and a ratio
    converges when the newest mask is within the limit of every other mask in the window.

    `corrected` divides that share by 2p(1-p), what two unrelated masks at ratio p differ by on
    average, so that 1 means chance at every ratio; the fixed limit of the paper lies above chance
    for p <= 0.05 and p >= 0.95 and fires there on noise. A mask that keeps nothing (all scores
    equal) has chosen nothing: it is at distance 1 from every mask.
    """

    def __init__(self, rule: StopRule, ratios: Sequence[float]):
        self.rule = rule
        self.ratios = tuple(ratios)
        self._order = sorted(range(len(ratios)), key=ratios.__getitem__)
        # Masks of rising ratios are nested, so one number for each channel tells all of them: how
        # many of them keep it. A row is that number for each channel, int32 [C].
        self._levels: deque[Tensor] = deque(maxlen=rule.window)

    def check(self, scores: Tensor) -> list[Verdict]:
        """Look at one more score vector, float [C] on the CPU; one verdict per prune ratio."""
        ascending = [self.ratios[place] for place in self._order]
        newest = torch.bucketize(scores, thresholds(scores, ascending), out_int32=True)
        self._levels.append(newest)
        if len(self._levels) < self.rule.window:
            return [Verdict((), False) for _ in self.ratios]
        levels = torch.stack(list(self._levels))
        # At a ratio two masks differ in the channels that only one level is above.
        lower, higher = torch.minimum(levels[:-1], newest), torch.maximum(levels[:-1], newest)
        differing = self._dropped(lower) - self._dropped(higher)
        distances = 1 - (len(scores) - differing).double() / len(scores)
        if self.rule.rule == "corrected":
            ratios = torch.tensor(ascending, dtype=torch.float64)
            distances /= 2 * ratios * (1 - ratios)
            nothing = self._dropped(levels) == len(scores)
            distances[nothing[:-1] | nothing[-1]] = 1.0
        verdicts: list[Verdict] = [Verdict((), False)] * len(self.ratios)
        for place, row in zip(self._order, distances.T.tolist(), strict=True):
            verdicts[place] = Verdict(tuple(row), max(row) <= self.rule.limit)
        return verdicts

    def _dropped(self, levels: Tensor) -> Tensor:
        """How many channels of each row the masks of the rising ratios drop: int64 [rows, K]."""
        rows, kinds = len(levels), len(self.ratios) + 1
        offsets = torch.arange(rows, dtype=torch.int32)[:, None] * kinds
        counts = (levels + offsets).flatten().bincount(minlength=rows * kinds)
        return counts.view(rows, kinds).cumsum(1)[:, :-1]
