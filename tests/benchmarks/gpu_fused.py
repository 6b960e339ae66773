"""Several trajectories on one GPU: fused into one network, or side by side in processes.

The CUDA parts have not been run yet. Fusion is an experiment, kept only if it wins.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from statistics import median

import torch
import torch.multiprocessing as processes
import torch.nn.functional as F
from gpu_lab import DECAY, MOMENTUM, RATE, GraphedStep, Lab, part
from timing import interleave, ratio, row
from torch import Tensor, nn

from raytickets.config import Network
from raytickets.data import DataSet
from raytickets.models import build_network
from raytickets.train import SGD, Numerics, scale_parameters, train

PENALTIES = (1e-5, 1e-4, 3e-4, 1e-3)
STEPS = 50
"""Of each run; the processes get no more images than these take."""


def fuse(networks: Sequence[nn.Sequential]) -> nn.Sequential:
    """One network that computes what these do, each on the same images: [N, 10 for each of them].

    They are `cifar_vgg`s of one shape. The first convolution has all their filters on the shared
    images, the others have a group for each network, and the head is a grouped 1x1 convolution.
    """
    fused: OrderedDict[str, nn.Module] = OrderedDict()
    for name, first in networks[0].named_children():
        alike = [network.get_submodule(name) for network in networks]
        if isinstance(first, nn.Conv2d):
            groups = len(networks) if fused else 1
            fused[name] = _convolution([conv.weight.detach() for conv in alike], groups, 1)
        elif isinstance(first, nn.Linear):
            fused[name] = _head(alike)
        elif isinstance(first, nn.BatchNorm2d):
            fused[name] = _batchnorm(alike)
        elif not isinstance(first, nn.Flatten):
            fused[name] = copy.deepcopy(first)
    return nn.Sequential(fused | {"flatten": nn.Flatten()})


def _convolution(weights: Sequence[Tensor], groups: int, padding: int) -> nn.Conv2d:
    weight = torch.cat(list(weights))
    out, reads, *kernel = weight.shape
    conv = nn.Conv2d(reads * groups, out, kernel, padding=padding, groups=groups, bias=False)
    conv.weight = nn.Parameter(weight)
    return conv


def _batchnorm(norms: Sequence[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    fused = nn.BatchNorm2d(sum(norm.num_features for norm in norms)).to(norms[0].weight.dtype)
    states = [norm.state_dict() for norm in norms]
    names = ("weight", "bias", "running_mean", "running_var")
    wide = {name: torch.cat([state[name] for state in states]) for name in names}
    fused.load_state_dict(wide | {"num_batches_tracked": states[0]["num_batches_tracked"]})
    return fused


def _head(heads: Sequence[nn.Linear]) -> nn.Conv2d:
    conv = _convolution([head.weight.detach()[..., None, None] for head in heads], len(heads), 0)
    conv.bias = nn.Parameter(torch.cat([head.bias.detach() for head in heads]))
    return conv


def train_fused(
    network: nn.Module,
    optimizer: SGD,
    batches: Iterable[tuple[Tensor, Tensor]],
    rates: Sequence[float],
    numerics: Numerics,
    penalties: Sequence[float],
) -> float:
    """As `train`, with a penalty for each of the fused networks; the mean of all their losses."""
    network.train()
    scales = scale_parameters(network)
    weights = torch.tensor(penalties, dtype=scales[0].dtype, device=scales[0].device)
    weights = [weights.repeat_interleave(len(scale) // len(penalties)) for scale in scales]
    losses = []
    for (images, labels), rate in zip(batches, rates, strict=True):
        logits = numerics.logits(network, images).view(len(labels) * len(penalties), -1)
        loss = F.cross_entropy(logits, labels.repeat_interleave(len(penalties)))
        # The mean is over all networks, and their losses are to be summed.
        (loss * len(penalties)).backward()
        with torch.no_grad():
            signs = torch._foreach_sign(scales)
            torch._foreach_add_([s.grad for s in scales], torch._foreach_mul(signs, weights))
        optimizer.step(rate)
        losses.append(loss.detach())
    return torch.stack(losses).double().mean().item()


def exactness() -> Iterator[str]:
    """On the CPU: fused against separate training, the graphs' step against ours."""
    vgg16 = Network("cifar_vgg", {"depth": 16, "width": 1 / 16})
    build = {"in_channels": 3, "num_classes": 10}
    networks = [build_network(vgg16, **build, seed=seed).double() for seed in range(4)]
    fused, graphed = fuse(networks), copy.deepcopy(networks[1])
    how = Numerics(torch.device("cpu"), torch.float64, True, torch.float64)
    generator = torch.Generator()
    images = torch.randn(8, 16, 3, 32, 32, dtype=torch.float64, generator=generator)
    batches = list(zip(images, torch.randint(10, (8, 16), generator=generator), strict=True))
    rates = [RATE / (step + 1) for step in range(len(batches))]
    for network, penalty in zip(networks, PENALTIES, strict=True):
        train(network, SGD(network, MOMENTUM, DECAY), batches, rates, how, penalty)
    train_fused(fused, SGD(fused, MOMENTUM, DECAY), batches, rates, how, PENALTIES)
    step = GraphedStep(graphed, PENALTIES[1], how)
    step.rate = step.rate.double()
    step.hold(*batches[0])
    step.train(batches, rates)
    note = f"float64 but for the loss, CPU, {len(batches)} steps: largest difference of any weight"
    error = difference(fused, fuse(networks))
    yield row("4 penalties fused against 4 separate networks", "<= 1e-6", f"{error:.1e}", 1, note)
    error = difference(graphed, networks[1])
    title = "the step that is recorded, not as a graph, against ours"
    yield row(title, "<= 1e-6", f"{error:.1e}", 1, note)


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest of any element of the states, over the largest element of the same tensor."""
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    pairs = [(states[0][name].double(), states[1][name].double()) for name in states[0]]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in pairs)


def _fused_epoch(lab: Lab) -> Callable[[], float]:
    network = lab.place(fuse([lab.network() for _ in PENALTIES]))
    how, optimizer, numbers = lab.numerics(network), SGD(network, MOMENTUM, DECAY), count()
    return lambda: train_fused(network, optimizer, *lab.epoch(next(numbers)), how, PENALTIES)


def _share(run: Callable[[], float], networks: int) -> Callable[[], float]:
    return lambda: run() / networks


def fusion(lab: Lab) -> Iterator[str]:
    """4 penalties in one step against 4 networks one after the other."""
    lab, width = lab.on(part(lab.dataset, STEPS * lab.batch)), len(PENALTIES)
    epochs = [lab.trajectory(lab.network(), penalty) for penalty in PENALTIES]
    functions = {
        "sequential": _share(lab.clocked(lambda: [epoch() for epoch in epochs]), width),
        "fused": _share(lab.clocked(_fused_epoch(lab)), width),
    }
    seconds = interleave(functions, lab.runs)
    gain = ratio(seconds["sequential"], seconds["fused"])
    both = [f"{median(seconds[name]) / lab.steps * 1e3:.2f}" for name in ("fused", "sequential")]
    note = "milliseconds for a step of one network: {} fused, {} sequential".format(*both)
    yield row("4 penalties fused against 4 sequential", ">= 2", gain, gain.n, note)


def co_residents(lab: Lab) -> Iterator[str]:
    """2 and 4 processes with a trajectory each against one, and fusion against the best of them."""
    lab = lab.on(part(lab.dataset, STEPS * lab.batch))
    fused = lab.clocked(_fused_epoch(lab))
    with _residents(lab, 4) as pipes:
        functions = {"fused": _share(fused, len(PENALTIES))}
        for number in (1, 2, 4):
            wall = lab.clocked(lambda number=number: _train_all(pipes[:number]))
            functions[str(number)] = _share(wall, number)
        seconds = interleave(functions, lab.runs)
    for number in ("2", "4"):
        gain = ratio(seconds["1"], seconds[number])
        note = f"{median(seconds[number]) / lab.steps * 1e3:.2f} ms for a step of one network"
        yield row(f"{number} co-resident trials against 1, throughput", "", gain, gain.n, note)
    best = min(("2", "4"), key=lambda number: median(seconds[number]))
    gain = ratio(seconds[best], seconds["fused"])
    note = f"the best is {best} processes (without MPS)"
    goal = ">= 1.3, or it is dropped"
    yield row("4 penalties fused against the best of these", goal, gain, gain.n, note)


@contextmanager
def _residents(lab: Lab, number: int) -> Iterator[list]:
    """Pipes to processes that each train an epoch of their own trajectory at every message."""
    context = processes.get_context("spawn")
    settings = (str(lab.device), lab.dataset, lab.width, lab.batch, lab.runs)
    pipes, workers = [], []
    for place in range(number):
        here, there = context.Pipe()
        autotune = torch.backends.cudnn.benchmark
        args = (there, settings, PENALTIES[place], 0.8 / number, autotune)
        pipes.append(here)
        workers.append(context.Process(target=_resident, args=args, daemon=True))
        workers[-1].start()
        there.close()
    try:
        for pipe in pipes:
            _hear(pipe)
        yield pipes
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _train_all(pipes: list) -> None:
    for pipe in pipes:
        pipe.send("train")
    for pipe in pipes:
        _hear(pipe)


def _hear(pipe) -> None:
    if not pipe.poll(120):
        raise TimeoutError("a process did not answer in 120 s")
    pipe.recv()


def _resident(
    pipe,
    settings: tuple[str, DataSet, float, int, int],
    penalty: float,
    memory: float,
    autotune: bool,
) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = autotune
    lab = Lab.make(*settings)
    if lab.cuda:
        torch.cuda.set_per_process_memory_fraction(memory, 0)
    epoch = lab.trajectory(lab.network(), penalty)
    lab.clocked(epoch)()
    while True:
        pipe.send("done")
        pipe.recv()
        lab.clocked(epoch)()
