"""What the driver of a sweep on 200 nodes would have to do, part by part, on one machine.

    python tests/benchmarks/nodes.py                        # all parts, about ten minutes
    python tests/benchmarks/nodes.py --workers 100 crew     # 60 MB each

2,000 trajectories of 10 checks and 5 tickets each are 32,000 events and 10,000 tickets. Each part
is given as many of the trajectories as fit into its seconds:

journal   the journal, with its syncs
crew      the driver's whole loop: Ray Tune, the crew that hands out work and the journal, without
          MLflow, with its server and with its SQLite file. The workers are real ones of Ray, all on
          this machine, but import neither torch nor Ray Tune, and tell their events at once
mlflow    MLflow's server and its SQLite file alone
objects   what goes through Ray's object store
requests  a small real sweep at s3://, on a stand-in for S3 that counts requests; driver and workers
          share no folder, as if they were on different machines, and all workers are on one

Not simulated: machines, their raylets, the network between them, and retraining but in `requests`.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

sys.path.insert(0, str(Path(__file__).parents[1]))

import raytickets.driver  # noqa: F401, I001  which first sets what Ray reads when it is imported

import ray
from faulty_server import Server
from head_node import Head
from made_up_sweep import OPENING, check, ticket
from ray import tune
from ray.air.execution._internal import RayActorManager
from ray.tune.execution import tune_controller
from s3_server import S3, atomic

from raytickets import storage
from raytickets.crew import Job, Work, run_crew
from raytickets.data import load_data
from raytickets.journal import Journal
from raytickets.room import Room
from raytickets.spaces import load_space
from raytickets.sweep import Sweep, select
from raytickets.tracking import Tracker, prepare_store

TRAJECTORIES, CHECKS, RATIOS = 2000, 10, (0.1, 0.3, 0.5, 0.7, 0.9)
SECONDS = 45


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


# The driver's loop


class Teller:
    """A worker: to Ray Tune it is a Trainable, with what Tune puts into every result."""

    def __init__(self, config: dict, told: list[dict], sweep: str, workers: int):
        self._sweep, self._workers = Path(sweep), workers
        (self._sweep / "there" / str(os.getpid())).touch()
        self.reset(config, told)

    def reset(self, config: dict, told: list[dict]) -> bool:
        self._config, self._events, self._steps = config, iter(told), 0
        self._begun = time.time()
        return True

    def train(self) -> dict:
        # Nobody begins before all are there.
        while len(os.listdir(self._sweep / "there")) < self._workers:  # noqa: PTH208
            time.sleep(0.2)
        event = next(self._events, None)
        if event and event["event"] == "ticket":
            (self._sweep / event["path"]).mkdir(parents=True)
            (self._sweep / event["path"] / "manifest.json").write_text("{}")
        over = event is None or event["event"] == "trajectory" or (self._sweep / "over").exists()
        self._steps += 1
        now = time.time()
        return {
            **{"events": [event] if event else [], "done": over, "config": self._config},
            **{"training_iteration": self._steps, "iterations_since_restore": self._steps},
            **{"time_this_iter_s": 0.01, "time_total_s": now - self._begun, "timestamp": int(now)},
            **{"time_since_restore": now - self._begun, "date": time.strftime("%F_%H-%M-%S")},
            **{"pid": os.getpid(), "hostname": "node", "node_ip": "127.0.0.1", "trial_id": ""},
        }

    def get_auto_filled_metrics(self, **_: Any) -> dict:
        return {"pid": os.getpid(), "hostname": "node", "node_ip": "127.0.0.1"}

    def stop(self) -> None:
        pass


class Told(tune.Trainable):
    """What Tune is told to run; `Tellers` run in its place."""


class Tellers(RayActorManager):
    """Ray's, but for the class of the workers and what they are sent."""

    sweep: Path
    workers: int

    def add_actor(self, cls, kwargs, resource_request, **told):  # noqa: ARG002
        given = {"sweep": str(self.sweep), "workers": self.workers, **_sent(kwargs["config"])}
        return super().add_actor(ray.remote(Teller), given, resource_request, **told)

    def schedule_actor_task(self, tracked_actor, method_name, args=None, kwargs=None, **told):
        if method_name == "reset":
            args, kwargs = (), _sent(args[0])
        return super().schedule_actor_task(tracked_actor, method_name, args, kwargs, **told)


def _sent(config: dict) -> dict[str, Any]:
    return {"config": {"number": config["number"]}, "told": events(config["number"])}


class Trajectories(Work):
    """Hands them out for `SECONDS` without MLflow, and as long with each of its stores."""

    def __init__(self, sweep: Sweep, kept: Journal, stores: list[str]):
        super().__init__(sweep, self._write)
        self._folder, self._journal, self._stores = sweep.path, kept, stores
        self._tracker: Tracker | None = None
        self.handed_out = self.told = 0
        self.marks: list[tuple[float, float, int]] = []
        """Wall and processor seconds of this process, and events told."""

    @property
    def over(self) -> bool:
        return len(self.marks) > 1 + len(self._stores)

    @property
    def ready(self) -> bool:
        return self.handed_out < TRAJECTORIES and not self.over

    def next(self) -> Job:
        self.handed_out += 1
        return Job("trajectory", str(self.handed_out), {"number": self.handed_out})

    def heard(self, event: dict) -> None:  # noqa: ARG002
        if self.over or (self.marks and time.monotonic() < self.marks[-1][0] + SECONDS):
            self.told += 1
            return
        if self._tracker:
            self._tracker.close(0)
        self.marks.append((time.monotonic(), time.process_time(), self.told))
        if self.over:
            (self._folder / "over").touch()
        elif place := len(self.marks) - 1:
            self._tracker = Tracker(self._stores[place - 1], self._folder)
            self._tracker.write(OPENING)

    def fail(self, job: Job, reason: str) -> None:
        raise RuntimeError(f"{job.id}: {reason}")

    def _write(self, event: dict) -> None:
        self._journal.append(event)
        if self._tracker:
            self._tracker.write(event)


def crew(folder: Path, workers: int) -> dict[str, Any]:
    (folder / "there").mkdir()
    served, file = Server(folder), f"sqlite:///{folder}/alone.db"
    served.start()
    prepare_store(file)
    begun = time.monotonic()
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init("local", num_cpus=workers, **quiet)
    Tellers.sweep, Tellers.workers = folder, workers
    tune_controller.RayActorManager = Tellers
    kept = Journal(folder)
    kept.append(OPENING)
    work = Trajectories(Sweep(folder), kept, [served.address, file])
    run_crew("nodes", Told, work, Sweep(folder), Room(1, 0.0, workers, workers, workers))
    ray.shutdown()
    kept.close()
    served.kill()
    found: dict[str, Any] = {"workers": workers, "s_until_all_are_there": work.marks[0][0] - begun}
    phases = ("without MLflow", "with MLflow's server", "with an SQLite file")
    for phase, (before, after) in zip(phases, pairwise(work.marks), strict=True):
        wall, cpu, told = (b - a for a, b in zip(before, after, strict=True))
        found[phase] = {"events_per_s": told / wall, "driver_cpu_ms_per_event": 1e3 * cpu / told}
    return found


def mlflow(folder: Path) -> dict[str, Any]:
    served, file = Server(folder), f"sqlite:///{folder}/alone.db"
    served.start()
    prepare_store(file)
    found = {"server": _delivered(folder / "a", served.address)}
    served.kill()
    return found | {"SQLite file": _delivered(folder / "b", file)}


def _delivered(folder: Path, uri: str) -> dict[str, float]:
    folder.mkdir()
    trajectories = 30
    told = [OPENING, *(event for number in range(trajectories) for event in events(number))]
    kept = Journal(folder)
    for event in told:
        kept.append(event)
        if event["event"] == "ticket":
            (folder / event["path"]).mkdir(parents=True)
            (folder / event["path"] / "manifest.json").write_text("{}")
    kept.close()
    begun, cpu = time.monotonic(), time.process_time()
    tracker = Tracker(uri, folder)
    for event in told:
        tracker.write(event)
    owed = tracker.close(timeout_s=None)
    seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
    assert not owed, owed
    calls, runs = tracker._store.calls, tracker.runs
    return {
        **{"events_per_s": len(told) / seconds, "runs_per_s": runs / seconds},
        **{"calls_per_s": calls / seconds, "calls_per_run": calls / runs},
        "driver_cpu_ms_per_event": 1e3 * cpu / len(told),
    }


def objects(_: Path) -> dict[str, int]:
    digits = len(pickle.dumps(load_data(load_space("digits").data)))
    largest = max(len(pickle.dumps(event)) for event in events(1))
    images = {"digits_bytes_per_node": digits, "cifar10_bytes_per_node": 60_000 * 32 * 32 * 3}
    return images | {"largest_event_bytes": largest}


# Requests to an object store

SPACE = """
from raytickets.config import *

def space():
    return SearchSpace(
        name="small",
        network=Network("cifar_vgg", {"depth": 9, "width": 0.125}),
        data=Data(),
        penalties=(1e-4, 1e-3),
        prune_ratios=(0.1, 0.3, 0.5, 0.7, 0.9),
        training=Training(epochs=12),
        retraining=Retraining(epochs=4),
    )
"""
DRIVER, WORKERS = "driver", "workers"


@contextlib.contextmanager
def counting() -> Iterator[tuple[int, Counter]]:
    """A stand-in for S3: its port, and its requests by who asks, for what, and how."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server
    from werkzeug.test import Client

    found: Counter[tuple[str, str, str]] = Counter()
    store = atomic(DomainDispatcherApplication(create_backend_app))
    assert Client(store).put("/bucket", base_url=S3).status_code == 200

    def answer(environ: dict, start_response: Any) -> Any:
        query = parse_qs(environ["QUERY_STRING"])
        how = "LIST" if "list-type" in query else environ["REQUEST_METHOD"]
        key = query["prefix"][0] if how == "LIST" else environ["PATH_INFO"].partition("bucket/")[2]
        # Of sweeps/it/<what>; nothing but checkpoints is deleted, by POST.
        what = [*key.split("/"), "", ""][2] or "checkpoints"
        who = {"127.0.0.1": DRIVER, "localhost": WORKERS}[environ["HTTP_HOST"].partition(":")[0]]
        found[who, what, how] += 1
        found[who, what, "bytes"] += int(environ.get("CONTENT_LENGTH") or 0)
        return store(environ, start_response)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, answer, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, found
    server.shutdown()


def requests(folder: Path) -> dict[str, Any]:
    (folder / "small.py").write_text(SPACE)
    work = folder / "work"
    work.mkdir()
    with counting() as (port, found):
        os.environ |= {
            **{"AWS_ENDPOINT_URL": f"http://localhost:{port}", "AWS_REGION": "us-east-1"},
            **{"AWS_ACCESS_KEY_ID": "of-the-test", "AWS_SECRET_ACCESS_KEY": "of-the-test"},
            "RAYTICKETS_WORK": str(work),
        }
        head = Head(folder, cpus=2)
        try:
            head.wait()
            # The driver has its own copies: what the workers wrote it gets from the store.
            own = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
            own += ['mount -t tmpfs none "$0" && exec "$@"', str(work)]
            words = ["search", "small.py", "--name", "it", "--storage", "s3://bucket/sweeps"]
            begun = time.monotonic()
            subprocess.run(
                [*own, sys.executable, "-m", "raytickets.cli", *words, "--address", head.gcs],
                cwd=folder,
                env=head.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"},
                check=True,
                stdout=subprocess.DEVNULL,
            )
            seconds = time.monotonic() - begun
        finally:
            with contextlib.redirect_stdout(io.StringIO()):  # Its logs.
                head.end()
        told = Sweep(storage.local("s3://bucket/sweeps/it")).fetched().events()
    return _counted(found, told, seconds)


def _counted(found: Counter, told: list[dict], seconds: float) -> dict[str, Any]:
    """How many there are, what each of them takes, and what the sweep on 200 nodes comes to."""
    checkpoints, tickets = found[WORKERS, "checkpoints", "PUT"], len(select(told, "ticket"))
    units = {"checkpoints": checkpoints, "tickets": tickets, "lease.json": seconds}
    each = {key: count / units.get(key[1], 1) for key, count in sorted(found.items()) if count}
    whole = {"checkpoints": TRAJECTORIES * CHECKS, "tickets": TRAJECTORIES * len(RATIOS)}
    comes_to: Counter[tuple[str, str]] = Counter()
    for (who, what, how), count in each.items():
        comes_to[who, how] += round(count * whole.get(what, 0))
    return {
        **units,
        "each": {" ".join(key): round(count, 3) for key, count in each.items()},
        "whole": {" ".join(key): count for key, count in comes_to.items()},
    }


def main() -> None:
    parts = (journal, crew, mlflow, objects, requests)
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=[part.__name__ for part in parts])
    parser.add_argument("--workers", type=int, default=16)
    given = parser.parse_args()
    print(json.dumps({"machine": platform.platform(), "cpus": os.cpu_count()}))
    for part in parts:
        if part.__name__ in given.parts:
            with tempfile.TemporaryDirectory() as folder:
                more = [given.workers] if part is crew else []
                found = {"load": os.getloadavg()[0]} | part(Path(folder), *more)
            print(part.__name__, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
