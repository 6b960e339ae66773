"""The training loop: numerics, momentum SGD, the L1 penalty on BatchNorm scales, evaluation."""

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytickets import cost
from raytickets.batches import Batches
from raytickets.config import Precision, Training
from raytickets.journal import Event

# Every ticket has shapes of its own, whose kernels would push those of the network in training out.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")

PART = 25
"""Steps of training between two looks at whether a checkpoint is due."""


def seeded(*purpose: object) -> torch.Generator:
    """A CPU generator whose stream is a function of the purpose alone."""
    return torch.Generator().manual_seed(seed_of(*purpose))


def seed_of(*purpose: object) -> int:
    """A seed that is a function of the purpose alone: a whole number below 2**63."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def learning_rate(recipe: Training, progress: float) -> float:
    """The learning rate after `progress` epochs, which may be a fraction."""
    if recipe.schedule == "cosine":
        return recipe.learning_rate * cosine(progress / recipe.epochs)
    drops = sum(progress >= milestone for milestone in recipe.milestones)
    return recipe.learning_rate * 0.1**drops


def cosine(progress: float) -> float:
    """What is left of the learning rate after a share of the training (Loshchilov and Hutter 2017,
    arXiv 1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def scale_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The scales (gamma) of every BatchNorm2d, in module order."""
    return [m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]


class SGD:
    """Stochastic gradient descent with momentum and weight decay, as torch.optim.SGD computes it.

    The kernel is that of torch.optim.SGD(fused=True). torch.optim itself imports torch._dynamo when
    its first optimizer is made: 5 s in every new worker.

    Parameters and velocity in bfloat16 are updated in float32 and rounded back at random, so that
    they are right on average (Gupta et al. 2015, arXiv 1502.02551): a step is often smaller than
    the distance between two bfloat16 numbers, and rounding to the nearest would lose it. About half
    of the BatchNorm scales would stay at 1.
    """

    def __init__(self, network: nn.Module, momentum: float, weight_decay: float):
        self.params: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
        self.momentum, self.weight_decay = momentum, weight_decay
        self.velocity = [torch.zeros_like(parameter) for parameter in self.params]
        self._generator = torch.Generator(self.params[0].device).manual_seed(0)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every parameter from its gradient, then drop the gradients."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params]
        low = [*self.params, *self.velocity]
        params, gradients, velocity = map(_widened, (self.params, gradients, self.velocity))
        torch._fused_sgd_(
            params,
            gradients,
            velocity if self.momentum else [],
            lr=rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
        for kept, exact in zip(low, [*params, *velocity], strict=True):
            if kept is not exact:
                kept.copy_(round_at_random(exact, self._generator))
        for parameter in self.params:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that `step` changes but the parameters, for `load`; not copied."""
        velocity = {f"velocity.{place}": tensor for place, tensor in enumerate(self.velocity)}
        return {**velocity, "rounding": self._generator.get_state()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the `state` of an optimizer of a network of the same shape."""
        for place, velocity in enumerate(self.velocity):
            velocity.copy_(state[f"velocity.{place}"])
        # That of another kind of device has another size. Float32 weights draw nothing from it.
        if state["rounding"].shape == self._generator.get_state().shape:
            self._generator.set_state(state["rounding"])


def _widened(tensors: list[Tensor]) -> list[Tensor]:
    """Those in bfloat16 as float32, the others as they are."""
    return [tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in tensors]


def round_at_random(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 numbers rounded to bfloat16 ones, up or down by chance, right on average.

    The result is float32, and the generator of the same device.
    """
    # bfloat16 is float32 without the last 16 bits.
    noise = torch.empty_like(exact, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
    return (exact.view(torch.int32) + noise).bitwise_and_(-1 << 16).view(torch.float32)


@torch.no_grad()
def add_penalty(scales: list[nn.Parameter], penalty: float) -> None:
    """Add the subgradient of penalty * sum(|gamma|) to the scales' gradients (Liu et al. 2017)."""
    reached: list[Tensor] = [scale for scale in scales if scale.grad is not None]
    gradients = [scale.grad for scale in reached if scale.grad is not None]
    torch._foreach_add_(gradients, torch._foreach_sign(reached), alpha=penalty)


@dataclass(frozen=True)
class Numerics:
    """What networks compute in, and how they lie in memory."""

    device: torch.device
    dtype: torch.dtype
    """Of convolutions and matrix products; the loss is float32 always."""
    channels_last: bool
    weights: torch.dtype = torch.float32
    """Of parameters and BatchNorm statistics, and so of gradients and the optimizer's velocity."""

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network to the device, the memory layout and the weights' dtype, in place."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return network.to(self.device, self.weights, memory_format=layout)  # pyright: ignore[reportCallIssue]

    @property
    def exact(self) -> "Numerics":
        """The same in float32, which is what a user's loaded ticket computes in."""
        return dataclasses.replace(self, dtype=torch.float32, weights=torch.float32)

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """The network's outputs, float32, for float32 images [N, C, H, W] on the device."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        images = images.to(self.weights).contiguous(memory_format=layout)
        if self.dtype == self.weights:
            return network(images).float()
        with torch.autocast(self.device.type, self.dtype):
            return network(images).float()


def numerics(
    precision: Precision,
    channels_last: bool,
    network: nn.Module,
    device: torch.device | str = "cpu",
) -> Numerics:
    """What `precision` means for a network on this machine.

    `auto` is bfloat16 on GPUs that compute it and on CPUs with AVX512_BF16 or AMX instructions,
    where VGG16 and ResNet-20 train about twice as fast (tests/benchmarks). On a CPU it is float32
    for networks with grouped convolutions, which are slower there in bfloat16.
    """
    device = torch.device(device)
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            fast = fast and all(
                module.groups == 1 for module in network.modules() if isinstance(module, nn.Conv2d)
            )
        precision = "bfloat16" if fast else "float32"
    return Numerics(device, getattr(torch, precision), channels_last)


def train(
    network: nn.Module,
    optimizer: SGD,
    batches: Iterable[tuple[Tensor, Tensor]],
    rates: Sequence[float],
    numerics: Numerics,
    penalty: float = 0.0,
) -> Tensor:
    """Train one step on each batch, at the learning rate of its place.

    Returns the sum of the losses, a float64 scalar on the device.
    """
    network.train()
    scales = scale_parameters(network)
    losses = []
    for (images, labels), rate in zip(batches, rates, strict=True):
        loss = F.cross_entropy(numerics.logits(network, images), labels)
        loss.backward()
        if penalty:
            add_penalty(scales, penalty)
        optimizer.step(rate)
        losses.append(loss.detach())
    return torch.stack(losses).double().sum()


def fit(
    network: nn.Module,
    optimizer: SGD,
    batches: Batches,
    recipe: Training,
    purpose: tuple[object, ...],
    numerics: Numerics,
    *,
    penalty: float = 0.0,
    checks_per_epoch: int = 1,
    first: int = 0,
    worker: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, Tensor]]:
    """Train a recipe, from where `first` steps were done.

    Yields the steps done since epoch 0 and the sum of the losses since it yielded last: at every
    check, the last of which is at an epoch's end, and every `PART` steps in between. To go on from
    there takes no more than the network, the optimizer and the number of steps: `purpose` names the
    random streams, `seeded(*purpose, epoch)` that of an epoch's batches, and what a network draws
    by itself, as dropout does, is a function of the step too. `worker` is which of how many workers
    this one is.
    """
    count = batches.count(recipe.batch_size)
    bounds = sorted({*range(0, count, PART), *check_steps(count, checks_per_epoch)})
    for epoch in range(first // count, recipe.epochs):
        done = max(first - epoch * count, 0)
        generator = seeded(*purpose, epoch)
        shuffled = batches.training(recipe.batch_size, generator, *worker, first=done)
        for start, end in pairwise(bounds[bounds.index(done) :]):
            steps = range(epoch * count + start, epoch * count + end)
            seeds = (seed_of("dropout", *purpose, *worker, step) for step in steps)
            some = _reseeded(shuffled, seeds, numerics.device)
            rates = [learning_rate(recipe, step / count) for step in steps]
            loss = train(network, optimizer, some, rates, numerics, penalty)
            if end == count:
                next(shuffled, None)  # Processes that decode are only kept after an epoch's end.
            yield epoch * count + end, loss


def check_steps(count: int, checks_per_epoch: int) -> list[int]:
    """The steps of an epoch of `count` after which there is a check."""
    return [count * check // checks_per_epoch for check in range(1, checks_per_epoch + 1)]


def _reseeded(
    batches: Iterator[tuple[Tensor, Tensor]], seeds: Iterable[int], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch for each seed, which the generators that networks draw from begin with."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    for seed in seeds:
        # torch.manual_seed keeps a stack trace of every call for GPUs that may yet be used.
        for generator in generators:
            generator.manual_seed(seed)
        yield next(batches)


@torch.no_grad()
def accuracy(
    network: nn.Module,
    batches: Batches,
    split: str,
    numerics: Numerics,
    worker: tuple[int, int] = (0, 1),
) -> float:
    """The share of a split's images that the network labels right.

    `worker` is which of how many this one is: each takes a part of the images, and all must call.
    """
    network.eval()
    right = torch.zeros((), dtype=torch.int64, device=numerics.device)
    for images, labels in batches.evaluation(split, rank=worker[0], world=worker[1]):
        right += (numerics.logits(network, images).argmax(1) == labels).sum()
    if worker[1] > 1:
        torch.distributed.all_reduce(right)
    return right.item() / len(getattr(batches.dataset, split).labels)


def epoch_event(
    run: str,
    epoch: int,
    loss: float,
    network: nn.Module,
    batches: Batches,
    recipe: Training,
    numerics: Numerics,
    worker: tuple[int, int] = (0, 1),
) -> Event:
    """What is told of a retraining after `epoch` epochs; `worker` is as for `accuracy`."""
    return {
        "event": "epoch",
        "run": run,
        "epoch": epoch,
        "loss": loss,
        "validation_accuracy": accuracy(network, batches, "validation", numerics, worker),
        "learning_rate": learning_rate(recipe, epoch - 1),
    }


def retrained_event(
    run: str,
    seconds: float,
    network: nn.Module,
    macs: int,
    batches: Batches,
    recipe: Training,
    numerics: Numerics,
    worker: tuple[int, int] = (0, 1),
) -> Event:
    """What is told of a whole retraining, which took so long; the one look at test images.

    `worker` is as for `accuracy`.
    """
    samples = recipe.epochs * batches.count(recipe.batch_size) * recipe.batch_size
    return {
        "event": "retrained",
        "run": run,
        "path": None,
        "macs": macs,
        "params": cost.params(network),
        "epochs": recipe.epochs,
        "validation_accuracy": accuracy(network, batches, "validation", numerics.exact, worker),
        "test_accuracy": accuracy(network, batches, "test", numerics.exact, worker),
        "train_macs": cost.training_macs(macs, samples),
        "seconds": seconds,
        "num_workers": worker[1],
    }
