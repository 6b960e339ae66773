"""MACs and training cost."""

import time

import pytest
import torch
from torch import nn

from raytickets.cost import Ledger, latencies, macs, params, training_macs


def test_macs_of_a_convolution_and_a_linear_layer():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 25, 10))
    assert macs(network, torch.zeros(1, 3, 5, 5)) == 25 * 8 * 27 + 8 * 25 * 10
    assert params(network) == 8 * 27 + 8 + 2000 + 10


def test_macs_of_a_grouped_convolution():
    network = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert macs(network, torch.zeros(1, 8, 4, 4)) == 16 * 8 * 9


def test_counting_leaves_the_mode_and_statistics_alone():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
    macs(network, torch.ones(1, 1, 2, 2))
    assert network.training
    assert network[1].running_mean.tolist() == [0, 0]


def test_training_costs_three_forward_passes():
    assert training_macs(100, 7) == 2100


class Sleeper(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.calls = seconds, []

    def forward(self, images):
        self.calls.append((self.training, torch.is_grad_enabled()))
        time.sleep(self.seconds)
        return images


def test_latencies_are_medians_in_milliseconds_of_evaluation():
    short, long = Sleeper(0.001), Sleeper(0.004)
    found = latencies([short, long], torch.zeros(1, 1, 2, 2), repeats=20)
    assert found == [pytest.approx(1, rel=0.9), pytest.approx(4, rel=0.5)]
    assert found[0] < found[1]
    assert short.calls == [(False, False)] * 25


def test_ledgers_of_stages_add_up():
    first = Ledger(1, 2, 3, 4.0, 5.0, "measured (a)")
    both = first + Ledger(10, 20, 30, 40.0, 50.0, "measured (b)")
    assert both == Ledger(11, 22, 33, 44.0, 55.0, "measured (a) + measured (b)")
    assert (first + first).energy == "measured (a)"


def test_energy_that_is_unknown_for_a_part_is_unknown_for_the_whole():
    first = Ledger(1, 2, 3, 4.0, 5.0, "measured (a)")
    both = first + Ledger(1, 2, 3, 4.0, None, "unavailable")
    assert (both.joules, both.energy) == (None, "unavailable")
