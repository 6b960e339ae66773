"""The shrunk network computes what the masked one does, and is otherwise a network like any."""

import copy
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional

from raytickets.config import Network
from raytickets.models import TORCHVISION, build_network
from raytickets.shrink import (
    UnsupportedNetwork,
    channel_groups,
    check_prunable,
    gammas,
    mask_network,
    narrowed,
    scorer,
    sensitivity,
    shrink,
    spread,
)

FAST = [
    "cifar_vgg",
    "cifar_resnet",
    "cifar_preresnet",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "googlenet",
]
SLOW = [
    *("resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "regnet_x_400mf", "vgg16_bn"),
    *("mobilenet_v2", "mobilenet_v3_large", "densenet121", "efficientnet_b0", "efficientnet_v2_s"),
    *("mnasnet0_5", "inception_v3"),
]
# regnet_y_128gf passes too, but takes 15 GB.
REST = sorted({*TORCHVISION} - {*FAST, *SLOW, "regnet_y_128gf"})


def build(name, seed=0, **options):
    return build_network(Network(name, options), in_channels=3, num_classes=10, seed=seed)


def images_for(name):
    small = dict.fromkeys(("cifar_vgg", "cifar_resnet", "cifar_preresnet"), 32)
    side = {**small, "inception_v3": 80}.get(name, 64)
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).double()


def as_if_trained(network):
    """In float64, with BatchNorms that are all different."""
    generator = torch.Generator().manual_seed(1)
    for norm in norms_of(network).values():
        for tensor in (norm.weight, norm.get_buffer("running_var")):
            nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
        for tensor in (norm.bias, norm.get_buffer("running_mean")):
            nn.init.uniform_(tensor, -0.5, 0.5, generator=generator)
    return network.double().eval()


def norms_of(network):
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}


def random_mask(groups, ratio, seed=0):
    """Drops about `ratio` of the channels, but never all of a group."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.rand(group.width, generator=generator) for group in groups]
    return torch.cat([(draw >= ratio) | (draw == draw.max()) for draw in draws])


def masked(network, groups, mask):
    network = copy.deepcopy(network)
    mask_network(network, groups, mask)
    return network


def difference(outputs, expected):
    return ((outputs - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(
    scope="module", params=[*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)
def trained(request):
    """A network's name, the network as if trained, its channel groups, and images."""
    network, images = as_if_trained(build(request.param)), images_for(request.param)
    return request.param, network, channel_groups(network, images), images


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_masked_and_shrunk_agree(trained, ratio):
    _, network, groups, images = trained
    mask = random_mask(groups, ratio)
    small = shrink(network, groups, mask)
    with torch.no_grad():
        expected = masked(network, groups, mask)(images)
        assert difference(small(images), expected) < 1e-9
        assert difference(network(images), expected) > 1e-6


def test_every_batchnorm_channel_belongs_to_one_mask_channel(trained):
    _, network, groups, _ = trained
    found = [(p.module, c) for g in groups for p in g.batchnorms for c in p.channels]
    assert len(found) == len(set(found)) == len(gammas(network))


def test_the_shrunk_network_holds_the_kept_channels_and_nothing_else(trained):
    _, network, groups, _ = trained
    mask = random_mask(groups, 0.5)
    small = shrink(network, groups, mask)
    kept = [keep.tolist() for keep in mask.split([group.width for group in groups])]
    expected = dict.fromkeys(norms_of(network), 0)
    for group, keep in zip(groups, kept, strict=True):
        for part in group.batchnorms:
            expected[part.module] += sum(keep[owner] for owner in part.owners)
    for name, norm in norms_of(small).items():
        assert norm.num_features == expected[name]
        assert {len(tensor) for tensor in norm.state_dict().values() if tensor.dim()} == {
            expected[name]
        }
    parameters = list(small.parameters())
    stored = small.state_dict(keep_vars=True).values()
    assert {id(p) for p in parameters} == {id(t) for t in stored if isinstance(t, nn.Parameter)}
    assert not {id(p) for p in parameters} & {id(p) for p in network.parameters()}
    assert sum(p.numel() for p in parameters) < sum(p.numel() for p in network.parameters())


def test_the_shrunk_network_trains_a_step(trained):
    _, network, groups, images = trained
    small = shrink(network, groups, random_mask(groups, 0.5)).float().train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.01)
    loss = functional.cross_entropy(small(images.float()), torch.tensor([1, 2]))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert [name for name, p in small.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p).all() for p in small.parameters())


def test_a_mask_rebuilds_the_shrunk_network_from_fresh_weights(trained):
    name, network, groups, images = trained
    mask = random_mask(groups, 0.5)
    small = shrink(network, groups, mask)
    fresh = build(name, seed=1).double().eval()
    fresh_groups = channel_groups(fresh, images)
    assert fresh_groups == groups
    rebuilt = shrink(fresh, fresh_groups, mask)
    rebuilt.load_state_dict(small.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(rebuilt(images), small(images))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", REST)
def test_every_other_network_of_torchvision_can_be_shrunk(name):
    network, images = build(name), images_for(name).float()
    check_prunable(network, channel_groups(network, images), images)


def tiny(name):
    """A network of about 100 channels, as if trained, with its groups and images."""
    options = {
        "cifar_vgg": {"depth": 9, "width": 0.125},
        "cifar_resnet": {"depth": 8, "width": 4},
        "cifar_preresnet": {"depth": 20, "width": 2},
    }
    network = as_if_trained(build(name, **options[name]))
    images = images_for(name)[..., :8, :8]
    return network, channel_groups(network, images), images


TINY = {name: tiny(name) for name in ("cifar_vgg", "cifar_resnet", "cifar_preresnet")}


@pytest.mark.parametrize("name", TINY)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_mask_that_keeps_a_channel_of_each_group_shrinks_exactly(name, data):
    network, groups, images = TINY[name]
    kept = []
    for group in groups:
        keep = data.draw(st.lists(st.booleans(), min_size=group.width, max_size=group.width))
        keep[data.draw(st.integers(0, group.width - 1))] = True
        kept.append(keep)
    mask = torch.tensor(list(itertools.chain(*kept)))
    small = shrink(network, groups, mask)
    with torch.no_grad():
        assert difference(small(images), masked(network, groups, mask)(images)) < 1e-9
    for group, keep in zip(groups, kept, strict=True):
        assert small.get_submodule(group.name).out_channels == sum(keep)


def test_an_add_joins_all_batchnorms_of_a_stage_of_cifar_resnet():
    network = build("cifar_resnet", depth=14)
    groups = {g.name: g for g in channel_groups(network, images_for("cifar_resnet").float())}
    stream = groups["0"]
    assert [part.module for part in stream.batchnorms] == ["1", "3.bn2", "4.bn2"]
    assert [part.module for part in groups["3.conv1"].batchnorms] == ["3.bn1"]
    second = groups["5.conv2"]
    assert {p.module for p in second.batchnorms} == {"5.bn2", "5.shortcut.1", "6.bn2"}
    assert (stream.width, second.width) == (16, 32)


def test_groups_come_in_the_order_of_the_modules_and_leave_the_network_as_it_was():
    network = build("cifar_resnet")
    network.get_submodule("0").requires_grad_(False)
    network.get_submodule("1").eval()
    groups = channel_groups(network, images_for("cifar_resnet").float())
    order = [name for name, _ in network.named_modules()]
    assert [g.name for g in groups] == sorted((g.name for g in groups), key=order.index)
    assert groups[0].name == "0"
    assert network.training
    assert not network.get_submodule("1").training
    assert not network.get_parameter("0.weight").requires_grad
    with torch.no_grad():
        assert groups == channel_groups(network, images_for("cifar_resnet").float())


class Head(nn.Sequential):
    """Layers, then global average pooling."""

    def __init__(self, *layers):
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def conv_norm(in_channels, out_channels, **options):
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, **options),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


def small_images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_a_grouped_convolution_loses_whole_groups(ratio):
    layers = [*conv_norm(3, 8), *conv_norm(8, 16, groups=4), *conv_norm(16, 6)]
    network = as_if_trained(Head(*layers, nn.Conv2d(6, 10, 1)))
    groups = channel_groups(network, small_images())
    assert [(g.name, g.width) for g in groups] == [("0", 4), ("6", 6)]
    before, behind = groups[0].batchnorms
    assert (before.module, before.owners) == ("1", (0, 0, 1, 1, 2, 2, 3, 3))
    assert (behind.module, behind.owners) == ("4", tuple(i // 4 for i in range(16)))
    mask = random_mask(groups, ratio)
    small = shrink(network, groups, mask)
    left = int(mask[:4].sum())
    grouped = small.get_submodule("3")
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (left, 2 * left, 4 * left)
    with torch.no_grad():
        expected = masked(network, groups, mask)(small_images())
        assert difference(small(small_images()), expected) < 1e-9


def test_a_grouped_convolution_that_reads_the_images_keeps_all_its_channels():
    network = Head(*conv_norm(3, 6, groups=3), *conv_norm(6, 8), nn.Conv2d(8, 10, 1)).double()
    assert [g.name for g in channel_groups(network, small_images())] == ["3"]


@pytest.mark.parametrize(
    "head",
    [
        Head(*conv_norm(8, 10)),
        Head(nn.Conv2d(8, 10, 1)),
        nn.Sequential(Head(), nn.Linear(8, 10)),
        nn.Sequential(Head(), nn.Linear(8, 10), nn.LogSoftmax(1)),
    ],
)
def test_the_network_s_outputs_and_channels_without_batchnorm_are_never_dropped(head):
    layers = [*conv_norm(3, 8), nn.Conv2d(8, 4, 3), nn.ReLU(), *conv_norm(4, 8), head]
    network = nn.Sequential(*layers).double()
    assert [g.name for g in channel_groups(network, small_images())] == ["0", "5"]


def test_channels_that_reach_another_kind_of_normalisation_are_never_dropped():
    layers = [*conv_norm(3, 8), *conv_norm(8, 4), nn.GroupNorm(2, 4), nn.Conv2d(4, 10, 1)]
    network = Head(*layers).double()
    assert [g.name for g in channel_groups(network, small_images())] == ["0"]


@pytest.mark.parametrize("name", ["cifar_resnet", "mobilenet_v3_small", "regnet_y_400mf"])
def test_a_score_is_the_mean_scale_over_the_batchnorms_of_its_channel(name):
    network = as_if_trained(build(name)).float()
    groups = channel_groups(network, images_for(name).float())
    norms, expected = norms_of(network), []
    for group in groups:
        for channel in range(group.width):
            scales = [
                abs(norms[part.module].weight[index].item())
                for part in group.batchnorms
                for index, owner in zip(part.channels, part.owners, strict=True)
                if owner == channel
            ]
            expected.append(sum(scales) / len(scales))
    found = scorer(network, groups)()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(found, scorer(network, groups)())


def test_a_scorer_sees_what_has_changed_since():
    network, groups, _ = TINY["cifar_resnet"]
    network = copy.deepcopy(network)
    score = scorer(network, groups)
    mask = random_mask(groups, 0.5)
    assert score().min() > 0
    mask_network(network, groups, mask)
    assert ((score() > 0) == mask).all()


@pytest.mark.parametrize("name", ["cifar_resnet", "mobilenet_v3_small", "regnet_y_400mf"])
def test_sensitivity_sums_over_the_weights_that_write_a_channel(name):
    network = build(name).float().train()
    images = images_for(name).float()
    groups = channel_groups(network, images)
    network(images).square().sum().backward()
    expected = []
    for group in groups:
        for channel in range(group.width):
            rows = [
                (network.get_submodule(part.module).weight, index)
                for part in group.parts
                if part.axis == "out"
                for index, owner in zip(part.channels, part.owners, strict=True)
                if owner == channel
            ]
            expected.append(sum((w[i] * w.grad[i]).abs().sum().item() for w, i in rows))
    found = sensitivity(network, groups)
    assert found.dtype == torch.float32
    assert found.max() > 0
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-7)


def test_a_channel_that_the_loss_does_not_depend_on_has_no_sensitivity():
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.Flatten()
    )
    images = torch.rand(4, 1, 5, 5)
    groups = channel_groups(network, images)
    with torch.no_grad():
        network.get_parameter("3.weight")[:, 1] = 0
    network(images).square().sum().backward()
    scores = sensitivity(network, groups)
    assert scores[1] == 0
    assert (scores[[0, 2]] > 0).all()


def test_gammas_are_all_scales_in_module_order_without_sign():
    network = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False), nn.BatchNorm2d(1))
    with torch.no_grad():
        network.get_parameter("0.weight").copy_(torch.tensor([-1.0, 2.0]))
        network.get_parameter("2.weight").fill_(-3.0)
    assert gammas(network).tolist() == [1.0, 2.0, 3.0]
    assert not gammas(network).requires_grad


def test_shrinking_leaves_the_network_and_keeps_what_was_set_on_it():
    network = build("cifar_resnet", depth=8)
    images = images_for("cifar_resnet").float()
    network(images).sum().backward()
    network.get_submodule("3.conv1").requires_grad_(False)
    network.get_submodule("1").eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    groups = channel_groups(network, images)
    small = shrink(network, groups, random_mask(groups, 0.5))
    assert [m.training for m in small.modules()] == [m.training for m in network.modules()]
    flags = [[p.requires_grad for p in n.parameters()] for n in (small, network)]
    assert flags[0] == flags[1]
    assert all(p.grad is None for p in small.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_shrinking_one_network_does_not_change_how_the_next_is_shrunk():
    other, other_groups, other_images = TINY["cifar_vgg"]
    network, groups, images = TINY["cifar_resnet"]
    mask = random_mask(groups, 0.5)
    alone = shrink(network, groups, mask)
    shrunk = shrink(other, other_groups, random_mask(other_groups, 0.5))
    channel_groups(shrunk, other_images)
    again = channel_groups(network, images)
    assert again == groups
    after = shrink(network, again, mask)
    assert after.state_dict().keys() == alone.state_dict().keys()
    assert all(map(torch.equal, after.state_dict().values(), alone.state_dict().values()))


def test_a_shrunk_network_can_be_shrunk_again():
    network, groups, images = TINY["cifar_resnet"]
    small = shrink(network, groups, random_mask(groups, 0.3))
    check_prunable(small, channel_groups(small, images), images)


@pytest.mark.parametrize("name", TINY)
@settings(max_examples=5)
@given(data=st.data())
def test_shrinking_in_rounds_is_shrinking_at_once(name, data):
    """What lets a ticket that was cut several times be one mask over the whole network."""
    network, groups, images = TINY[name]
    seed = data.draw(st.integers(0, 1000))
    scores = torch.rand(sum(g.width for g in groups), generator=torch.Generator().manual_seed(seed))
    widths = [group.width for group in groups]
    best = torch.cat([part == part.max() for part in scores.split(widths)])
    wide, narrow = best | (scores > 0.3), best | (scores > 0.6)
    small = shrink(network, groups, wide)
    again = channel_groups(small, images)
    assert narrowed(groups, wide) == again
    kept = [int(part.sum()) for part in wide.split(widths)]
    assert [(g.name, g.width) for g in again] == list(
        zip((g.name for g in groups), kept, strict=True)
    )
    twice, once = shrink(small, again, narrow[wide]), shrink(network, groups, narrow)
    assert all(map(torch.equal, twice.state_dict().values(), once.state_dict().values()))


class Branches(nn.Module):
    """An add of 32 channels and of four branches of 8, which are all one group."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8)) for _ in range(4)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        images = self.stem(images)
        images = images + torch.cat([branch(images) for branch in self.branches], 1)
        return self.head(images.mean((2, 3)))


@given(seed=st.integers(0, 1000), ratio=st.floats(0.1, 0.99))
@settings(max_examples=20, deadline=None)
def test_no_branch_is_left_without_a_channel(seed, ratio):
    network, images = as_if_trained(Branches()), images_for("cifar_vgg")
    groups = channel_groups(network, images)
    assert [group.width for group in groups] == [32]
    scores = torch.rand(32, generator=torch.Generator().manual_seed(seed))
    mask = spread(groups, scores > ratio, scores)
    added = mask & ~(scores > ratio)
    for branch in range(4):
        own = slice(8 * branch, 8 * branch + 8)
        assert int(added[own].sum()) == (not (scores[own] > ratio).any())
        assert mask[own].any()
        assert not added[own].any() or bool(added[own][scores[own].argmax()])
    small = shrink(network, groups, mask)
    with torch.no_grad():
        assert difference(small(images), masked(network, groups, mask)(images)) < 1e-9


def test_a_mask_that_leaves_a_branch_without_a_channel_is_refused():
    network, images = Branches(), images_for("cifar_vgg").float()
    groups = channel_groups(network, images)
    with pytest.raises(ValueError, match=r"keeps no channel of group .* in branches\.1\."):
        shrink(network, groups, torch.arange(32) < 8)


def test_a_grouped_convolution_with_one_group_left_stays_one_channel():
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1, groups=2)),
        *(nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 16, 10)),
    )
    images = torch.zeros(1, 3, 4, 4)
    groups = channel_groups(network, images)
    (width,) = {group.width for group in groups}
    assert width == 2
    mask = torch.tensor([True, False] * len(groups))
    small = shrink(network, groups, mask)
    left = narrowed(groups, mask)
    assert [group.width for group in left] == [1] * len(groups)
    whole = torch.ones(len(groups), dtype=torch.bool)
    kept = shrink(small, left, whole).state_dict().values()
    assert all(map(torch.equal, small.state_dict().values(), kept))
    assert len(scorer(small, left)()) == len(groups)


def test_a_mask_that_keeps_everything_changes_nothing():
    network, groups, images = TINY["cifar_resnet"]
    mask = torch.ones(sum(group.width for group in groups), dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(shrink(network, groups, mask)(images), network(images))


def test_a_mask_that_does_not_fit_is_refused():
    network, groups, _ = TINY["cifar_resnet"]
    total = sum(group.width for group in groups)
    empty = torch.ones(total, dtype=torch.bool)
    empty[: groups[0].width] = False
    with pytest.raises(ValueError, match=r"keeps no channel of group 0 in 0$"):
        shrink(network, groups, empty)
    for mask in (torch.ones(total), torch.ones(total - 1, dtype=torch.bool)):
        for act in (shrink, mask_network):
            with pytest.raises(ValueError, match=rf"the mask must be bool \[{total}\]"):
                act(network, groups, mask)


def test_checking_moves_neither_the_network_nor_the_random_state():
    network = build("cifar_resnet", depth=8)
    images = images_for("cifar_resnet").float()
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    check_prunable(network, channel_groups(network, images), images)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert all(map(torch.equal, network.state_dict().values(), before.values()))


class Shuffled(nn.Module):
    """Two convolutions with ShuffleNet's channel shuffle between them."""

    def __init__(self, bias=True):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8))
        self.second = nn.Sequential(*conv_norm(8, 8))
        self.head = Head(nn.Conv2d(8, 10, 1))

    def forward(self, images):
        inner = self.first(images)
        count, channels, height, width = inner.shape
        halves = inner.view(count, 2, channels // 2, height, width).transpose(1, 2)
        return self.head(self.second(halves.reshape(count, channels, height, width)))


class FixedSize(Shuffled):
    def forward(self, images):
        return self.head(self.second(self.first(images).view(-1, 8, 8, 8)))


class ReadRaw(Shuffled):
    """Adds channels of a convolution that no BatchNorm covers on that path."""

    def forward(self, images):
        raw = self.first[0](images)
        return self.head(self.second(self.first[1](raw)) + self.second[0](raw))


class FixedSizeInTraining(Shuffled):
    def forward(self, images):
        inner = self.first(images)
        return self.head(self.second(inner.view(-1, 8, 8, 8) if self.training else inner))


class MoreInTraining(Shuffled):
    """As Inception, which gives an auxiliary output too."""

    def forward(self, images):
        outputs = self.head(self.second(self.first(images)))
        return (outputs, outputs) if self.training else outputs


def zeroed(network):
    """With a last layer that begins as nothing, behind which everything agrees."""
    nn.init.zeros_(network.head[0].weight)
    return network


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Shuffled(), "differ by .* of the largest once shrunk"),
        (FixedSize(), "it fails in training or once shrunk: RuntimeError: "),
        (ReadRaw(), "differ by .* of the largest once shrunk"),
        # It gives nothing to read for a black image.
        (ReadRaw(bias=False), "differ by .* of the largest once shrunk"),
        (zeroed(ReadRaw()), "differ by .* of the largest once shrunk"),
        (MoreInTraining(), "it gives something else in training than in evaluation"),
        (FixedSizeInTraining(), "it fails in training or once shrunk: RuntimeError: "),
    ],
)
def test_a_network_whose_channels_cannot_be_followed_is_refused(network, words):
    images = torch.zeros_like(small_images().float())
    with pytest.raises(UnsupportedNetwork, match=words):
        check_prunable(network, channel_groups(network, images), images)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Head(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 10, 1)), "no BatchNorm2d covers channels"),
        (Head(*conv_norm(3, 10)), "no BatchNorm2d covers channels"),
        (nn.Sequential(*conv_norm(1, 8)), "cannot trace it: RuntimeError: .*channels"),
    ],
)
def test_a_network_without_channel_groups_is_refused(network, words):
    with pytest.raises(UnsupportedNetwork, match=words):
        channel_groups(network, small_images().float())


@pytest.mark.slow
def test_shufflenet_cannot_be_traced():
    from torchvision.models import shufflenet_v2_x0_5

    with pytest.raises(UnsupportedNetwork, match="cannot trace it"):
        channel_groups(shufflenet_v2_x0_5(), images_for("shufflenet").float())


@pytest.mark.slow
def test_maxvit_reads_its_stem_without_a_batchnorm():
    from torchvision.models import maxvit_t

    network, images = maxvit_t(), torch.zeros(1, 3, 224, 224)
    with pytest.raises(UnsupportedNetwork, match="differ by"):
        check_prunable(network, channel_groups(network, images), images)
