"""The training loop: momentum SGD, the L1 penalty on BatchNorm scales, and evaluation."""

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytickets.config import Training
from raytickets.data import Batches


def seeded(*purpose: object) -> torch.Generator:
    """A CPU generator whose stream is a function of the purpose alone."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def learning_rate(recipe: Training, progress: float) -> float:
    """The learning rate after `progress` epochs, which may be a fraction."""
    if recipe.schedule == "cosine":
        return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress / recipe.epochs))
    drops = sum(progress >= milestone for milestone in recipe.milestones)
    return recipe.learning_rate * 0.1**drops


def scale_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The scales (gamma) of every BatchNorm2d, in module order."""
    return [m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]


class SGD:
    """Stochastic gradient descent with momentum and weight decay, as torch.optim.SGD computes it.

    torch.optim imports torch._dynamo when its first optimizer is made: 5 s in every new worker.
    """

    def __init__(self, network: nn.Module, momentum: float, weight_decay: float):
        self.params: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
        self.momentum, self.weight_decay = momentum, weight_decay
        self.velocity = [torch.zeros_like(parameter) for parameter in self.params]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every parameter from its gradient, then drop the gradients."""
        gradients: Sequence[Tensor] = [
            p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params
        ]
        if self.weight_decay:
            gradients = torch._foreach_add(gradients, self.params, alpha=self.weight_decay)
        torch._foreach_mul_(self.velocity, self.momentum)
        torch._foreach_add_(self.velocity, gradients)
        torch._foreach_add_(self.params, self.velocity, alpha=-rate)
        for parameter in self.params:
            parameter.grad = None


@torch.no_grad()
def add_penalty(scales: list[nn.Parameter], penalty: float) -> None:
    """Add the subgradient of penalty * sum(|gamma|) to the scales' gradients (Liu et al. 2017)."""
    reached: list[Tensor] = [scale for scale in scales if scale.grad is not None]
    gradients = [scale.grad for scale in reached if scale.grad is not None]
    torch._foreach_add_(gradients, torch._foreach_sign(reached), alpha=penalty)


def train_epoch(
    network: nn.Module,
    optimizer: SGD,
    recipe: Training,
    epoch: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    batch_count: int,
    penalty: float = 0.0,
) -> float:
    """Train one epoch (numbered from 0); the mean loss over its batches."""
    network.train()
    scales = scale_parameters(network)
    total = None
    for place, (images, labels) in enumerate(batches):
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        if penalty:
            add_penalty(scales, penalty)
        optimizer.step(learning_rate(recipe, epoch + place / batch_count))
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total.item() / batch_count


@torch.no_grad()
def accuracy(network: nn.Module, batches: Batches, split: str) -> float:
    """The share of a split's images that the network labels right."""
    network.eval()
    right = count = 0
    for images, labels in batches.evaluation(split):
        right += (network(images).argmax(1) == labels).sum().item()
        count += len(labels)
    return right / count
