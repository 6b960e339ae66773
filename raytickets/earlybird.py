"""The stop rule: has the mask of a prune ratio stopped changing?"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from raytickets.config import StopRule
from raytickets.masks import thresholds

_HELD, _SHOWN = 128, 64
"""Checks whose masks are held for the matrix of distances, and those in the matrix."""


@dataclass(frozen=True)
class Verdict:
    """What one check says of one prune ratio."""

    distances: tuple[float, ...]
    """From the newest mask to each older one, oldest first; empty until the window is full."""
    distance: float | None
    """What the rule holds against its limit: the largest of them, or for `epi` their mean; None
    until the window is full."""
    converged: bool


class MaskWindow:
    """The last `rule.window` masks of every prune ratio.

    `paper` is the published rule (You et al. 2020, arXiv 1909.11957, algorithm 1, as in the
    authors' code): the distance is the share of channels in which two masks differ, and a ratio
    converges when the newest mask is within the limit of every other mask in the window.

    `corrected` divides that share by 2p(1-p), what two unrelated masks at ratio p differ by on
    average, so that 1 means chance at every ratio; the fixed limit of the paper lies above chance
    for p <= 0.05 and p >= 0.95 and fires there on noise.

    `epi` is the Early Pruning Indicator (Shen et al., CVPR 2022, arXiv 2110.12007, equations 4 to
    6), which looks at how many channels the groups keep and not at which ones. Two masks that keep
    n and m channels of a group are at distance mean |n - m| / (n + m) over the groups, which is 0
    where both keep none. EPI is 1 minus the mean distance from the newest mask to the others in the
    window. A ratio converges when 1 - EPI is within the limit and no larger than at any of the
    `rule.window` - 1 checks before, as far as the window was full at them; a tie counts. This is
    second-hand, as the paper's own text could not be had: equations and limit (1 - 0.983, for
    scores by magnitude) are those of a public implementation, the condition on earlier checks (5
    there) those of published notes. With how many earlier masks the paper compares is not known.

    A mask that keeps nothing (all scores equal) has chosen nothing: but for `paper` it is at
    distance 1 from every mask.
    """

    def __init__(self, rule: StopRule, ratios: Sequence[float], widths: Sequence[int] = ()):
        """`widths` are those of the channel groups that scores go by; only `epi` looks at them."""
        if rule.rule == "epi" and not widths:
            raise ValueError("epi needs the widths of the channel groups")
        self.rule = rule
        self._order = sorted(range(len(ratios)), key=ratios.__getitem__)
        self._ratios = [ratios[place] for place in self._order]
        rising = torch.tensor(self._ratios, dtype=torch.float64)
        self._chance = 2 * rising * (1 - rising) if rule.rule == "corrected" else 1.0
        self._widths = torch.tensor(widths, dtype=torch.int64)
        kinds = len(ratios) + 1
        starts = torch.arange(0, len(widths) * kinds, kinds, dtype=torch.int32)
        self._starts = starts.repeat_interleave(self._widths)
        self._older: deque[_Cuts] = deque(maxlen=rule.window - 1)
        self._before: deque[Tensor] = deque(maxlen=rule.window - 1)
        self._checks, self._stride = 0, 1
        # Those of every `_stride`th check from the first on, at most _HELD.
        self._held: dict[int, _Cuts] = {}

    def check(self, scores: Tensor) -> list[Verdict]:
        """Look at one more score vector, float [C] on the CPU; one verdict per prune ratio."""
        newest, older = self._cut(scores), list(self._older)
        self._older.append(newest)
        self._hold(newest)
        verdicts = [Verdict((), None, False)] * len(self._order)
        if len(older) < self.rule.window - 1:
            return verdicts
        distances = self._distances(newest, older)
        rows = distances.T.tolist()
        if self.rule.rule == "epi":
            means = distances.mean(0)
            # The same numbers added up in another order are a tie.
            steady = (torch.stack([means, *self._before]).amin(0) >= means - 1e-12).tolist()
            self._before.append(means)
            whole = means.tolist()
        else:
            whole, steady = [max(row) for row in rows], [True] * len(rows)
        for place, row, distance, holds in zip(self._order, rows, whole, steady, strict=True):
            converged = holds and distance <= self.rule.limit
            verdicts[place] = Verdict(tuple(row), distance, converged)
        return verdicts

    def matrix(self) -> tuple[list[int], dict[float, list[list[float]]]]:
        """The distance between the masks of every two checks so far, for every prune ratio.

        Checks count from 1. Of more than 64 it takes 64, as evenly as those that are still held
        allow, the first and the newest among them. Rows and columns are in the order of the checks,
        to three decimals.
        """
        cuts = dict(self._held)
        if self._older:
            cuts[self._checks] = self._older[-1]
        checks = list(cuts)
        if len(checks) > _SHOWN:
            step = (len(checks) - 1) / (_SHOWN - 1)
            checks = [checks[round(place * step)] for place in range(_SHOWN)]
        shown = [cuts[check] for check in checks]
        matrices = torch.zeros(len(self._ratios), len(shown), len(shown), dtype=torch.float64)
        for place in range(1, len(shown)):
            row = self._distances(shown[place], shown[:place]).T
            matrices[:, place, :place] = matrices[:, :place, place] = row
        return checks, dict(zip(self._ratios, matrices.round(decimals=3).tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        """Everything that `check` changes, for `load`; levels are uint8 below 256 ratios."""
        dtype = torch.uint8 if len(self._ratios) < 256 else torch.int32
        empty = torch.zeros(0)
        older, held = (
            torch.stack([cuts.levels for cuts in some]).to(dtype) if some else empty
            for some in (self._older, list(self._held.values()))
        )
        return {
            "older": older,
            "held": held,
            "held_at": torch.tensor(list(self._held), dtype=torch.int64),
            "before": torch.stack(list(self._before)) if self._before else empty,
            "counts": torch.tensor([self._checks, self._stride], dtype=torch.int64),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the `state` of a window of the same rule, ratios and widths."""
        self._older.extend(map(_Cuts.of, state["older"].int()))
        held = map(_Cuts.of, state["held"].int())
        self._held = dict(zip(state["held_at"].tolist(), held, strict=True))
        self._before.extend(state["before"])
        self._checks, self._stride = state["counts"].tolist()

    def _hold(self, newest: "_Cuts") -> None:
        self._checks += 1
        if (self._checks - 1) % self._stride == 0:
            self._held[self._checks] = newest
        if len(self._held) > _HELD:
            self._held = dict(list(self._held.items())[::2])
            self._stride *= 2

    def _cut(self, scores: Tensor) -> "_Cuts":
        levels = torch.bucketize(scores, thresholds(scores, self._ratios), out_int32=True)
        return _Cuts.of(levels)

    def _distances(self, newest: "_Cuts", older: Sequence["_Cuts"]) -> Tensor:
        """From the newest masks to each of the older ones: float64 [older, K], ratios rising."""
        by_width = self.rule.rule == "epi"
        distances = (self._by_width if by_width else self._by_channel)(newest, older)
        tops = [min(cuts.top, newest.top) for cuts in older]
        if self.rule.rule != "paper" and min(tops) < len(self._ratios):
            for row, top in zip(distances, tops, strict=True):
                row[top:] = 1.0
        return distances

    def _by_channel(self, newest: "_Cuts", older: Sequence["_Cuts"]) -> Tensor:
        # At a ratio two masks differ in the channels that only one of their levels is above.
        count, rows = len(newest.levels), len(older)
        lower = [torch.minimum(cuts.levels, newest.levels) for cuts in older]
        higher = [torch.maximum(cuts.levels, newest.levels) for cuts in older]
        dropped = self._dropped(torch.stack([*lower, *higher]), parts=1)[:, 0]
        differing = dropped[:rows] - dropped[rows:]
        return (1 - (count - differing).double() / count) / self._chance

    def _by_width(self, newest: "_Cuts", older: Sequence["_Cuts"]) -> Tensor:
        levels = torch.stack([newest.levels, *(cuts.levels for cuts in older)]) + self._starts
        kept = self._widths[:, None] - self._dropped(levels, parts=len(self._widths))
        here, there = kept[0], kept[1:]
        return ((here - there).abs().double() / (here + there).clamp(min=1)).mean(1)

    def _dropped(self, levels: Tensor, parts: int) -> Tensor:
        """How many channels of each part the masks of the rising ratios drop: int64 [rows, parts,
        K].

        levels is int32 [rows, C], with place * (K + 1) added to channels of a later part, and is
        written over.
        """
        rows, kinds = len(levels), parts * (len(self._ratios) + 1)
        levels += torch.arange(0, rows * kinds, kinds, dtype=torch.int32)[:, None]
        counts = levels.flatten().bincount(minlength=rows * kinds)
        return counts.view(rows, parts, -1).cumsum(2)[:, :, :-1]


class _Cuts(NamedTuple):
    """The masks of all ratios at one check: those of rising ratios are nested, so one number for
    each channel, how many of them keep it, tells all."""

    levels: Tensor
    """int32 [C]"""
    top: int
    """The largest level: the masks from this place on keep nothing."""

    @classmethod
    def of(cls, levels: Tensor) -> "_Cuts":
        return cls(levels, int(levels.max()))
