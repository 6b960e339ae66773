"""Retraining on Ray Train with two workers against one: epochs of ResNet-20.

    uv run python tests/benchmarks/workers.py --cifar FOLDER

The same batches in all, half of each to each of two workers of one thread. The figure is how many
times as fast an epoch is with two; each run is one retraining of the dense network, and its epochs
after the first are counted.
"""

import argparse
import dataclasses
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from timing import HEADER, interleave, machine, ratio, row

from raytickets.config import Data, Network, Retraining, SearchSpace, Training
from raytickets.data import load_data
from raytickets.driver import ray
from raytickets.retrain import DENSE, Job, retrain

EPOCHS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--limit", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=5)
    parsed = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    space = SearchSpace(
        name="workers",
        network=Network("cifar_resnet", {"depth": 20}),
        data=Data("folder", parsed.cifar, limit=parsed.limit, crop_padding=4, flip=True),
        penalties=(1e-4,),
        prune_ratios=(0.5,),
        training=Training(epochs=5),
        retraining=Retraining(epochs=EPOCHS, batch_size=128),
    )
    data = ray.put(load_data(space.data))

    def epoch(workers: int) -> float:
        chosen = space.retraining
        one = dataclasses.replace(
            space, retraining=dataclasses.replace(chosen, num_workers=workers)
        )
        times: list[float] = []

        def hear(event):
            if event["event"] == "epoch":
                times.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as folder:
            retrain(one, [Job(DENSE, None)], data, Path(folder), workers, hear)
        return median(end - start for start, end in pairwise(times))

    seconds = interleave(
        {"one": lambda: epoch(1), "two": lambda: epoch(2)}, parsed.runs, warm_up=False
    )
    times = ratio(seconds["one"], seconds["two"])
    note = f"{median(seconds['one']):.1f} and {median(seconds['two']):.1f} s an epoch"
    print(HEADER)
    title = "Ray Train, ResNet-20 at batch 128: 2 workers against 1"
    print(row(title, "", times, times.n, note))
    print("\n" + machine("ray"))


if __name__ == "__main__":
    main()
