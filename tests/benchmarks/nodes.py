"""What the driver of a sweep on 200 nodes would have to do, part by part, on one machine.

    python tests/benchmarks/nodes.py              # three minutes

2,000 trajectories of 10 checks and 5 tickets each are 32,000 events and 10,000 tickets. Real are
the journal with its syncs, Ray Tune with the crew that hands out work, and MLflow's SQLite store;
each is given as many of the trajectories as fit into its seconds. Made up are the trajectories:
workers tell their events at once, and train nothing. Not simulated: nodes (all workers are
processes of this machine), the network, and retraining.
"""

import json
import os
import pickle
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import raytickets.driver  # noqa: F401, I001  which first sets what Ray reads when it is imported

import ray
from made_up_sweep import OPENING, check, ticket
from ray import tune

from raytickets.crew import Job, Work, run_crew
from raytickets.data import load_data
from raytickets.journal import Journal
from raytickets.room import Room
from raytickets.spaces import load_space
from raytickets.sweep import Sweep
from raytickets.tracking import Tracker, prepare_store

TRAJECTORIES, CHECKS, RATIOS = 2000, 10, (0.1, 0.3, 0.5, 0.7, 0.9)
SECONDS = 45
WORKERS = 16


def events(number: int) -> list[dict[str, Any]]:
    """What trajectory `number` tells."""
    name = f"penalty{number:04d}-seed0"
    distances: dict[str, float | None] = {f"{ratio:g}": 0.5 for ratio in RATIOS}
    told = [check(name, epoch / 2, distances) for epoch in range(2, CHECKS + 2)]
    for place, ratio in enumerate(RATIOS):
        one = ticket(name, f"{number:012x}{place:04x}", ratio, 10**6, 0.9)
        told.append(one | {"penalty": number * 1e-6})
    ended = {
        **{"event": "trajectory", "trajectory": name, "method": "early_bird", "seed": 0},
        **{"penalty": number * 1e-6, "changes": {}, "state": "drawn", "reason": ""},
        **{"epochs": 5.5, "train_macs": 10**10, "seconds": 10.0},
        "ratios": {f"{ratio:g}": "drawn" for ratio in RATIOS},
        "distances_matrix": {"epochs": [], "ratios": {}},
    }
    return [*told, ended]


def journal(folder: Path) -> dict[str, float]:
    folder.mkdir()
    written, begun = 0, time.monotonic()
    kept = Journal(folder)
    for number in range(TRAJECTORIES):
        for event in events(number):
            kept.append(event)
            written += 1
        if time.monotonic() - begun > SECONDS:
            break
    kept.close()
    seconds = time.monotonic() - begun
    begun = time.monotonic()
    read = len(Sweep(folder).events())
    reading = time.monotonic() - begun
    size = (folder / "journal.jsonl").stat().st_size
    return {
        "events": written,
        "events_per_s": written / seconds,
        "bytes_per_event": size / written,
        "events_read_per_s": read / reading,
    }


class Told(tune.Trainable):
    """A trajectory that has its events ready."""

    def setup(self, config: dict) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict) -> bool:
        self._events = iter(new_config.get("events", []))
        return True

    def step(self) -> dict:
        event = next(self._events, None)
        done = event is None or event["event"] == "trajectory"
        return {"events": [event] if event else [], "done": done}


class Trajectories(Work):
    def __init__(self, sweep: Sweep, tell: Any):
        super().__init__(sweep, tell)
        self.begun = time.monotonic()
        self.handed_out = self.told = self.failed = 0

    @property
    def ready(self) -> bool:
        return self.handed_out < TRAJECTORIES and time.monotonic() - self.begun < SECONDS

    def next(self) -> Job:
        self.handed_out += 1
        config = {"events": events(self.handed_out)}
        return Job("trajectory", str(self.handed_out), config)

    def heard(self, event: dict) -> None:  # noqa: ARG002
        self.told += 1

    def fail(self, job: Job, reason: str) -> None:  # noqa: ARG002
        self.failed += 1


def crew(folder: Path) -> dict[str, float]:
    folder.mkdir()
    ray.init("local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    kept = Journal(folder)
    work = Trajectories(Sweep(folder), kept.append)
    run_crew("nodes", Told, work, Sweep(folder), Room(1, 0.0, WORKERS, WORKERS, WORKERS))
    seconds = time.monotonic() - work.begun
    kept.close()
    ray.shutdown()
    assert not work.failed
    return {
        "workers": WORKERS,
        "trajectories": work.handed_out,
        "events_per_s": work.told / seconds,
        "trajectories_per_s": work.handed_out / seconds,
    }


def mlflow(folder: Path) -> dict[str, float]:
    folder.mkdir()
    uri = f"sqlite:///{folder}/mlflow.db"
    prepare_store(uri)
    trajectories = 30
    told = [OPENING, *(event for number in range(trajectories) for event in events(number))]
    kept = Journal(folder)
    for event in told:
        kept.append(event)
        if event["event"] == "ticket":
            (folder / event["path"]).mkdir(parents=True)
            (folder / event["path"] / "manifest.json").write_text("{}")
    kept.close()
    begun = time.monotonic()
    tracker = Tracker(uri, folder)
    for event in told:
        tracker.write(event)
    owed = tracker.close(timeout_s=240)
    seconds = time.monotonic() - begun
    assert not owed, owed
    runs = 6 * trajectories
    return {"events_per_s": len(told) / seconds, "runs": runs, "runs_per_s": runs / seconds}


def objects() -> dict[str, float]:
    digits = len(pickle.dumps(load_data(load_space("digits").data)))
    return {"digits_bytes_per_node": digits, "cifar10_bytes_per_node": 60_000 * 32 * 32 * 3}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {"machine": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
        print(json.dumps(found), flush=True)
        print("journal", json.dumps(journal(folder / "journal")), flush=True)
        print("crew", json.dumps(crew(folder / "crew")), flush=True)
        print("mlflow", json.dumps(mlflow(folder / "mlflow")), flush=True)
        print("objects", json.dumps(objects()), flush=True)


if __name__ == "__main__":
    main()
