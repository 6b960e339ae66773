"""What the GPU measurements share: the data, the network, an epoch of our step, and of its graph.

The CUDA parts have not been run yet. Only modules of raytickets without Ray are imported.
"""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytickets.batches import Batches
from raytickets.config import Data, Network
from raytickets.data import DataSet, Images, load_data
from raytickets.models import build_network
from raytickets.train import (
    SGD,
    Numerics,
    add_penalty,
    cosine,
    numerics,
    scale_parameters,
    seeded,
    train,
)

AUGMENTED = {"crop_padding": 4, "flip": True}
PENALTY = 1e-4
RATE, MOMENTUM, DECAY = 0.05, 0.9, 1e-4


def load(folder: str) -> DataSet:
    """CIFAR-10 with all 50,000 images for training, as the published figures have it."""
    dataset = load_data(Data(source="folder", path=folder, loading="memory"))
    both = (dataset.train, dataset.validation)
    images = np.concatenate([part.images for part in both])
    return replace(dataset, train=Images(images, np.concatenate([part.labels for part in both])))


def part(dataset: DataSet, size: int) -> DataSet:
    """The same with `size` images of all classes in each split, or fewer if it has fewer."""
    splits = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    taken = {}
    for name, split in splits.items():
        places = slice(0, None, max(1, len(split) // size))
        taken[name] = Images(split.images[places][:size], split.labels[places][:size])
    return replace(dataset, **taken)


@dataclass(frozen=True)
class Lab:
    """Where all parts measure: CIFAR-10 on the device, and VGG16 at a width."""

    device: torch.device
    dataset: DataSet
    width: float
    batch: int
    runs: int
    batches: Batches

    @classmethod
    def make(cls, device: str, dataset: DataSet, width: float, batch: int, runs: int) -> "Lab":
        batches = Batches(dataset, Data(**AUGMENTED), device)
        return cls(torch.device(device), dataset, width, batch, runs, batches)

    def on(self, dataset: DataSet) -> "Lab":
        return Lab.make(str(self.device), dataset, self.width, self.batch, self.runs)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def options(self) -> dict[str, float]:
        return {"depth": 16, "width": self.width}

    @property
    def title(self) -> str:
        return f"VGG16{'' if self.width == 1 else f' at {self.width:g} width'}, batch {self.batch}"

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.batches.count(self.batch)

    def network(self, seed: int = 0) -> nn.Module:
        vgg16 = Network("cifar_vgg", self.options)
        return build_network(vgg16, in_channels=3, num_classes=10, seed=seed)

    def numerics(self, network: nn.Module) -> Numerics:
        return numerics("auto", True, network, self.device)

    def place(self, network: nn.Module) -> nn.Module:
        return self.numerics(network).place(network)

    def epoch(self, number: int) -> tuple[Iterable[tuple[Tensor, Tensor]], list[float]]:
        """The batches of an epoch, and a learning rate for each, which falls in every step."""
        rates = [RATE * cosine(step / self.steps) for step in range(self.steps)]
        return self.batches.training(self.batch, seeded("gpu", number)), rates

    def clocked(self, function: Callable[[], object]) -> Callable[[], float]:
        """The function as one that returns its wall seconds, the device's work included."""

        def run() -> float:
            self.wait()
            started = time.perf_counter()
            function()
            self.wait()
            return time.perf_counter() - started

        return run

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def trajectory(self, network: nn.Module, penalty: float = PENALTY) -> Callable[[], float]:
        """A function that trains the next epoch as a trajectory does; it returns the mean loss."""
        network = self.place(network)
        optimizer, how, numbers = SGD(network, MOMENTUM, DECAY), self.numerics(network), count()

        def epoch() -> float:
            losses = train(network, optimizer, *self.epoch(next(numbers)), how, penalty)
            return losses.item() / self.steps

        return epoch

    def graphed(self, network: nn.Module, penalty: float = PENALTY) -> Callable[[], float]:
        """As `trajectory`, by replays of a CUDA graph of the step."""
        network = self.place(network)
        step = GraphedStep(network, penalty, self.numerics(network))
        images, labels = next(iter(self.epoch(0)[0]))
        step.capture(images, labels)
        numbers = count()
        return lambda: step.train(*self.epoch(next(numbers)))


class GraphedStep:
    """One training step, whose inputs, learning rate and loss lie at fixed places on the device.

    `train` copies each batch to the inputs, fills in its learning rate and replays what `capture`
    recorded: forward, backward, penalty and update. The update is the fused kernel that `SGD` runs,
    in its overload that reads the learning rate from the device, so that each replay has its own.
    """

    def __init__(self, network: nn.Module, penalty: float, numerics: Numerics):
        self.network, self.penalty, self.how = network.train(), penalty, numerics
        self.optimizer = SGD(network, MOMENTUM, DECAY)
        self.scales = scale_parameters(network)
        self.rate = torch.zeros((), device=numerics.device)
        self.loss_sum = torch.zeros((), device=numerics.device)
        self.replay: Callable[[], None] = self.step

    def hold(self, images: Tensor, labels: Tensor) -> None:
        """Take the shapes and layouts of these for the inputs."""
        self.images, self.labels = images.clone(), labels.clone()

    def capture(self, images: Tensor, labels: Tensor) -> None:
        """Record the step, and leave the network and the momentum as they were.

        The warm-up and the capture share a side stream: libraries set themselves up for each
        stream when first used there, which may not happen within a capture.
        """
        self.hold(images, labels)
        before = copy.deepcopy(self.network.state_dict())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The step has dropped the gradients, so that those of the capture lie in the graph's pool.
        with torch.cuda.graph(graph, stream=side):
            self.step()
        self.network.load_state_dict(before)
        for velocity in self.optimizer.velocity:
            velocity.zero_()
        self.replay = graph.replay

    def step(self) -> None:
        loss = F.cross_entropy(self.how.logits(self.network, self.images), self.labels)
        loss.backward()
        if self.penalty:
            add_penalty(self.scales, self.penalty)
        self.update()
        self.loss_sum.add_(loss.detach())

    @torch.no_grad()
    def update(self) -> None:
        params = self.optimizer.params
        # By its full name: with `torch._fused_sgd_` Python could choose the overload that takes a
        # float, which would read the tensor back from the device.
        torch.ops.aten._fused_sgd_.tensor_lr(
            params,
            [parameter.grad for parameter in params],
            self.optimizer.velocity,
            lr=self.rate,
            momentum=MOMENTUM,
            weight_decay=DECAY,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
        for parameter in params:
            parameter.grad = None

    def train(self, batches: Iterable[tuple[Tensor, Tensor]], rates: Sequence[float]) -> float:
        """Train one step on each batch, at the learning rate of its place; the mean loss."""
        self.loss_sum.zero_()
        for (images, labels), rate in zip(batches, rates, strict=True):
            self.images.copy_(images)
            self.labels.copy_(labels)
            self.rate.fill_(rate)
            self.replay()
        return self.loss_sum.item() / len(rates)
