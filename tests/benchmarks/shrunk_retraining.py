"""How much of the saved MACs a shrunk VGG16 gives back as time, by ratio and rounding of widths.

    uv run python tests/benchmarks/shrunk_retraining.py

Training steps of the dense network against networks shrunk by random scores, each group's width
rounded up to a multiple by adding back its best dropped channels; one thread, interleaved. The
figure is (t dense / t shrunk) / (MACs dense / MACs shrunk).
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from timing import HEADER, interleave, machine, ratio, row
from torch import nn

from raytickets.config import Network
from raytickets.cost import macs
from raytickets.masks import cut, widen
from raytickets.models import build_network
from raytickets.shrink import channel_groups, shrink
from raytickets.train import SGD

GOALS = {0.3: 0.85, 0.5: 0.85, 0.7: 0.75}


def step(network: nn.Module, batch: int, bfloat16: bool, steps: int) -> Callable[[], float]:
    """A function that trains `steps` batches and returns the seconds of one."""
    layout = torch.channels_last if bfloat16 else torch.contiguous_format
    network = network.to(memory_format=layout).train()
    optimizer = SGD(network, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=layout)
    labels = torch.randint(10, (batch,))

    def train() -> float:
        started = time.perf_counter()
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = network(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step(0.01)
        return (time.perf_counter() - started) / steps

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="in each run")
    parser.add_argument("--round-to", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--batch-size", type=int, default=64)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vgg16 = Network("cifar_vgg", {"depth": 16, "width": parsed.width})
    dense = build_network(vgg16, in_channels=3, num_classes=10, seed=0)
    example = torch.zeros(1, 3, 32, 32)
    groups = channel_groups(dense, example)
    widths = [group.width for group in groups]
    scores = torch.rand(sum(widths))
    networks: dict[tuple[float, int], nn.Module] = {}
    for p in GOALS:
        mask = cut(scores, p)
        for multiple in parsed.round_to:
            widened = widen(mask, scores, widths, multiple=multiple)
            networks[p, multiple] = shrink(dense, groups, widened)
    gains = {key: macs(dense, example) / macs(net, example) for key, net in networks.items()}
    print(HEADER)
    for bfloat16 in (True, False):
        numerics = "bfloat16 channels_last" if bfloat16 else "float32"
        args = (parsed.batch_size, bfloat16, parsed.steps)
        functions = {"dense": step(dense, *args)}
        functions |= {str(key): step(network, *args) for key, network in networks.items()}
        seconds = interleave(functions, parsed.runs)
        for (p, multiple), gain in gains.items():
            times = ratio(seconds["dense"], seconds[str((p, multiple))])
            scaled = [f"{value / gain:.2f}" for value in (times.value, times.low, times.high)]
            title = f"VGG16 shrunk at {p:.0%}, widths rounded to {multiple}, {numerics}"
            note = f"{times.value:.2f} times as fast for {gain:.2f} times fewer MACs"
            note += f"; a step takes {median(seconds[str((p, multiple))]) * 1e3:.0f} ms"
            spread = f"{scaled[0]} ({scaled[1]} to {scaled[2]})"
            goal = f">= {GOALS[p]}" if multiple == 16 else ""
            print(row(title, goal, spread, times.n, note), flush=True)
    print("\n" + machine("torch-pruning"))


if __name__ == "__main__":
    main()
