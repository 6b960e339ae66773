"""The training loop against PyTorch's own optimizer and schedules."""

import copy

import pytest
import torch
from torch import nn

from raytickets.config import Training
from raytickets.train import SGD, add_penalty, learning_rate, scale_parameters, seeded, train_epoch


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 3)
    )


def batches(count=5):
    generator = seeded("batches")
    return [
        (torch.randn(8, 1, 4, 4, generator=generator), torch.randint(3, (8,), generator=generator))
        for _ in range(count)
    ]


def test_an_epoch_is_what_torch_optim_computes():
    ours, theirs = small_network(), small_network()
    recipe = Training(epochs=3, learning_rate=0.1, momentum=0.9, weight_decay=1e-2)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    loss = train_epoch(ours, SGD(ours, 0.9, 1e-2), recipe, 0, batches(), 5, penalty=1e-2)
    losses = []
    for images, labels in batches():
        optimizer.zero_grad()
        task = nn.functional.cross_entropy(theirs(images), labels)
        (task + 1e-2 * theirs[1].weight.abs().sum()).backward()
        optimizer.step()
        losses.append(task.item())
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference)
    assert loss == pytest.approx(sum(losses) / 5)


def test_the_penalty_pulls_scales_to_zero_and_leaves_the_rest():
    network = small_network()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([-2.0, 0.0, 0.5, 3.0]))
    add_penalty(scale_parameters(network), 0.1)
    assert network[1].weight.grad.tolist() == pytest.approx([-0.1, 0.0, 0.1, 0.1])
    assert not network[0].weight.grad.any()
    assert not network[1].bias.grad.any()


def test_the_optimizer_holds_exactly_the_trainable_parameters():
    network = small_network()
    network[0].weight.requires_grad_(False)
    held = SGD(network, 0.9, 0.0).params
    assert {id(p) for p in held} == {id(p) for p in network.parameters() if p.requires_grad}


def test_schedules():
    cosine = Training(epochs=10, learning_rate=1.0, schedule="cosine")
    assert learning_rate(cosine, 0) == 1
    assert learning_rate(cosine, 5) == pytest.approx(0.5)
    assert learning_rate(cosine, 10) == pytest.approx(0)
    steps = Training(epochs=10, learning_rate=1.0, schedule="multistep", milestones=(4, 8))
    assert [learning_rate(steps, at) for at in (0, 3.9, 4, 8)] == pytest.approx([1, 1, 0.1, 0.01])
    assert learning_rate(Training(epochs=10, learning_rate=0.3), 9.9) == 0.3


def test_streams_differ_by_purpose_and_repeat():
    draws = [torch.rand(3, generator=seeded(*p)).tolist() for p in [("a", 1), ("a", 1), ("a", 2)]]
    assert draws[0] == draws[1] != draws[2]


def test_training_repeats_bit_for_bit():
    networks = []
    for _ in range(2):
        network = copy.deepcopy(small_network())
        recipe = Training(epochs=1)
        train_epoch(network, SGD(network, 0.9, 1e-4), recipe, 0, batches(), 5, penalty=1e-3)
        networks.append(network.state_dict())
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])
