"""Masks: cuts of one score vector, one for every prune ratio."""

from collections.abc import Sequence

import torch
from torch import Tensor


def cut(scores: Tensor, ratios: Sequence[float]) -> Tensor:
    """Masks of all prune ratios from one sort.

    scores is float [C], ratios are above 0 and below 1; returns bool [len(ratios), C], True for
    a kept channel. A channel is kept when it scores strictly more than the one at place int(C * p)
    of the sorted scores (You et al. 2020, section 3.2 and the authors' code), so ties at the cut
    are dropped together.
    """
    count = len(scores)
    places = [min(int(count * ratio), count - 1) for ratio in ratios]
    return scores > scores.sort().values[places, None]


def keep_floor(mask: Tensor, scores: Tensor, widths: Sequence[int], least: int) -> Tensor:
    """The mask with at least `least` channels kept in each group, its best-scoring ones.

    mask is bool [C] and scores float [C], both over groups of the given widths, which sum to C;
    a group narrower than `least` keeps all it has. Returns a new bool [C].
    """
    floored = mask.clone()
    for kept, score in zip(floored.split(list(widths)), scores.split(list(widths)), strict=True):
        if kept.sum() < least:
            best = score.argsort(descending=True, stable=True)[:least]
            kept[best] = True
    return floored


def to_text(mask: Tensor) -> str:
    """A bool [C] mask as C characters, `1` for kept."""
    return "".join("1" if kept else "0" for kept in mask.tolist())


def from_text(text: str) -> Tensor:
    """The bool [len(text)] mask that `to_text` wrote; ValueError on any other character."""
    if set(text) - {"0", "1"}:
        raise ValueError("a mask is written with the characters 0 and 1")
    return torch.tensor([character == "1" for character in text], dtype=torch.bool)
