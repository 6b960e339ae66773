"""The stop rule: has the mask of a prune ratio stopped changing?"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raytickets.config import StopRule
from raytickets.masks import cut


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
        self._masks: deque[Tensor] = deque(maxlen=rule.window)

    def check(self, scores: Tensor) -> list[Verdict]:
        """Look at one more score vector, float [C] on the CPU; one verdict per prune ratio."""
        newest = cut(scores, self.ratios)
        self._masks.append(newest)
        if len(self._masks) < self.rule.window:
            return [Verdict((), False) for _ in self.ratios]
        older = torch.stack(list(self._masks)[:-1])
        agreeing = (older == newest).sum(-1).double() / len(scores)
        distances = 1 - agreeing
        if self.rule.rule == "corrected":
            ratios = torch.tensor(self.ratios, dtype=torch.float64)
            distances /= 2 * ratios * (1 - ratios)
            chose_nothing = ~older.any(-1) | ~newest.any(-1)
            distances[chose_nothing] = 1.0
        return [Verdict(tuple(row), max(row) <= self.rule.limit) for row in distances.T.tolist()]
