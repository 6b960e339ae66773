"""What a trial costs beside its training: on a warm worker, and with nothing to train.

    uv run python tests/benchmarks/trials.py

`next trial`: trajectories of one epoch on 64 digits, one after the other on one worker, against the
same in a plain loop: CPU of the worker and wall, for each trial after the first. `synthetic trials`
(`--trials`, 500 by default) only report 5 events each, through the same driver code (journal,
observer, searcher); the memory of the driver is looked at as they go.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import torch
from timing import HEADER, interleave, machine, row

from raytickets import tuner
from raytickets.config import Data, Network, Proof, Retraining, SearchSpace, StopRule, Training
from raytickets.data import load_data
from raytickets.driver import ray
from raytickets.journal import Journal
from raytickets.plan import make_plan
from raytickets.room import Room
from raytickets.sweep import Sweep
from raytickets.trajectory import grid, prepare, run_trajectory
from raytickets.trial import Trial

SPACE = SearchSpace(
    name="trials",
    network=Network("cifar_vgg", {"depth": 9, "width": 0.125}),
    data=Data("digits", limit=64),
    penalties=tuple(1e-4 * (1 + place) for place in range(20)),
    prune_ratios=(0.5,),
    training=Training(epochs=2, batch_size=32),
    proof=Proof(rungs=1),
    retraining=Retraining(epochs=1),
    stop_rule=StopRule(threshold=1e-9, window=2),
)


class Synthetic(Trial):
    """A trial with nothing to train."""

    def setup(self, config, **given):  # noqa: ARG002
        self.reset_config(config)

    def reset_config(self, new_config):
        point = tuner.Point(**new_config["point"])
        check = {"event": "check", "trajectory": point.id, "epoch": 1.0, "train_macs": 0}
        check |= {"seconds": 0.0, "validation_accuracy": None, "about_to_draw": False}
        end = {"event": "trajectory", "trajectory": point.id, "state": "not converged"}
        checks = [[check | {"check": number}] for number in range(1, 6)]
        self._steps = iter([*checks[:-1], [*checks[-1], end]])
        return True


def run_search(space: SearchSpace, slots: int, hear) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(space, name="trials", storage=folder)
        journal = Journal(plan.folder)
        journal.append(plan.opening)

        def tell(event):
            journal.append(event)
            hear(event)

        data = ray.put(plan.dataset)
        room = Room(cpus=1, gpus=0.0, slots=slots, most=slots, workers=slots)
        tuner.run_search(space, Sweep(plan.folder), data, room, tell)


def cpu_of_trials() -> float:
    """CPU seconds that the trials' processes of this driver have used."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            command = (stat.parent / "cmdline").read_bytes()
            fields = stat.read_text().rpartition(")")[2].split()
            if (b"Trial" in command or b"Trainable" in command) and _is_ours(int(fields[1])):
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except OSError:
            continue
    return total


def _is_ours(raylet: int) -> bool:
    """Whether this process has started the raylet: others may run sweeps beside it."""
    fields = Path(f"/proc/{raylet}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]) == os.getpid()


def next_trial(runs: int) -> None:
    count = len(SPACE.penalties) - 1
    cpu: list[float] = []
    plain_cpu: list[float] = []

    def warm() -> float:
        ends: list[tuple[float, float]] = []

        def hear(event):
            if event["event"] == "trajectory":
                ends.append((time.perf_counter(), cpu_of_trials()))

        run_search(SPACE, 1, hear)
        cpu.append((ends[-1][1] - ends[0][1]) / count)
        return (ends[-1][0] - ends[0][0]) / count

    dataset = load_data(SPACE.data)

    def plain() -> float:
        with tempfile.TemporaryDirectory() as folder:
            setting = prepare(SPACE, dataset, Path(folder))
            started, before = time.perf_counter(), time.process_time()
            for point in grid(SPACE)[1:]:
                for _ in run_trajectory(setting, point):
                    pass
            plain_cpu.append((time.process_time() - before) / count)
            return (time.perf_counter() - started) / count

    seconds = interleave({"warm": warm, "plain": plain}, runs, warm_up=False)
    extra = [a - b for a, b in zip(seconds["warm"], seconds["plain"], strict=True)]
    more = [a - b for a, b in zip(cpu, plain_cpu, strict=True)]
    for title, goal, values, alone in (
        ("wall", "<= 0.2 s", extra, seconds["plain"]),
        ("CPU", "<= 1.2 s", more, plain_cpu),
    ):
        spread = (
            f"{sorted(values)[len(values) // 2]:.3f} s ({min(values):.3f} to {max(values):.3f})"
        )
        note = f"beyond a plain loop's {min(alone):.3f} s of training and checking"
        print(row(f"next trial on a warm worker: {title}", goal, spread, runs, note), flush=True)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def many_trials(count: int) -> None:
    penalties = tuple(round(1e-4 * (1 + place), 6) for place in range(count))
    space = dataclasses.replace(SPACE, penalties=penalties)
    marks = sorted({1, min(100, count), count // 2, count})
    memory: dict[int, float] = {}
    ended: list[float] = []

    def hear(event):
        if event["event"] == "trajectory":
            ended.append(time.perf_counter())
            if len(ended) in marks:
                memory[len(ended)] = resident_mib()

    tuner.Trial = Synthetic
    started = time.perf_counter()
    run_search(space, 2, hear)
    seconds = time.perf_counter() - started
    note = f"{ended[-1] - ended[0]:.0f} s from the first end to the last"
    goal = "<= 60 s" if count == 500 else ""
    print(row(f"{count} synthetic trials x 5 results", goal, f"{seconds:.0f} s", 1, note))
    figure = f"driver memory after {', '.join(map(str, marks))} trials"
    grown = f"{', '.join(f'{memory[mark]:.0f}' for mark in marks)} MiB"
    each = (memory[marks[-1]] - memory[marks[1]]) * 1024 / (marks[-1] - marks[1])
    print(row(figure, "flat", grown, 1, f"{each:.0f} KiB a trial after the first {marks[1]}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--trials", type=int, default=500, help="synthetic ones, over 200")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    print(HEADER)
    next_trial(parsed.runs)
    many_trials(parsed.trials)
    print("\n" + machine("ray"))


if __name__ == "__main__":
    main()
