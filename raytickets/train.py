"""The training loop: numerics, momentum SGD, the L1 penalty on BatchNorm scales, evaluation."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytickets.batches import Batches
from raytickets.config import Precision, Training


def seeded(*purpose: object) -> torch.Generator:
    """A CPU generator whose stream is a function of the purpose alone."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


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
    """

    def __init__(self, network: nn.Module, momentum: float, weight_decay: float):
        self.params: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
        self.momentum, self.weight_decay = momentum, weight_decay
        self.velocity = [torch.zeros_like(parameter) for parameter in self.params]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every parameter from its gradient, then drop the gradients."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params]
        torch._fused_sgd_(
            self.params,
            gradients,
            self.velocity,
            lr=rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
        for parameter in self.params:
            parameter.grad = None


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
    """Of convolutions and matrix products; weights, BatchNorm and the loss are float32 always."""
    channels_last: bool

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network to the device and into the memory layout, in place."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return network.to(self.device, memory_format=layout)  # pyright: ignore[reportCallIssue]

    def logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """The network's outputs, float32, for float32 images [N, C, H, W] on the device."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        images = images.contiguous(memory_format=layout)
        if self.dtype == torch.float32:
            return network(images)
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
) -> float:
    """Train one step on each batch, at the learning rate of its place; the mean loss."""
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
    return torch.stack(losses).double().mean().item()


@torch.no_grad()
def accuracy(network: nn.Module, batches: Batches, split: str, numerics: Numerics) -> float:
    """The share of a split's images that the network labels right."""
    network.eval()
    right = [
        (numerics.logits(network, images).argmax(1) == labels)
        for images, labels in batches.evaluation(split)
    ]
    return torch.cat(right).double().mean().item()
