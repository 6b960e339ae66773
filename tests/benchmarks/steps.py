"""Training steps: ours against the authors' loop, a bare loop, and the processor's matmul rate.

    uv run python tests/benchmarks/steps.py --cifar FOLDER

Epochs of ResNet-20 and of a VGG16 of 1/8 width: ours with what a trajectory does (bfloat16 where
the processor has it, channels_last, penalty, batches from memory), the authors' (rival B) and the
bare loop (rival C) in our numerics. Then the step of a full VGG16 against a matrix product in the
same numerics. One thread each, interleaved.
"""

import argparse
import time
from pathlib import Path

import rival_authors
import torch
from rival_bare import Bare
from rival_images import decode
from rivals import Settings
from timing import HEADER, interleave, machine, ratio, row

from raytickets.batches import Batches
from raytickets.config import Data, Network, Training
from raytickets.cost import macs, training_macs
from raytickets.data import load_data
from raytickets.models import build_network
from raytickets.train import SGD, fit, numerics, train

NETWORKS = {
    "ResNet-20": ("cifar_resnet", {"depth": 20}),
    "VGG16 at 1/8 width": ("cifar_vgg", {"depth": 16, "width": 0.125}),
}
VGG16 = Network("cifar_vgg", {"depth": 16})


def settings(folder: str, limit: int, network: str, options: dict) -> Settings:
    return Settings(
        data=folder,
        network=network,
        options=options,
        limit=limit,
        validation=0,
        penalties=(1e-4,),
        ratios=(0.3, 0.5, 0.7),
        epochs=1,
        batch_size=64,
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=1e-4,
        seed=0,
        out=Path(),
    )


def our_epoch(batches: Batches, network: Network):
    """A function that trains one epoch as a trajectory does; its seconds."""
    built = build_network(network, in_channels=3, num_classes=10, seed=0)
    how = numerics("auto", True, built)
    recipe = Training(epochs=1000, batch_size=64, learning_rate=0.05)
    optimizer = SGD(how.place(built), recipe.momentum, recipe.weight_decay)
    parts = fit(built, optimizer, batches, recipe, ("benchmark",), how, penalty=1e-4)

    def run() -> float:
        started = time.perf_counter()
        for steps, _ in parts:
            if steps % batches.count(64) == 0:
                break
        return time.perf_counter() - started

    return run, how


def epochs(folder: str, limit: int, runs: int) -> None:
    data = Data("folder", folder, limit=limit, crop_padding=4, flip=True)
    batches = Batches(load_data(data), data)
    for title, (name, options) in NETWORKS.items():
        chosen = settings(folder, limit, name, options)
        arrays = decode(chosen)
        ours, how = our_epoch(batches, Network(name, options))
        loader = rival_authors.loaders(chosen, arrays, 1)[0]
        model, optimizer = rival_authors.start(chosen)
        bare = Bare(chosen, arrays, 1e-4, how.dtype == torch.bfloat16, True)

        def authors(model=model, optimizer=optimizer, loader=loader) -> float:
            return rival_authors.train(model, optimizer, loader, 1e-4)

        seconds = interleave({"ours": ours, "authors": authors, "bare": bare.epoch}, runs)
        times = ratio(seconds["authors"], seconds["ours"])
        goal = ">= 2.2" if title == "ResNet-20" else ""
        print(row(f"epoch of {title}: the authors' loop against ours", goal, times, times.n))
        share = ratio(seconds["bare"], seconds["ours"])
        print(row(f"step of {title}: our throughput against C", ">= 0.97", share, share.n))


def matmul_share(runs: int) -> None:
    """The training step of VGG16, in its MACs a second, against a large matrix product."""
    built = build_network(VGG16, in_channels=3, num_classes=10, seed=0)
    how = numerics("auto", True, built)
    optimizer = SGD(how.place(built), 0.9, 1e-4)
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    work = training_macs(macs(built, torch.zeros(1, 3, 32, 32)), 64)
    side = 2048
    left, right = (torch.randn(side, side).to(how.dtype) for _ in range(2))

    def step() -> float:
        started = time.perf_counter()
        train(built, optimizer, [(images, labels)], [0.01], how, penalty=1e-4)
        return (time.perf_counter() - started) / work

    def product() -> float:
        started = time.perf_counter()
        left @ right
        return (time.perf_counter() - started) / side**3

    seconds = interleave({"step": step, "product": product}, max(runs, 15))
    share = ratio(seconds["product"], seconds["step"])
    note = f"{how.dtype}, batch 64, {side} x {side} matrices"
    print(row("VGG16 step: share of the matmul rate", ">= 0.9", share, share.n, note))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--limit", type=int, default=2560)
    parser.add_argument("--runs", type=int, default=5)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    print(HEADER)
    epochs(parsed.cifar, parsed.limit, parsed.runs)
    matmul_share(parsed.runs)
    print("\n" + machine())


if __name__ == "__main__":
    main()
