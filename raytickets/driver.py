"""The driver of sweeps and comparisons: checks the input, runs every stage on Ray, and tells."""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

# Under `uv run` Ray would build a new environment for every worker; a sweep's workers are to run
# in the one that the driver has. In place of Tune's own files, boxes and Ctrl-C handler there are
# the journal, the observer and KeyboardInterrupt. Ray Train's workers wait at every report for
# their controller to look at them, which it does every 2 s.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")

import ray

from raytickets.config import InputError, SearchSpace
from raytickets.contest import run_contest
from raytickets.data import DataSet, load_data
from raytickets.halving import choose_winners
from raytickets.journal import Event, Journal
from raytickets.plan import Plan, make_plan
from raytickets.retrain import DENSE, Job, retrain, worker_count
from raytickets.sweep import Sweep, select
from raytickets.ticket import load_ticket
from raytickets.tuner import run_search

if TYPE_CHECKING:
    from raytickets.tracking import Tracker

Observer = Callable[[Event], None]


class SweepFailed(RuntimeError):
    """A stage of the sweep or comparison failed; what was found before is on disk."""


def _unheard(event: Event) -> None:
    pass


def search(
    space: SearchSpace,
    *,
    name: str | None = None,
    storage: str | Path = "sweeps",
    tracking_uri: str | None = None,
    observer: Observer = _unheard,
) -> Sweep:
    """Run a sweep: trajectories, tickets, proofs, winners, retraining, MLflow.

    The sweep's folder is `storage/name`; without a name it is called after the space and the time.
    The same name goes on with a sweep that was cut off: what it had finished is not done again.
    `observer` hears every event of `raytickets.journal` once it is on disk. Ray is the cluster at
    RAY_ADDRESS, or this machine. Raises InputError on input that cannot be used, before Ray
    starts where that can be known, and SweepFailed if a stage failed.
    """
    return run(make_plan(space, name=name, storage=storage), tracking_uri, observer)


def compare(
    space: SearchSpace,
    *,
    name: str | None = None,
    storage: str | Path = "sweeps",
    tracking_uri: str | None = None,
    observer: Observer = _unheard,
) -> Sweep:
    """Run a comparison: every method of `space.comparison` at every prune ratio and seed.

    What `name`, `storage`, `observer` and Ray are, and what is raised, is as for `search`; the
    report of what comes back is that of `raytickets.comparison`. A source of tickets that fails, or
    a retraining, leaves the rest alone: SweepFailed comes at the end and names it.
    """
    plan = make_plan(space, name=name, storage=storage, kind="comparison")
    return run(plan, tracking_uri, observer)


def run(plan: Plan, tracking_uri: str | None = None, observer: Observer = _unheard) -> Sweep:
    """Run a sweep or comparison whose input was checked; the rest of `search` and `compare`."""
    space, sweep = plan.space, Sweep(plan.folder)
    compared = plan.opening["event"] == "comparison"
    with _running(space, plan.folder, tracking_uri, observer) as (slots, capacity, tell):
        # A comparison retrains each ticket in one process.
        workers = 1 if compared else worker_count(space, capacity)
        if plan.opening not in sweep.events():
            tell(plan.opening)
        cause = None
        try:
            data = ray.put(plan.dataset)
            if compared:
                run_contest(space, sweep, data, slots, tell)
            else:
                run_search(space, sweep, data, slots, tell)
                _retrain_winners(space, sweep, data, workers, tell)
        except Exception as error:
            cause = error
        reasons = [f"{event['trajectory']}: {event['reason']}" for event in sweep.failures()]
        reason = "; ".join(reasons + ([_last_line(str(cause) or repr(cause))] if cause else []))
        tell({"event": "end", "state": "failed" if reason else "done", "reason": reason})
    if reason:
        raise SweepFailed(reason) from cause
    return sweep


def retrain_ticket(
    path: str | Path,
    *,
    epochs: int | None = None,
    weights: str | None = None,
    tracking_uri: str | None = None,
    observer: Observer = _unheard,
) -> Event:
    """Retrain one ticket of a sweep with the sweep's recipe; its `retrained` event.

    `epochs` and `weights` (`inherit` or `reinit`) replace the recipe's own. The result goes to the
    sweep's journal and the ticket's MLflow run. Raises InputError, DamagedTicket or SweepFailed.
    """
    path = Path(path).resolve()
    ticket = load_ticket(path, trust_code=True)
    sweep = Sweep(path.parent.parent)
    space = sweep.space()
    if ticket.id not in {event["ticket"] for event in select(sweep.events(), "ticket")}:
        raise InputError("ticket", str(path), "must be one of the tickets of a sweep")
    recipe = {"epochs": epochs, "weights": weights}
    recipe = {name: value for name, value in recipe.items() if value is not None}
    space = space.with_retraining(**recipe)
    dataset = load_data(space.data)
    with _running(space, sweep.path, tracking_uri, observer) as (_, capacity, tell):
        workers = worker_count(space, capacity)
        jobs = [Job(ticket.id, path)]
        try:
            retrain(space, jobs, ray.put(dataset), sweep.path, workers, tell)
        except Exception as error:
            raise SweepFailed(_last_line(str(error) or repr(error))) from error
    return select(sweep.events(), "retrained")[-1]


def _last_line(error: str) -> str:
    # What Ray brings from a worker is a traceback, and its last line says what happened.
    return error.strip().splitlines()[-1]


@contextlib.contextmanager
def _running(
    space: SearchSpace, folder: Path, tracking_uri: str | None, observer: Observer
) -> Iterator[tuple[int, int, Callable[[Event], None]]]:
    """Ray and MLflow: room for trials, room for retraining workers, and how to tell of events."""
    with ThreadPoolExecutor(1) as pool:
        # MLflow takes seconds to import, and Ray as long to start.
        tracker = pool.submit(_open_tracker, folder, tracking_uri)
        with _cluster(space) as room, _told(folder, tracker.result(), observer) as tell:
            yield *room, tell


def _open_tracker(folder: Path, uri: str | None) -> "Tracker":
    from raytickets.tracking import Tracker, prepare_store, resolve_uri

    uri = resolve_uri(uri)
    prepare_store(uri)
    return Tracker(uri, folder)


@contextlib.contextmanager
def _cluster(space: SearchSpace) -> Iterator[tuple[int, int]]:
    """Ray, if it does not run yet: how many trials and how many retraining workers fit on it."""
    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")
        try:
            if address and (place := urlsplit(f"//{address.removeprefix('ray://')}")).port:
                # Ray itself waits for minutes for a head node that is not there.
                socket.create_connection((place.hostname, place.port), timeout=5).close()
            ray.init(
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if address else False,
            )
        except OSError as error:
            raise InputError("RAY_ADDRESS", address, f"no Ray cluster answers ({error})") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        asked = {"CPU": space.resources.cpus_per_trial, "GPU": space.resources.gpus_per_trial}
        for kind, amount in asked.items():
            most = max(node.get(kind, 0) for node in nodes)
            if amount > most:
                field = f"resources.{kind.lower()}s_per_trial"
                raise InputError(field, amount, f"no machine of the cluster has over {most:g}")
        slots = sum(
            min(int(node.get(kind, 0) / amount) for kind, amount in asked.items() if amount)
            for node in nodes
        )
        kind = "GPU" if space.resources.gpus_per_trial else "CPU"
        yield slots, int(sum(node.get(kind, 0) for node in nodes))
    finally:
        if started:
            ray.shutdown()


@contextlib.contextmanager
def _told(
    folder: Path, tracker: "Tracker", observer: Observer
) -> Iterator[Callable[[Event], None]]:
    """Tells an event to the journal, then to MLflow and the observer."""
    journal = Journal(folder)

    def tell(event: Event) -> None:
        journal.append(event)
        pass_on(event)

    def pass_on(event: Event) -> None:
        tracker.write(event)
        observer(event)

    for event in Sweep(folder).events():  # of what goes on
        pass_on(event)

    try:
        yield tell
    finally:
        journal.close()
        owed = tracker.close()
    if owed:
        raise SweepFailed(owed)


def _retrain_winners(
    space: SearchSpace,
    sweep: Sweep,
    data: "ray.ObjectRef[DataSet]",
    workers: int,
    tell: Callable[[Event], None],
) -> None:
    """Choose the winners, then retrain them and the dense reference, but for those that are."""
    events = sweep.events()
    winners = choose_winners(space, events)
    chosen: dict[str, Any] = {"event": "winners", "tickets": [event["ticket"] for event in winners]}
    if chosen not in events:
        tell(chosen)
    jobs = [Job(DENSE, None)] if winners else []
    jobs += [Job(event["ticket"], sweep.path / event["path"]) for event in winners]
    done = {event["run"] for event in select(events, "retrained")}
    if jobs := [job for job in jobs if job.run not in done]:
        retrain(space, jobs, data, sweep.path, workers, tell)
