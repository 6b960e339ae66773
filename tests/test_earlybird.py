"""The stop rule against the published algorithm, and against noise."""

from fractions import Fraction
from itertools import pairwise
from typing import get_args

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from raytickets.config import Rule, StopRule
from raytickets.earlybird import MaskWindow

RULES = get_args(Rule)


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


class PublishedIndicator:
    """Equations 4 to 6 of Shen et al. 2022 for one ratio, step by step and in exact numbers."""

    def __init__(self, ratio, widths, older=4, limit=Fraction(17, 1000)):
        self.ratio, self.widths, self.older, self.limit = ratio, widths, older, limit
        self.networks, self.indicators = [], []

    def widths_kept(self, scores):
        threshold = sorted(scores)[int(len(scores) * self.ratio)]
        left, kept = list(scores), []
        for width in self.widths:
            group, left = left[:width], left[width:]
            kept.append(sum(score > threshold for score in group))
        return kept

    def similarity(self, ours, theirs):
        if not sum(ours) or not sum(theirs):
            return Fraction(0)
        pairs = zip(ours, theirs, strict=True)
        apart = [Fraction(abs(n - m), n + m) if n + m else 0 for n, m in pairs]
        return 1 - sum(apart, start=Fraction(0)) / len(apart)

    def prunes(self, scores):
        network = self.widths_kept(scores)
        past, self.networks = self.networks[-self.older :], [*self.networks, network]
        if len(past) < self.older:
            return False
        indicator = sum(self.similarity(network, other) for other in past) / len(past)
        earlier, self.indicators = self.indicators[-self.older :], [*self.indicators, indicator]
        return indicator >= 1 - self.limit and all(indicator >= other for other in earlier)


@settings(max_examples=400)
@given(data=st.data(), stream=streams(), ratio=st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]))
def test_epi_decides_as_published(data, stream, ratio):
    cuts = data.draw(st.sets(st.integers(1, len(stream[0]) - 1)))
    bounds = [0, *sorted(cuts), len(stream[0])]
    widths = [end - start for start, end in pairwise(bounds)]
    # Small networks seldom come as close as the paper's limit.
    limit = data.draw(st.sampled_from([Fraction(17, 1000), Fraction(1, 8), Fraction(3, 8)]))
    rule = StopRule("epi", threshold=float(limit))
    published = PublishedIndicator(ratio, widths, limit=limit)
    window = MaskWindow(rule, [ratio], widths)
    for values in stream:
        scores = torch.tensor(values).abs()
        (verdict,) = window.check(scores)
        assert verdict.converged == published.prunes(scores.tolist())
        if verdict.distance is not None:
            assert verdict.distance == pytest.approx(1 - published.indicators[-1])


def test_epi_does_not_see_which_channels_are_kept():
    scores = torch.arange(20.0)
    window = MaskWindow(StopRule("epi"), [0.5], [20])
    for _ in range(6):
        scores = scores.flip(0)
        (verdict,) = window.check(scores)
    assert verdict.distance == 0
    assert verdict.converged


def test_epi_waits_while_the_widths_drift_faster():
    window = MaskWindow(StopRule("epi", threshold=0.5), [0.5], [100, 100])
    verdicts = []
    for moved in (0, 0, 0, 0, 0, 1, 3, 6, 10):
        scores = torch.cat([torch.arange(100.0) - moved, torch.arange(100.0) + moved + 0.5])
        verdicts += window.check(scores)
    assert [verdict.converged for verdict in verdicts] == [False] * 4 + [True] + [False] * 4
    assert verdicts[-1].distance < 0.5


def test_epi_needs_widths():
    with pytest.raises(ValueError, match="widths"):
        MaskWindow(StopRule("epi"), [0.5])


WIDTHS = [10, 15, 25]


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 2**32), ratios=st.permutations([0.1, 0.3, 0.5, 0.9]))
def test_all_ratios_are_judged_as_if_each_were_alone(rule, seed, ratios):
    generator = torch.Generator().manual_seed(seed)
    stream = [torch.rand(50, generator=generator) for _ in range(4)]
    stream += [stream[-1]] * 5
    together = MaskWindow(StopRule(rule), ratios, WIDTHS)
    alone = [MaskWindow(StopRule(rule), [ratio], WIDTHS) for ratio in ratios]
    for scores in stream:
        assert together.check(scores) == [window.check(scores)[0] for window in alone]


@pytest.mark.parametrize("rule", RULES)
@given(window=st.integers(2, 7), scores=st.permutations(range(50)))
def test_the_same_mask_converges_when_the_window_is_full_and_not_before(rule, window, scores):
    masks = MaskWindow(StopRule(rule, window=window), [0.2, 0.8], WIDTHS)
    for check in range(1, window + 3):
        for verdict in masks.check(torch.tensor(scores).float()):
            full = check >= window
            assert verdict.converged == full
            assert verdict.distances == (0.0,) * (window - 1 if full else 0)
            assert verdict.distance == (0.0 if full else None)


RATIOS = [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98]


def fired_on_noise(rule, channels, streams, checks, widths=()):
    """Per ratio, in how many streams of unrelated gammas the rule fires at least once."""
    generator = torch.Generator().manual_seed(0)
    fired = torch.zeros(len(RATIOS), dtype=torch.int64)
    for _ in range(streams):
        window = MaskWindow(StopRule(rule), RATIOS, widths)
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


def test_epi_fires_on_noise_at_small_ratios_in_wide_groups():
    """Random masks of a ratio keep about as many channels of a group each time."""
    vgg16 = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    fired = fired_on_noise("epi", 4224, streams=20, checks=40, widths=vgg16)
    assert fired[0.02] == fired[0.05] == fired[0.1] == fired[0.2] == 20
    assert fired[0.6] == fired[0.7] == fired[0.9] == fired[0.98] == 0
    narrow = fired_on_noise("epi", 528, streams=20, checks=40, widths=[w // 8 for w in vgg16])
    assert narrow[0.3] == narrow[0.5] == narrow[0.7] == narrow[0.9] == 0


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


@pytest.mark.parametrize("rule", ["corrected", "epi"])
def test_equal_scores_choose_nothing_and_are_far_from_all(rule):
    window = MaskWindow(StopRule(rule), [0.1, 0.9], [32, 32])
    for _ in range(6):
        verdicts = window.check(torch.ones(64))
    assert [verdict.distance for verdict in verdicts] == [1.0, 1.0]


@pytest.mark.parametrize("rule", RULES)
@given(stream=streams())
def test_the_matrix_holds_every_distance_that_was_seen(rule, stream):
    ratios, size = [0.6, 0.2], len(stream[0])
    window = MaskWindow(StopRule(rule), ratios, [size // 2, size - size // 2])
    seen = []
    for values in stream:
        seen.append(window.check(torch.tensor(values).abs()))
    checks, matrices = window.matrix()
    assert checks == list(range(1, len(stream) + 1))
    for place, ratio in enumerate(ratios):
        rows = torch.tensor(matrices[ratio], dtype=torch.float64)
        assert torch.equal(rows, rows.T)
        assert not rows.diagonal().any()
        for check in range(4, len(stream)):
            expected = [round(distance, 3) for distance in seen[check][place].distances]
            assert rows[check, check - 4 : check].tolist() == pytest.approx(expected, abs=1e-9)


def test_a_matrix_of_no_checks_is_empty():
    assert MaskWindow(StopRule(), [0.5]).matrix() == ([], {0.5: []})


@pytest.mark.parametrize("count", [63, 64, 65, 128, 129, 130, 1000])
def test_a_long_matrix_takes_64_checks_evenly(count):
    window = MaskWindow(StopRule(), [0.5])
    for _ in range(count):
        window.check(torch.rand(8))
    checks, matrices = window.matrix()
    assert len(checks) == len(matrices[0.5]) == len(matrices[0.5][0]) == min(count, 64)
    assert (checks[0], checks[-1]) == (1, count)
    steps = [after - before for before, after in pairwise(checks)]
    assert min(steps) > 0
    assert max(steps) <= 2 * max(1, count / 63)


@pytest.mark.parametrize("rule", RULES)
@given(stream=streams(), data=st.data())
def test_a_window_goes_on_from_its_state(rule, stream, data):
    width, ratios = len(stream[0]), [0.7, 0.1, 0.5]
    kind = StopRule(rule, window=data.draw(st.integers(2, 5)))
    whole, stopped = (MaskWindow(kind, ratios, [1, width - 1]) for _ in range(2))
    places = data.draw(st.sets(st.integers(0, len(stream) - 1)))
    for place, values in enumerate(stream):
        if place in places:
            state = stopped.state()
            stopped = MaskWindow(kind, ratios, [1, width - 1])
            stopped.load(state)
        scores = torch.tensor(values).abs()
        assert stopped.check(scores) == whole.check(scores)
    assert stopped.matrix() == whole.matrix()


def test_the_state_of_a_long_stream_is_small():
    window = MaskWindow(StopRule(), [0.3, 0.6])
    other = MaskWindow(StopRule(), [0.3, 0.6])
    for place in range(300):
        window.check(torch.rand(50, generator=torch.Generator().manual_seed(place)))
    state = window.state()
    other.load(state)
    assert state["held"].dtype == torch.uint8
    assert len(state["held"]) <= 128
    scores = torch.rand(50, generator=torch.Generator().manual_seed(-1))
    assert other.check(scores) == window.check(scores)
    assert other.matrix() == window.matrix()
