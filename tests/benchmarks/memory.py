"""What a second Ray worker takes on the same data: memory that counts shared pages once.

    uv run python tests/benchmarks/memory.py --cifar FOLDER

The proportional set size (PSS: a page that n processes share counts 1/n for each) of the driver,
the object store and the workers together, with one worker and with two; pages of files, which are
libraries that other programs use too, are left out. Each worker has gone once through all images of
the data set that the driver put into the object store. The same with a data set of a few full
batches tells what a second worker takes anyway; what it takes beyond that is for the data.
"""

import argparse
import os
from pathlib import Path
from statistics import median

import ray
import torch
from timing import HEADER, machine, row

from raytickets.batches import Batches
from raytickets.config import Data
from raytickets.data import load_data
from raytickets.train import seeded


@ray.remote(num_cpus=1)
class Worker:
    """Holds the data set as a trajectory does."""

    def __init__(self, dataset, data: Data):
        torch.set_num_threads(1)
        self.batches = Batches(dataset, data)

    def work(self) -> tuple[int, int]:
        """Touch every image; the ids of this process and of the one that has the object store."""
        for _ in self.batches.training(64, seeded("benchmark")):
            pass
        for split in ("validation", "test"):
            for _ in self.batches.evaluation(split):
                pass
        return os.getpid(), os.getppid()


def proportional_set_size(process: int) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    kinds = ("Pss_Anon:", "Pss_Shmem:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))


def second_worker(data: Data) -> tuple[int, int]:
    """Bytes that a second worker takes, and bytes of the data set's images."""
    dataset = load_data(data)
    size = sum(getattr(dataset, name).images.nbytes for name in ("train", "validation", "test"))
    shared, workers, totals = ray.put(dataset), [], []
    del dataset
    processes = {os.getpid()}
    for _ in range(2):
        workers.append(Worker.remote(shared, data))
        processes |= set(ray.get(workers[-1].work.remote()))
        totals.append(sum(proportional_set_size(process) for process in processes))
    for worker in workers:
        ray.kill(worker)
    return totals[1] - totals[0], size


def main() -> None:
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", required=True)
    parser.add_argument("--limit", type=int, help="training images")
    parser.add_argument("--runs", type=int, default=5)
    parsed = parser.parse_args()
    # Two workers on any machine.
    ray.init("local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    folder = {"crop_padding": 4, "flip": True, "loading": "memory"}
    full = Data("folder", parsed.cifar, limit=parsed.limit, **folder)
    few = Data("folder", parsed.cifar, limit=1200, **folder)
    copies, empty = [], []
    for _ in range(parsed.runs):
        (with_few, few_size), (with_full, size) = second_worker(few), second_worker(full)
        copies.append((with_full - with_few) / (size - few_size))
        empty.append(with_few / 2**20)
    spread = f"{median(copies):.2f} ({min(copies):.2f} to {max(copies):.2f}) copies"
    note = f"images take {size / 2**20:.0f} MiB; without them the worker {median(empty):.0f} MiB"
    print(HEADER)
    print(row("memory of a second worker on the same data", "0 copies", spread, len(copies), note))
    print("\n" + machine("ray"))


if __name__ == "__main__":
    main()
