"""What an epoch of images costs: ours against the authors' DataLoader with one worker.

    uv run python tests/benchmarks/data_path.py --cifar FOLDER

FOLDER holds train/<class>/<image> and test/<class>/<image> of 32x32 pixels. Each takes as many of
them in batches of 64, cropped (4 pixels), flipped and normalised, on one thread; the authors' once
from arrays in memory, as their CIFAR-10, and once from the files. Wall time, and CPU time with that
of child processes. The last figure is against a training epoch of a VGG16 of 1/8 width by rival C.
"""

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rival_authors import loaders
from rival_bare import Bare
from rival_images import decode
from rivals import Settings
from timing import HEADER, interleave, machine, ratio, row

from raytickets.batches import Batches
from raytickets.config import Data
from raytickets.data import load_data
from raytickets.train import seeded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=5)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(
        data=parsed.cifar,
        network="cifar_vgg",
        options={"depth": 16, "width": 0.125},
        limit=parsed.limit,
        validation=0,
        penalties=(1e-4,),
        ratios=(0.5,),
        epochs=1,
        batch_size=64,
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=1e-4,
        seed=0,
        out=Path(),
    )
    data = Data("folder", parsed.cifar, limit=parsed.limit, crop_padding=4, flip=True)
    started = time.perf_counter()
    dataset = load_data(data)
    load_seconds = time.perf_counter() - started
    batches, arrays = Batches(dataset, data), decode(settings)
    if batches.count(64) != parsed.limit // 64:
        raise SystemExit(f"the folder has too few images for --limit {parsed.limit}")
    memory, files = loaders(settings, arrays, 1)[0], loaders(settings, None, 1)[0]
    bare = Bare(settings, arrays, 1e-4, True, True)
    cpu: dict[str, list[float]] = defaultdict(list)

    def drained(name: str, make: Callable[[], Iterable]) -> Callable[[], float]:
        def run() -> float:
            before, began = sum(os.times()[:4]), time.perf_counter()
            for _ in make():
                pass
            seconds = time.perf_counter() - began
            cpu[name].append(sum(os.times()[:4]) - before)
            return seconds

        return run

    def ours() -> Iterable:
        # Ten epochs, as the clock of CPU time ticks in hundredths of a second.
        for epoch in range(10):
            yield from batches.training(64, seeded("benchmark", epoch))

    wall = interleave(
        {
            "ours": drained("ours", ours),
            "memory": drained("memory", lambda: memory),
            "files": drained("files", lambda: files),
            "training": bare.epoch,
        },
        parsed.runs,
    )
    wall["ours"] = [seconds / 10 for seconds in wall["ours"]]
    cpu = {name: values[-parsed.runs :] for name, values in cpu.items()}
    cpu["ours"] = [seconds / 10 for seconds in cpu["ours"]]
    print(HEADER)
    sources = {"memory": "arrays in memory", "files": "files, which ours decoded before"}
    for name, source in sources.items():
        title = f"data path, {parsed.limit:,} images, against the authors' from {source}"
        goal, both = ">= 30", (("wall", wall), ("CPU", cpu))
        for clock, seconds in both:
            times = ratio(seconds[name], seconds["ours"])
            note = f"ours {ratio(seconds['ours'], [1.0] * parsed.runs)} s an epoch"
            print(row(f"{title}: {clock}", goal, times, times.n, note))
    share = ratio(wall["ours"], wall["training"])
    title = "data path: share of a training epoch of VGG16 at 1/8 width, bfloat16"
    note = f"the data set was loaded once in {load_seconds:.1f} s (from the cache if it was there)"
    print(
        row(
            title,
            "< 3 %",
            f"{share.value:.2%} ({share.low:.2%} to {share.high:.2%})",
            share.n,
            note,
        )
    )
    print("\n" + machine("torchvision", "pillow"))


if __name__ == "__main__":
    main()
