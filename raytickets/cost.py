"""What networks and training cost."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

# PyTorch wraps its counter so that the first use imports torch._dynamo, 4 s in every worker, only
# to keep the counter out of compiled code, of which there is none here.
with mock.patch.object(torch, "_disable_dynamo", lambda function, **_: function):
    from torch.utils.flop_counter import FlopCounterMode


def macs(network: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one image's forward pass.

    example is float [1, channels, height, width]. PyTorch's counter counts two FLOPs for each MAC
    of convolutions and matrix products, and nothing for the rest.
    """
    training = network.training
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(example)
    network.train(training)
    return counter.get_total_flops() // 2


def params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def training_macs(forward_macs: int, samples: int) -> int:
    """MACs of training on `samples` images: the backward pass counts as two forward passes."""
    return 3 * forward_macs * samples


@torch.no_grad()
def latencies(networks: Sequence[nn.Module], example: Tensor, repeats: int = 50) -> list[float]:
    """Median milliseconds of each network's forward pass, in eval mode, which they are left in.

    The networks take turns, forwards and backwards, so that whatever else the machine does slows
    all of them alike.
    example is float [N, channels, height, width] on the networks' device.
    """
    times: list[list[float]] = [[] for _ in networks]
    turns = list(zip(networks, times, strict=True))
    for repeat in range(-5, repeats):
        for network, taken in turns[:: 1 if repeat % 2 else -1]:
            network.eval()
            _wait(example)
            started = time.perf_counter()
            network(example)
            _wait(example)
            if repeat >= 0:  # The first passes choose kernels and allocate.
                taken.append(1000 * (time.perf_counter() - started))
    return [statistics.median(taken) for taken in times]


def _wait(example: Tensor) -> None:
    if example.is_cuda:
        torch.cuda.synchronize(example.device)


@dataclass(frozen=True)
class Ledger:
    """What a stage of work cost; ledgers of stages that follow each other add up."""

    forward_macs: int
    backward_macs: int
    samples: int
    """Images trained on, each as often as it was."""
    seconds: float
    joules: float | None
    energy: str
    """Where `joules` is from: `measured ...`, `estimated ...` with the coefficient and its source,
    or `unavailable`, and then `joules` is None."""

    def __add__(self, other: "Ledger") -> "Ledger":
        joules = None
        if self.joules is not None and other.joules is not None:
            joules = self.joules + other.joules
        sources = " + ".join(dict.fromkeys([self.energy, other.energy]))
        return Ledger(
            self.forward_macs + other.forward_macs,
            self.backward_macs + other.backward_macs,
            self.samples + other.samples,
            self.seconds + other.seconds,
            joules,
            "unavailable" if joules is None else sources,
        )
