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
        self._order = sorted(range(len(ratios)), key=ratios.__getitem__)
        self._ratios = [ratios[place] for place in self._order]
        # Masks of rising ratios are nested, so one number for each channel tells all of them: how
        # many of them keep it.
        self._levels: deque[Tensor] = deque(maxlen=rule.window)
        self._chose_nothing: deque[Tensor] = deque(maxlen=rule.window)
        rising = torch.tensor(self._ratios, dtype=torch.float64)
        self._chance = 2 * rising * (1 - rising) if rule.rule == "corrected" else 1.0

    def check(self, scores: Tensor) -> list[Verdict]:
        """Look at one more score vector, float [C] on the CPU; one verdict per prune ratio."""
        count, older = len(scores), list(self._levels)[1 - self.rule.window :]
        newest = torch.bucketize(scores, thresholds(scores, self._ratios), out_int32=True)
        # At a ratio two masks differ in the channels that only one of their levels is above.
        lower = [torch.minimum(levels, newest) for levels in older]
        higher = [torch.maximum(levels, newest) for levels in older]
        dropped = self._dropped(torch.stack([newest, *lower, *higher]))
        self._levels.append(newest)
        self._chose_nothing.append(dropped[0] == count)
        verdicts = [Verdict((), False)] * len(self._order)
        if len(self._levels) < self.rule.window:
            return verdicts
        differing = dropped[1 : len(older) + 1] - dropped[len(older) + 1 :]
        distances = (1 - (count - differing).double() / count) / self._chance
        if self.rule.rule == "corrected":
            *before, now = self._chose_nothing
            distances[torch.stack(before) | now] = 1.0
        for place, row in zip(self._order, distances.T.tolist(), strict=True):
            verdicts[place] = Verdict(tuple(row), max(row) <= self.rule.limit)
        return verdicts

    def _dropped(self, levels: Tensor) -> Tensor:
        """How many channels the masks of the rising ratios drop: int64 [rows, K].

        levels is int32 [rows, C].
        """
        rows, kinds = len(levels), len(self._ratios) + 1
        levels += torch.arange(0, rows * kinds, kinds, dtype=torch.int32)[:, None]
        counts = levels.flatten().bincount(minlength=rows * kinds)
        return counts.view(rows, kinds).cumsum(1)[:, :-1]
