"""MACs and training cost."""

import torch
from torch import nn

from raytickets.cost import macs, params, training_macs


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
