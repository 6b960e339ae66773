"""Masks are cuts of one score vector, and a floor keeps every group alive."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from raytickets.masks import cut, from_text, keep_floor, to_text

finite = st.floats(0, 10, width=32)
vectors = st.lists(finite, min_size=1, max_size=60).map(torch.tensor)
ratios = st.floats(0.001, 0.999)


@given(scores=vectors, ratio=ratios)
def test_a_channel_is_kept_when_it_scores_above_the_one_at_the_cut(scores, ratio):
    threshold = sorted(scores.tolist())[int(len(scores) * ratio)]
    assert cut(scores, [ratio])[0].tolist() == [score > threshold for score in scores.tolist()]


@given(scores=vectors, low=ratios, high=ratios)
def test_a_higher_ratio_keeps_a_subset(scores, low, high):
    low, high = sorted((low, high))
    more, fewer = cut(scores, [low, high])
    assert not (fewer & ~more).any()


def test_distinct_scores_keep_the_share_that_the_ratio_leaves():
    scores = torch.randperm(1000).float()
    kept = cut(scores, [0.3, 0.5, 0.9]).sum(1)
    assert kept.tolist() == [699, 499, 99]


def test_equal_scores_keep_nothing():
    assert not cut(torch.full((8,), 0.5), [0.1, 0.9]).any()


def test_a_ratio_next_to_one_still_has_a_cut():
    assert cut(torch.arange(3.0), [1 - 2**-53]).tolist() == [[False, False, False]]


@given(data=st.data(), widths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_the_floor_only_adds_the_best_channels_of_poor_groups(data, widths):
    total, least = sum(widths), data.draw(st.integers(1, 4))
    scores = torch.tensor(data.draw(st.lists(finite, min_size=total, max_size=total)))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    mask = mask & cut(scores, [0.5])[0]  # a mask that is a cut, as they all are
    floored = keep_floor(mask, scores, widths, least)
    for before, after, score in zip(
        mask.split(widths), floored.split(widths), scores.split(widths), strict=True
    ):
        if before.sum() >= least:
            assert torch.equal(before, after)
        else:
            assert after.sum() >= min(least, len(after))
            dropped = score[~after]
            assert not len(dropped) or score[after].min() >= dropped.max() or before.any()


def test_the_floor_keeps_the_best_of_an_emptied_group():
    scores = torch.tensor([5.0, 6.0, 0.1, 0.3, 0.2])
    mask = torch.tensor([True, True, False, False, False])
    assert keep_floor(mask, scores, [2, 3], 2).tolist() == [True, True, False, True, True]


@given(st.lists(st.booleans(), max_size=40))
def test_a_mask_survives_being_written(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    assert torch.equal(from_text(to_text(mask)), mask)


def test_a_mask_of_other_characters_is_refused():
    with pytest.raises(ValueError, match="0 and 1"):
        from_text("10x")
