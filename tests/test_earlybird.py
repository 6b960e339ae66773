"""The stop rule against the published algorithm, and against noise."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from raytickets.config import StopRule
from raytickets.earlybird import MaskWindow


class PublishedRule:
    """Algorithm 1 of You et al. 2020 for one ratio, step by step on a model's BatchNorm layers.

    Written from the paper and the described behaviour of the authors' code, sharing nothing with
    raytickets.
    """

    def __init__(self, ratio, keep=5, limit=0.1):
        self.ratio, self.keep, self.limit = ratio, keep, limit
        self.queue = []

    def mask(self, model):
        gammas = []
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                gammas += [abs(value) for value in module.weight.tolist()]
        threshold = sorted(gammas)[int(len(gammas) * self.ratio)]
        return [1 if value > threshold else 0 for value in gammas]

    def emerges(self, model):
        self.queue.append(self.mask(model))
        if len(self.queue) > self.keep:
            del self.queue[0]
        if len(self.queue) < self.keep:
            return False
        newest = self.queue[-1]
        for older in self.queue[:-1]:
            same = 0
            for ours, theirs in zip(newest, older, strict=True):
                same += ours == theirs
            if 1 - same / len(newest) > self.limit:
                return False
        return True


def model_with(values):
    half = len(values) // 2
    model = nn.Sequential(nn.BatchNorm2d(half), nn.BatchNorm2d(len(values) - half))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(values[:half]))
        model[1].weight.copy_(torch.tensor(values[half:]))
    return model


# Few distinct values make ties and constant vectors likely; small moves make convergence likely.
gamma = st.one_of(st.sampled_from([0.0, 0.25, -0.25, 0.5]), st.floats(-1, 1, width=32))


@st.composite
def streams(draw):
    size = draw(st.integers(2, 24))
    current = draw(st.lists(gamma, min_size=size, max_size=size))
    stream = [list(current)]
    for _ in range(draw(st.integers(4, 12))):
        for _ in range(draw(st.integers(0, 3))):
            current[draw(st.integers(0, size - 1))] = draw(gamma)
        stream.append(list(current))
    return stream


@settings(max_examples=400)
@given(stream=streams(), ratio=st.sampled_from([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98]))
def test_paper_decides_as_the_published_algorithm(stream, ratio):
    published = PublishedRule(ratio)
    window = MaskWindow(StopRule("paper"), [ratio])
    for values in stream:
        (verdict,) = window.check(torch.tensor(values).abs())
        assert verdict.converged == published.emerges(model_with(values))


def test_paper_fires_on_a_constant_stream_as_published():
    window = MaskWindow(StopRule("paper"), [0.5])
    assert [window.check(torch.ones(10))[0].converged for _ in range(6)] == [False] * 4 + [True] * 2


def test_all_ratios_are_judged_as_if_each_were_alone():
    stream = [torch.rand(50) for _ in range(3)] + [torch.rand(50)] * 6
    ratios = [0.1, 0.5, 0.9]
    together = MaskWindow(StopRule(), ratios)
    alone = [MaskWindow(StopRule(), [ratio]) for ratio in ratios]
    for scores in stream:
        assert together.check(scores) == [window.check(scores)[0] for window in alone]


RATIOS = [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98]


def fired_on_noise(rule, channels, streams, checks):
    """Per ratio, in how many streams of unrelated gammas the rule fires at least once."""
    generator = torch.Generator().manual_seed(0)
    fired = torch.zeros(len(RATIOS), dtype=torch.int64)
    for _ in range(streams):
        window = MaskWindow(StopRule(rule), RATIOS)
        noise = torch.rand(checks, channels, generator=generator)
        verdicts = [[verdict.converged for verdict in window.check(scores)] for scores in noise]
        fired += torch.tensor(verdicts).any(0)
    return dict(zip(RATIOS, fired.tolist(), strict=True))


@pytest.mark.parametrize("channels", [1000, 4224])
def test_corrected_never_fires_on_noise(channels):
    fired = fired_on_noise(
        "corrected", channels, streams=200 if channels == 1000 else 20, checks=40
    )
    assert set(fired.values()) == {0}


def test_paper_fires_on_noise_at_the_ends():
    fired = fired_on_noise("paper", 1000, streams=20, checks=40)
    assert fired[0.02] == fired[0.98] == fired[0.05] == fired[0.95] == 20
    assert fired[0.3] == fired[0.5] == fired[0.7] == 0


def test_chance_is_at_distance_one_at_every_ratio():
    generator = torch.Generator().manual_seed(1)
    window = MaskWindow(StopRule(window=2), RATIOS)
    window.check(torch.rand(200_000, generator=generator))
    distances = [v.distance for v in window.check(torch.rand(200_000, generator=generator))]
    assert distances == pytest.approx([1.0] * len(RATIOS), abs=0.05)


def test_corrected_converges_when_the_order_settles():
    window = MaskWindow(StopRule(), [0.5])
    settled = torch.arange(100.0)
    verdicts = [window.check(torch.rand(100))[0] for _ in range(3)]
    verdicts += [window.check(settled)[0] for _ in range(5)]
    assert [verdict.converged for verdict in verdicts] == [False] * 7 + [True]
    assert verdicts[-1].distances == (0.0,) * 4


def test_corrected_takes_equal_scores_for_no_choice():
    window = MaskWindow(StopRule(), [0.1, 0.9])
    for _ in range(6):
        verdicts = window.check(torch.ones(64))
    assert [verdict.distance for verdict in verdicts] == [1.0, 1.0]
