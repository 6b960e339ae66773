"""Channel groups, their scores, and the physically smaller network that a mask describes.

torch-pruning only follows the channels through the network. They are removed here, because its
own removal makes frozen parameters trainable, and takes single channels out of every group of a
grouped convolution where whole groups can go.
"""

import copy
import sys
import warnings
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

try:
    # For a counter that is not used here it imports timm where that is installed: 4 s a worker.
    sys.modules.setdefault("timm", None)  # type: ignore[arg-type]
    import torch_pruning
finally:
    if sys.modules["timm"] is None:
        del sys.modules["timm"]

Axis = Literal["norm", "out", "in"]


class UnsupportedNetwork(ValueError):
    """The network cannot be shrunk, for the reason given."""


@dataclass(frozen=True)
class Part:
    """What a channel group holds of one module: `channels[i]` belongs to `owners[i]`.

    `axis` is `norm` for a BatchNorm2d, `out` or `in` for the channels that a Conv2d or Linear
    writes or reads. Owners are mask channels, counted from 0 in the group. The input of a grouped
    convolution has no part, since it follows its output.
    """

    module: str
    axis: Axis
    channels: tuple[int, ...]
    owners: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together, as `width` mask channels.

    A mask channel is the smallest unit that can be removed: one channel in each of the modules
    that an add or a depthwise convolution joins, or all channels of one convolution group where a
    grouped convolution takes part. `name` is the first module, in the network's order, that
    writes the channels.
    """

    name: str
    width: int
    parts: tuple[Part, ...]

    @property
    def batchnorms(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.axis == "norm")


def channel_groups(network: nn.Module, example: Tensor) -> tuple[ChannelGroup, ...]:
    """The channel groups of a network, in the order of its modules.

    example is one batch of images the network takes, float [N, C, H, W]; the network itself is
    left as it was, and may be on the meta device. Channels stay out of all groups, and so are
    never removed, where no BatchNorm2d with a scale covers them, where they are the network's
    output, and where they reach anything but Conv2d, Linear and BatchNorm2d modules that has a
    width of its own. Raises `UnsupportedNetwork` if torch-pruning cannot follow the
    channels or finds none to remove.
    """
    # The copy is what tracing leaves in eval mode, and frozen parameters would hide their modules.
    device = "meta" if any(weight.is_meta for weight in network.parameters()) else "cpu"
    traced = copy.deepcopy(network).to(device).requires_grad_(True)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(
                traced, example[:1].to(device), forward_fn=lambda model, images: model(images)
            )
            flows = _trace_flows(traced, graph)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnsupportedNetwork(f"torch-pruning cannot trace it: {reason}") from error
    groups = _join_flows(traced, flows)
    if not groups:
        raise UnsupportedNetwork("no BatchNorm2d covers channels that could be removed")
    return groups


def gammas(network: nn.Module) -> Tensor:
    """abs(gamma) of every BatchNorm2d that has a scale, in module order.

    Float32 [sum of their widths], detached, on the network's device: what the rule of You et al.
    2020 (arXiv 1909.11957, section 3.2) sorts.
    """
    with torch.no_grad():
        return torch.cat([norm.weight for _, norm in _batchnorms(network)]).abs().float()


def scorer(network: nn.Module, groups: Sequence[ChannelGroup]) -> Callable[[], Tensor]:
    """A function of no arguments that scores the channels as they are when it is called.

    It gives each mask channel's mean abs(gamma) over its BatchNorm channels: float32 [sum of
    group widths] on the CPU, groups in the order given. What depends on the groups only is worked
    out here, so that a call costs one copy from the device and one indexed sum.
    """
    starts, start = {}, 0
    for name, norm in _batchnorms(network):
        starts[name] = start
        start += norm.num_features
    sources, owners, offset = [], [], 0
    for group in groups:
        for part in group.batchnorms:
            sources += [starts[part.module] + channel for channel in part.channels]
            owners += [offset + owner for owner in part.owners]
        offset += group.width
    source, owner = torch.tensor(sources), torch.tensor(owners)
    counts = owner.bincount(minlength=offset)

    def score() -> Tensor:
        return torch.zeros(offset).index_add_(0, owner, gammas(network).cpu()[source]) / counts

    return score


def sensitivity(network: nn.Module, groups: Sequence[ChannelGroup]) -> Tensor:
    """Each mask channel's sum of abs(weight * gradient) over the weights that write it.

    Weights are those of Conv2d and Linear modules, as in SNIP (Lee et al. 2019, arXiv 1810.02340,
    equation 6, before its normalisation, which changes no order); their gradients have to be there.
    Returns float32 [sum of group widths] on the CPU, groups in the order given.
    """
    scores = []
    for group in groups:
        score = torch.zeros(group.width)
        for part in group.parts:
            if part.axis == "out":
                weight = network.get_submodule(part.module).weight
                assert isinstance(weight, nn.Parameter)
                assert weight.grad is not None
                written = (weight.detach() * weight.grad).abs().flatten(1).sum(1).float().cpu()
                score.index_add_(0, torch.tensor(part.owners), written[list(part.channels)])
        scores.append(score)
    return torch.cat(scores)


def mask_network(network: nn.Module, groups: Sequence[ChannelGroup], mask: Tensor):
    """Set gamma and beta of the dropped channels to 0, in place, so that they are exactly 0.

    mask is bool [sum of group widths], True for a kept channel. Raises `ValueError` on another
    shape or dtype.
    """
    norms = dict(_batchnorms(network))
    with torch.no_grad():
        for group, kept in zip(groups, _split(mask, groups), strict=True):
            for part in group.batchnorms:
                dropped = _dropped(part, kept)
                norms[part.module].weight[dropped] = 0
                norms[part.module].bias[dropped] = 0


def shrink(network: nn.Module, groups: Sequence[ChannelGroup], mask: Tensor) -> nn.Module:
    """A smaller copy of the network, with the weights of the channels that the mask keeps.

    mask is bool [sum of group widths], True for a kept channel. Mode, device, dtype and each
    parameter's requires_grad are those of the network, which is left as it was; gradients are not
    copied. Groups of another network of the same architecture do as well. Raises `ValueError` on
    a mask of another shape or dtype and on one that keeps nothing of a group in one of its modules.
    """
    small = copy.deepcopy(network)
    small.zero_grad()
    for (name, axis), channels in _removals(groups, mask).items():
        _remove(small.get_submodule(name), axis, channels)
    return small


def narrowed(groups: Sequence[ChannelGroup], mask: Tensor) -> tuple[ChannelGroup, ...]:
    """The channel groups of the network that `shrink` makes of this mask, which it numbers anew.

    What is one mask channel stays one. Tracing the small network may tell otherwise: a grouped
    convolution with one group left is an ordinary one. Raises ValueError as `shrink` does.
    """
    removals, small = _removals(groups, mask), []
    for group, kept in zip(groups, _split(mask, groups), strict=True):
        numbers, parts = (kept.cumsum(0) - 1).tolist(), []
        for part in group.parts:
            gone = sorted(removals[part.module, part.axis])
            places = zip(part.channels, part.owners, strict=True)
            left = [(c - bisect(gone, c), numbers[owner]) for c, owner in places if kept[owner]]
            parts.append(Part(part.module, part.axis, *zip(*left, strict=True)))
        small.append(ChannelGroup(group.name, int(kept.sum()), tuple(parts)))
    return tuple(small)


def spread(groups: Sequence[ChannelGroup], mask: Tensor, scores: Tensor) -> Tensor:
    """The mask with the best channel of every module added back that it would leave without any.

    A group's modules need not hold all of its channels: branches may be concatenated before an add.
    mask is bool and scores float, both [sum of group widths]; returns a new bool of that shape.
    """
    widths, spread = [group.width for group in groups], mask.clone()
    for group, kept, score in zip(groups, spread.split(widths), scores.split(widths), strict=True):
        for part in emptied(group, kept):
            owners = torch.tensor(part.owners)
            kept[owners[score[owners].argmax()]] = True
    return spread


def emptied(group: ChannelGroup, kept: Tensor) -> Iterator[Part]:
    """What of the group is left without a channel, as `kept`, bool [width], is when it is asked."""
    return (part for part in group.parts if not kept[list(part.owners)].any())


def _removals(groups: Sequence[ChannelGroup], mask: Tensor) -> dict[tuple[str, Axis], list[int]]:
    """The channels to remove, by module and axis."""
    removals: dict[tuple[str, Axis], list[int]] = defaultdict(list)
    for group, kept in zip(groups, _split(mask, groups), strict=True):
        for part in emptied(group, kept):
            raise ValueError(f"the mask keeps no channel of group {group.name} in {part.module}")
        for part in group.parts:
            removals[part.module, part.axis] += _dropped(part, kept)
    return removals


def check_prunable(network: nn.Module, groups: Sequence[ChannelGroup], example: Tensor):
    """Try once that masked and shrunk agree, in float64 with random BatchNorms and a random mask.

    example has the shape of images that the network takes, [N, C, H, W]; what is tried are random
    ones. The network and torch's random state are left as they were. Raises `UnsupportedNetwork`
    if the shrunk network fails, in training too, or its outputs differ by over 1e-9 of the largest.
    """
    masked = copy.deepcopy(network).cpu().double().eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        # A convolution without a bias gives nothing but zeros for a black image.
        images = torch.randn(example.shape, dtype=torch.float64)
        for weight in masked.parameters():
            if weight.dim() > 1 and not weight.any():
                weight.normal_()  # Behind zeros everything agrees.
        for _, norm in _batchnorms(masked):
            # Fresh BatchNorms are all alike, which would hide a channel in the wrong place.
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
            if norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.uniform_(-0.5, 0.5)
                norm.running_var.uniform_(0.5, 1.5)
        scores = torch.rand(sum(group.width for group in groups))
        mask = spread(groups, scores > 0.5, scores)
        try:
            small = shrink(masked, groups, mask)
            shrunk = small(images)
            trained = small.train()(images[:1].repeat(2, 1, 1, 1))
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UnsupportedNetwork(f"it fails in training or once shrunk: {reason}") from error
        mask_network(masked, groups, mask)
        expected = masked(images)
    if not isinstance(trained, Tensor) or trained.shape[1:] != shrunk.shape[1:]:
        raise UnsupportedNetwork("it gives something else in training than in evaluation")
    if shrunk.shape != expected.shape:
        raise UnsupportedNetwork("its output has another shape once shrunk")
    error = ((shrunk - expected).abs().max() / expected.abs().max()).item()
    if not error <= 1e-9:
        raise UnsupportedNetwork(f"its outputs differ by {error:.1g} of the largest once shrunk")


def _batchnorms(network: nn.Module) -> list[tuple[str, nn.BatchNorm2d]]:
    return [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d) and module.affine
    ]


def _split(mask: Tensor, groups: Sequence[ChannelGroup]) -> tuple[Tensor, ...]:
    widths = [group.width for group in groups]
    if mask.dtype != torch.bool or mask.shape != (sum(widths),):
        raise ValueError(
            f"the mask must be bool [{sum(widths)}], not {mask.dtype} {list(mask.shape)}"
        )
    return mask.cpu().split(widths)


def _dropped(part: Part, kept: Tensor) -> list[int]:
    keep = kept.tolist()
    return [c for c, owner in zip(part.channels, part.owners, strict=True) if not keep[owner]]


def _remove(module: nn.Module, axis: Axis, channels: Iterable[int]):
    assert isinstance(module, nn.BatchNorm2d | nn.Conv2d | nn.Linear)
    dim = 1 if axis == "in" else 0
    gone = set(channels)
    keep = [c for c in range(module.weight.shape[dim]) if c not in gone]
    index = torch.tensor(keep, device=module.weight.device)
    names = ["weight"] if axis == "in" else ["weight", "bias", "running_mean", "running_var"]
    for name in names:
        old = getattr(module, name, None)
        if old is None:
            continue
        new = old.detach().index_select(dim, index)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(module, name, new)
    if isinstance(module, nn.BatchNorm2d):
        module.num_features = len(keep)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        if axis == "out":
            module.groups = max(1, module.groups * len(keep) // module.out_channels)
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[1] * module.groups


_Place = tuple[str, Axis, int]


@dataclass
class _Flows:
    """Channels as torch-pruning follows them, each flow from one convolution on.

    The channels of all flows are numbered through: `flow_of` has the flow of each, `places` where
    each is found (module, axis and index there), `roots` each flow's first convolution.
    """

    roots: list[str] = field(default_factory=list)
    flow_of: list[int] = field(default_factory=list)
    places: list[tuple[_Place, int]] = field(default_factory=list)
    blocked: set[int] = field(default_factory=set)
    """Flows that must keep all their channels."""


def _trace_flows(network: nn.Module, graph: torch_pruning.DependencyGraph) -> _Flows:
    names = {module: name for name, module in network.named_modules()}
    flows, written = _Flows(), set()
    for module, name in names.items():
        # A Linear needs no flow of its own: only behind convolutions are there BatchNorm2d.
        if (
            not isinstance(module, nn.Conv2d)
            or module in written
            or module not in graph.module2node
        ):
            continue
        flow, start, width = len(flows.roots), len(flows.flow_of), module.weight.shape[0]
        flows.roots.append(name)
        flows.flow_of += [flow] * width
        remove = torch_pruning.prune_conv_out_channels
        for item in graph.get_pruning_group(module, remove, range(width)):
            node, target = item.dep.target, item.dep.target.module
            writes = graph.is_out_channel_pruning_fn(item.dep.handler)
            if writes:
                written.add(target)
            # What is no layer of the network is an operation, as an add or a concatenation.
            axis = _axis(target, writes) if target in names else None
            if axis:
                for index, root in zip(item.idxs, item.root_idxs, strict=True):
                    flows.places.append(((names[target], axis, index), start + root))
            is_output = writes and not node.outputs
            is_other_layer = axis is None and (target in names or isinstance(target, nn.Parameter))
            if is_output or is_other_layer:
                flows.blocked.add(flow)
    return flows


def _axis(module: nn.Module, writes: bool) -> Axis | None:
    """Which part of a module a flow holds; None where it cannot be removed exactly."""
    if isinstance(module, nn.BatchNorm2d) and module.affine:
        return "norm"
    if isinstance(module, nn.Conv2d | nn.Linear):
        return "out" if writes else "in"
    return None


class _DisjointSets:
    """Sets of the numbers below `count`; the smallest member stands for its set."""

    def __init__(self, count: int):
        self._parents = list(range(count))

    def find(self, member: int) -> int:
        while self._parents[member] != member:
            self._parents[member] = self._parents[self._parents[member]]
            member = self._parents[member]
        return member

    def join(self, members: Iterable[int]):
        tops = sorted({self.find(member) for member in members})
        for top in tops[1:]:
            self._parents[top] = tops[0]


def _join_flows(network: nn.Module, flows: _Flows) -> tuple[ChannelGroup, ...]:
    """Channel groups: a set of channels that only go together is a mask channel, and flows that
    share a mask channel are one group."""
    channels, blocked = _DisjointSets(len(flows.flow_of)), set(flows.blocked)
    holders: dict[_Place, int] = {}
    for place, channel in flows.places:
        channels.join((channel, holders.setdefault(place, channel)))
    for name, conv in network.named_modules():
        # torch-pruning already takes input and output as one where each channel is a group.
        if not isinstance(conv, nn.Conv2d) or conv.groups in (1, conv.out_channels):
            continue
        reads, writes = conv.in_channels // conv.groups, conv.out_channels // conv.groups
        for group in range(conv.groups):
            found = [holders.get((name, "in", group * reads + i)) for i in range(reads)]
            found += [holders.get((name, "out", group * writes + i)) for i in range(writes)]
            held = [channel for channel in found if channel is not None]
            channels.join(held)
            if len(held) < len(found):
                blocked.update(flows.flow_of[channel] for channel in held)
    joined = _DisjointSets(len(flows.roots))
    for channel, flow in enumerate(flows.flow_of):
        joined.join((flow, flows.flow_of[channels.find(channel)]))
    blocked = {joined.find(flow) for flow in blocked}

    numbers: dict[int, dict[int, int]] = defaultdict(dict)
    for channel, flow in enumerate(flows.flow_of):
        of_group = numbers[joined.find(flow)]
        of_group.setdefault(channels.find(channel), len(of_group))
    parts: dict[int, dict[tuple[str, Axis], dict[int, int]]]
    parts = defaultdict(lambda: defaultdict(dict))
    for (name, axis, index), channel in holders.items():
        flow = joined.find(flows.flow_of[channel])
        parts[flow][name, axis][index] = numbers[flow][channels.find(channel)]

    groups = []
    for flow, of_group in numbers.items():
        held = parts[flow]
        covered = {owner for key in held if key[1] == "norm" for owner in held[key].values()}
        if flow in blocked or len(covered) < len(of_group):
            continue
        members = tuple(
            Part(name, axis, tuple(owners), tuple(owners.values()))
            for (name, axis), owners in held.items()
            if axis != "in" or getattr(network.get_submodule(name), "groups", 1) == 1
        )
        groups.append(ChannelGroup(flows.roots[flow], len(of_group), members))
    return tuple(groups)
