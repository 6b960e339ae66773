"""The training loop against PyTorch's own optimizer and schedules; bfloat16 beside float32."""

import copy
from itertools import islice

import pytest
import torch
from torch import nn

from raytickets.batches import Batches
from raytickets.config import Data, Network, Training
from raytickets.data import load_data
from raytickets.models import build_network
from raytickets.train import (
    SGD,
    Numerics,
    accuracy,
    add_penalty,
    fit,
    learning_rate,
    numerics,
    round_at_random,
    scale_parameters,
    seeded,
    train,
)

PLAIN = Numerics(torch.device("cpu"), torch.float32, channels_last=False)


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


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_an_epoch_is_what_torch_optim_computes(momentum):
    ours, theirs = small_network(), small_network()
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=momentum, weight_decay=1e-2)
    loss = train(ours, SGD(ours, momentum, 1e-2), batches(), [0.1] * 5, PLAIN, penalty=1e-2)
    losses = []
    for images, labels in batches():
        optimizer.zero_grad()
        task = nn.functional.cross_entropy(theirs(images), labels)
        (task + 1e-2 * theirs[1].weight.abs().sum()).backward()
        optimizer.step()
        losses.append(task.item())
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference)
    assert loss.item() == pytest.approx(sum(losses))


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
        train(network, SGD(network, 0.9, 1e-4), batches(), [0.1] * 5, PLAIN, penalty=1e-3)
        networks.append(network.state_dict())
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])


@pytest.fixture(scope="module")
def digits():
    return Batches(load_data(Data("digits")), Data("digits"))


def trained(digits, how, epochs=2):
    """A small VGG after some epochs on digits, and its losses."""
    network = build_network(
        Network("cifar_vgg", {"depth": 9, "width": 0.25}), in_channels=1, num_classes=10, seed=0
    )
    optimizer = SGD(how.place(network), 0.9, 1e-4)
    rates = [0.02] * digits.count(32)
    losses = [
        train(network, optimizer, digits.training(32, seeded(epoch)), rates, how, 1e-4).item()
        for epoch in range(epochs)
    ]
    return network, losses


def test_channels_last_computes_what_the_plain_layout_does(digits):
    plain, losses = trained(digits, PLAIN)
    other, others = trained(digits, Numerics(torch.device("cpu"), torch.float32, True))
    assert others == pytest.approx(losses, rel=1e-3)
    assert other.conv1_1.weight.is_contiguous(memory_format=torch.channels_last)
    for mine, reference in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-2, atol=1e-3)


def test_bfloat16_learns_as_the_plain_loop_does(digits):
    """Rounding to 8 bits changes every step a little, and the outcome not much."""
    how = Numerics(torch.device("cpu"), torch.bfloat16, channels_last=True)
    (plain, losses), (low, others) = trained(digits, PLAIN), trained(digits, how)
    assert others == pytest.approx(losses, rel=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in low.parameters())
    scales = [torch.cat([s.detach() for s in scale_parameters(n)]) for n in (plain, low)]
    assert torch.corrcoef(torch.stack(scales))[0, 1] > 0.95
    right = [accuracy(n, digits, "validation", h) for n, h in ((plain, PLAIN), (low, how))]
    assert right[1] == pytest.approx(right[0], abs=0.03)


def test_logits_are_float32_whatever_computes_them(digits):
    images, _ = next(digits.evaluation("validation"))
    network = small_vgg = build_network(
        Network("cifar_vgg", {"depth": 9, "width": 0.125}), in_channels=1, num_classes=10, seed=0
    ).eval()
    how = Numerics(torch.device("cpu"), torch.bfloat16, channels_last=True)
    exact, rounded = PLAIN.logits(network, images), how.logits(small_vgg, images)
    assert exact.dtype == rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("fast", [True, False])
def test_auto_is_bfloat16_where_the_processor_computes_it(monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    dense = small_network()
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4))
    assert numerics("auto", True, dense).dtype == (torch.bfloat16 if fast else torch.float32)
    assert numerics("auto", True, grouped).dtype == torch.float32
    assert numerics("float32", True, dense).dtype == torch.float32
    assert numerics("bfloat16", True, grouped).dtype == torch.bfloat16


def fitted(digits, recipe, *, parts=None, **options):
    """A tiny network's weights after the recipe, stopped every few `parts`, and what `fit` told."""
    network = build_network(
        Network("cifar_vgg", {"depth": 9, "width": 0.125}), in_channels=1, num_classes=10, seed=0
    )
    optimizer, told, first = SGD(network, recipe.momentum, recipe.weight_decay), [], 0
    while first < recipe.epochs * digits.count(recipe.batch_size):
        losses = fit(network, optimizer, digits, recipe, (), PLAIN, first=first, **options)
        told += islice(losses, parts)
        first = told[-1][0]
    return network.state_dict(), told


RECIPE = Training(epochs=2, batch_size=32, learning_rate=0.05, schedule="cosine")


def test_fit_is_the_recipe_epoch_by_epoch(digits):
    weights, told = fitted(digits, RECIPE, penalty=1e-3)
    network = build_network(
        Network("cifar_vgg", {"depth": 9, "width": 0.125}), in_channels=1, num_classes=10, seed=0
    )
    optimizer, count = SGD(network, 0.9, 1e-4), digits.count(32)
    assert [steps for steps, _ in told] == [25, count, count + 25, 2 * count]
    for epoch in range(2):
        rates = [learning_rate(RECIPE, (epoch * count + step) / count) for step in range(count)]
        loss = train(network, optimizer, digits.training(32, seeded(epoch)), rates, PLAIN, 1e-3)
        assert sum(part for _, part in told[2 * epoch :][:2]) == pytest.approx(loss)
    assert all(torch.equal(weights[name], other) for name, other in network.state_dict().items())


def test_looking_more_often_and_going_on_later_change_nothing(digits):
    weights, told = fitted(digits, RECIPE)
    often, looks = fitted(digits, RECIPE, checks_per_epoch=3)
    later, again = fitted(digits, RECIPE, parts=1)
    count = digits.count(32)
    places = sorted([count // 3, 25, 2 * count // 3, count])
    assert [steps for steps, _ in looks] == [*places, *(count + place for place in places)]
    assert told == again
    for others in (often, later):
        assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_workers_share_every_batch(digits, monkeypatch):
    asked = []
    training = digits.training

    def recorded(size, order, rank, world, first):
        asked.append((rank, world))
        return training(size, order, rank, world, first)

    monkeypatch.setattr(digits, "training", recorded)
    fitted(digits, RECIPE, worker=(1, 2))
    assert asked == [(1, 2), (1, 2)]


def test_files_are_decoded_by_the_same_processes_in_every_epoch(image_folder, monkeypatch):
    data = Data(
        "folder", str(image_folder({"cat": 20, "dog": 20})), loading="stream", loader_workers=1
    )
    batches, started = Batches(load_data(data), data), []
    start = batches._decoders._start
    monkeypatch.setattr(batches._decoders, "_start", lambda: started.append(1) or start())
    network = nn.Sequential(nn.Conv2d(3, 2, 8), nn.BatchNorm2d(2), nn.Flatten())
    recipe = Training(epochs=3, batch_size=4, learning_rate=0.01)
    list(fit(network, SGD(network, 0.9, 0), batches, recipe, (), PLAIN, checks_per_epoch=2))
    assert len(started) == 1


def test_weights_in_bfloat16_are_so_everywhere_but_in_the_loss(digits):
    low = Numerics(torch.device("cpu"), torch.bfloat16, True, weights=torch.bfloat16)
    network, losses = trained(digits, low)
    tensors = [tensor for tensor in network.state_dict().values() if tensor.ndim]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert {velocity.dtype for velocity in SGD(network, 0.9, 0).velocity} == {torch.bfloat16}
    images, _ = next(digits.evaluation("validation"))
    assert low.logits(network, images).dtype == torch.float32
    assert losses[1] < losses[0]
    assert accuracy(network, digits, "validation", low) > 0.5


def test_exact_is_float32_whatever_trained():
    low = Numerics(torch.device("cpu"), torch.bfloat16, True, weights=torch.bfloat16)
    assert low.exact == Numerics(torch.device("cpu"), torch.float32, True)
    network = low.exact.place(low.place(small_network()))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_rounding_at_random_is_right_on_average():
    values = torch.tensor([1.0, 1.003, -0.7, 3e-5, 0.0, -torch.inf])
    drawn = torch.stack([round_at_random(values, seeded(place)) for place in range(4000)])
    assert torch.equal(drawn, drawn.bfloat16().float())
    torch.testing.assert_close(drawn.double().mean(0), values.double(), rtol=1e-4, atol=0)
    for place, value in enumerate(values):
        expected = 1 if value == value.bfloat16() else 2
        assert len(drawn[:, place].unique()) == expected


def test_steps_smaller_than_bfloat16_can_tell_are_not_lost():
    network = nn.Linear(10_000, 1, bias=False).bfloat16()
    nn.init.ones_(network.weight)
    optimizer = SGD(network, 0.0, 0.0)
    for _ in range(100):
        network.weight.grad = torch.ones_like(network.weight)
        optimizer.step(1e-4)
    assert network.weight.float().mean().item() == pytest.approx(0.99, abs=1e-3)
    assert network.weight.float().std() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_goes_on_from_its_state(dtype):
    whole = small_network().to(dtype)
    stopped, how = copy.deepcopy(whole), Numerics(torch.device("cpu"), dtype, False, weights=dtype)
    first, second = SGD(whole, 0.9, 1e-2), SGD(stopped, 0.9, 1e-2)
    for network, optimizer in ((whole, first), (stopped, second)):
        train(network, optimizer, batches(), [0.1] * 5, how)
    state = {name: tensor.clone() for name, tensor in second.state().items()}
    second = SGD(stopped, 0.9, 1e-2)
    second.load(state)
    for network, optimizer in ((whole, first), (stopped, second)):
        train(network, optimizer, batches(), [0.1] * 5, how)
    weights = stopped.state_dict()
    assert all(torch.equal(weights[name], other) for name, other in whole.state_dict().items())
