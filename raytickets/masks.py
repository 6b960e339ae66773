"""Masks: cuts of one score vector, one for each prune ratio."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def thresholds(scores: Tensor, ratios: Sequence[float]) -> Tensor:
    """What a channel has to score more than at each prune ratio, from one sort.

    scores is float [C] on the CPU, ratios are above 0 and below 1; returns float [len(ratios)]: the
    scores at places int(C * p) of the sorted ones (You et al. 2020, section 3.2 and the authors'
    code).
    """
    count = len(scores)
    places = [min(int(count * ratio), count - 1) for ratio in ratios]
    # NumPy sorts values alone, and so several times as fast as torch, which sorts places too.
    return torch.from_numpy(np.sort(scores.numpy())[places])


def cut(scores: Tensor, ratio: float) -> Tensor:
    """The mask of a prune ratio, bool [C] for scores float [C]: True for a kept channel.

    A channel is kept when it scores strictly more than the threshold, so ties at the cut are
    dropped together.
    """
    return scores > thresholds(scores, [ratio])


def widen(
    mask: Tensor, scores: Tensor, widths: Sequence[int], *, least: int = 1, multiple: int = 1
) -> Tensor:
    """The mask with the best of the dropped channels added back, group by group.

    mask is bool [C] and scores float [C], both over groups of the given widths, which sum to C.
    Each group keeps at least `least` channels, or all if it has fewer, and then as many more as
    make its width a multiple of `multiple`, unless it has not that many. Returns a new bool [C].
    """
    widened = mask.clone()
    for kept, score in zip(widened.split(list(widths)), scores.split(list(widths)), strict=True):
        count = int(kept.sum())
        floored = max(count, min(least, len(kept)))
        rounded = -(-floored // multiple) * multiple
        wanted = rounded if rounded <= len(kept) else floored
        if wanted > count:
            # Kept channels come first whatever they score: the rule may cut another vector.
            order = score.masked_fill(kept, torch.inf).argsort(descending=True, stable=True)
            kept[order[:wanted]] = True
    return widened


def to_text(mask: Tensor) -> str:
    """A bool [C] mask as C characters, `1` for kept."""
    return "".join("1" if kept else "0" for kept in mask.tolist())


def from_text(text: str) -> Tensor:
    """The bool [len(text)] mask that `to_text` wrote; ValueError on any other character."""
    if set(text) - {"0", "1"}:
        raise ValueError("a mask is written with the characters 0 and 1")
    return torch.tensor([character == "1" for character in text], dtype=torch.bool)
