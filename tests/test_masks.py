"""Masks are cuts of one score vector, and a floor keeps every group alive."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from raytickets.masks import cut, from_text, to_text, widen

finite = st.floats(0, 10, width=32)
vectors = st.lists(finite, min_size=1, max_size=60).map(torch.tensor)
ratios = st.floats(0.001, 0.999)


@given(scores=vectors, ratio=ratios)
def test_a_channel_is_kept_when_it_scores_above_the_one_at_the_cut(scores, ratio):
    threshold = sorted(scores.tolist())[int(len(scores) * ratio)]
    assert cut(scores, ratio).tolist() == [score > threshold for score in scores.tolist()]


@given(scores=vectors, low=ratios, high=ratios)
def test_a_higher_ratio_keeps_a_subset(scores, low, high):
    low, high = sorted((low, high))
    more, fewer = cut(scores, low), cut(scores, high)
    assert not (fewer & ~more).any()


def test_distinct_scores_keep_the_share_that_the_ratio_leaves():
    scores = torch.randperm(1000).float()
    kept = [int(cut(scores, ratio).sum()) for ratio in (0.3, 0.5, 0.9)]
    assert kept == [699, 499, 99]


def test_equal_scores_keep_nothing():
    for ratio in (0.1, 0.9):
        assert not cut(torch.full((8,), 0.5), ratio).any()


def test_a_ratio_next_to_one_still_has_a_cut():
    assert cut(torch.arange(3.0), 1 - 2**-53).tolist() == [False, False, False]


@given(
    data=st.data(),
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    least=st.integers(1, 4),
    multiple=st.sampled_from([1, 2, 3, 8, 16]),
)
def test_widening_adds_the_best_dropped_channels_up_to_floor_and_multiple(
    data, widths, least, multiple
):
    total = sum(widths)
    scores = torch.tensor(data.draw(st.lists(finite, min_size=total, max_size=total)))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    widened = widen(mask, scores, widths, least=least, multiple=multiple)
    for before, after, score in zip(
        mask.split(widths), widened.split(widths), scores.split(widths), strict=True
    ):
        width, count = len(before), int(after.sum())
        floored = max(int(before.sum()), min(least, width))
        assert not (before & ~after).any()
        assert floored <= count < floored + multiple
        assert count % multiple == 0 or (count == floored and count - count % -multiple > width)
        added = after & ~before
        if added.any() and not after.all():
            assert score[added].min() >= score[~after].max()


def test_the_floor_keeps_the_best_of_an_emptied_group():
    scores = torch.tensor([5.0, 6.0, 0.1, 0.3, 0.2])
    mask = torch.tensor([True, True, False, False, False])
    assert widen(mask, scores, [2, 3], least=2).tolist() == [True, True, False, True, True]


def test_a_group_without_room_for_the_multiple_stays_as_it_was_cut():
    scores = torch.arange(10.0)
    mask = scores > 6
    assert widen(mask, scores, [10], multiple=16).sum() == 3
    assert widen(mask, scores, [10], multiple=8).tolist() == [False] * 2 + [True] * 8


@given(st.lists(st.booleans(), max_size=40))
def test_a_mask_survives_being_written(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    assert torch.equal(from_text(to_text(mask)), mask)


def test_a_mask_of_other_characters_is_refused():
    with pytest.raises(ValueError, match="0 and 1"):
        from_text("10x")
