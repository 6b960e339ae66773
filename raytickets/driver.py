"""The driver of sweeps and comparisons: checks the input, runs every stage on Ray, and tells."""

import contextlib
import logging
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Under `uv run` Ray would build a new environment for every worker; a sweep's workers are to run
# in the one that the driver has. In place of Tune's own files, snapshots, boxes and Ctrl-C
# handler there are the journal, the observer and KeyboardInterrupt. Ray Train's workers wait at
# every report for their controller to look at them, which it does every 2 s.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "inf")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")

import ray

from raytickets import storage as places
from raytickets import study
from raytickets.comparison import source_count
from raytickets.config import InputError, SearchSpace
from raytickets.contest import run_contest
from raytickets.data import DataSet, load_data
from raytickets.halving import choose_winners
from raytickets.journal import Event, Journal, mend_journal
from raytickets.lease import Held, Lease, hold
from raytickets.plan import Plan, opened, ray_address
from raytickets.retrain import DENSE, Job, retrain, worker_count
from raytickets.room import NoRoom, Room, connected, workers_now
from raytickets.sweep import Sweep, own_retrainings, select
from raytickets.ticket import has_lost, load_ticket
from raytickets.tuner import run_search

if TYPE_CHECKING:
    from raytickets.tracking import Tracker

Observer = Callable[[Event], None]

PATIENCE_S, INTERRUPTED_S = 30.0, 2.0
"""How long MLflow is waited for at the end, and by what was interrupted."""
LAST_S = 5.0
"""How long a process that was interrupted may take to end."""

log = logging.getLogger("raytickets")


class SweepFailed(RuntimeError):
    """A stage failed, or MLflow is owed events; what was found before is on disk."""


def _unheard(event: Event) -> None:
    pass


def search(
    space: SearchSpace,
    *,
    name: str | None = None,
    storage: str | Path = "sweeps",
    tracking_uri: str | None = None,
    observer: Observer = _unheard,
    address: str | None = None,
    new: bool = False,
) -> Sweep:
    """Run a sweep: trajectories, tickets, proofs, winners, retraining, MLflow.

    The sweep's folder is `storage/name`, which may be at an address as s3://bucket/sweeps; without
    a name it is called after the space and the time. The same name goes on with a sweep that was
    cut off: what it had finished is not done again. With `new` it starts anew, and what was there
    is kept under another name. `observer` hears every event of `raytickets.journal` once it is on
    disk. Ray is the cluster at `address`, else at RAY_ADDRESS, else this machine. Raises InputError
    on input that cannot be used, before Ray starts where that can be known, Held if another process
    runs this sweep, and SweepFailed if a stage failed, no machine with room for a trial came, or
    MLflow has not got everything by the end, which `Sweep` then has all the same.
    """
    with opened(space, name=name, storage=storage, new=new) as plan:
        return run(plan, tracking_uri, observer, address=address)


def compare(
    space: SearchSpace,
    *,
    name: str | None = None,
    storage: str | Path = "sweeps",
    tracking_uri: str | None = None,
    observer: Observer = _unheard,
    address: str | None = None,
    new: bool = False,
) -> Sweep:
    """Run a comparison: every method of `space.comparison` at every prune ratio and seed.

    What the arguments are, and what is raised, is as for `search`; the report of what comes back is
    that of `raytickets.comparison`. A source of tickets that fails, or a retraining, leaves the
    rest alone: SweepFailed comes at the end and names it. What cannot be kept ends all.
    """
    with opened(space, name=name, storage=storage, kind="comparison", new=new) as plan:
        return run(plan, tracking_uri, observer, address=address)


def run(
    plan: Plan,
    tracking_uri: str | None = None,
    observer: Observer = _unheard,
    *,
    address: str | None = None,
) -> Sweep:
    """Run a sweep or comparison whose plan is `opened`; the rest of `search` and `compare`.

    The journal of one that is interrupted says so before KeyboardInterrupt goes on. Raises Lost if
    another process may have taken the lease: then nothing more is written.
    """
    space, sweep, lease = plan.space, Sweep(plan.folder), plan.lease
    assert lease is not None
    compared = plan.opening["event"] == "comparison"
    wanted = source_count(plan.opening) if compared else None
    cluster, cause, reason = connected(space, address, wanted), None, ""
    try:
        running = _running(cluster, plan.folder, lease, tracking_uri, observer, address)
        with running as (room, told):
            if not compared:  # A comparison retrains each ticket in one process.
                worker_count(space, room.workers, grows=room.most > room.slots)
            tell = told if compared or not space.optuna else _with_study(plan, lease, told)
            if plan.opening not in sweep.events():
                tell(plan.opening)  # If this fails nothing else is to be the journal's first event.
            try:
                data = ray.put(plan.dataset)
                if compared:
                    run_contest(space, sweep, data, room, tell)
                else:
                    run_search(space, sweep, data, room, tell)
                    _retrain_winners(space, sweep, data, room, tell)
            except Held:
                raise
            except KeyboardInterrupt:
                tell({"event": "end", "state": "interrupted", "reason": ""})
                raise
            except Exception as error:
                cause = error
            reasons = [f"{event['trajectory']}: {event['reason']}" for event in sweep.failures()]
            reasons += [_last_line(str(cause) or repr(cause))] if cause else []
            reason = _advised("; ".join(reasons), plan.folder)
            tell({"event": "end", "state": "failed" if reason else "done", "reason": reason})
    except SweepFailed as owed:
        if reason:
            raise SweepFailed(f"{_failure(reason, cause)}; {owed}") from cause
        raise
    if reason:
        raise SweepFailed(_failure(reason, cause)) from cause
    return sweep


def retrain_ticket(
    path: str | Path,
    *,
    epochs: int | None = None,
    weights: str | None = None,
    tracking_uri: str | None = None,
    observer: Observer = _unheard,
    address: str | None = None,
) -> Event:
    """Retrain one ticket of a sweep with the sweep's recipe; its `retrained` event.

    `path` is the ticket's folder or its address. `epochs` and `weights` (`inherit` or `reinit`)
    replace the recipe's own. The result goes to the sweep's journal and the ticket's MLflow run, in
    the store that the sweep was recorded in unless there is a `tracking_uri`.
    Raises InputError, DamagedTicket, Held if another process writes in the sweep, or SweepFailed.
    """
    path = places.local(path)
    ticket = load_ticket(path, trust_code=True)
    sweep = Sweep(path.parent.parent).fetched()
    space = sweep.space()
    if ticket.id not in {event["ticket"] for event in select(sweep.events(), "ticket")}:
        raise InputError("ticket", str(path), "must be one of the tickets of a sweep")
    recipe = {"epochs": epochs, "weights": weights}
    recipe = {name: value for name, value in recipe.items() if value is not None}
    space = space.with_retraining(**recipe)
    dataset = load_data(space.data)
    if dataset.fingerprint != sweep.opening()["data"]["fingerprint"]:
        allowed = "its images, or data.loading, are not those that the sweep began with"
        raise InputError("data.path", space.data.path, allowed)
    with (
        hold(sweep.path) as lease,
        _running(
            connected(space, address, wanted=1),
            sweep.path,
            lease,
            tracking_uri,
            observer,
            address,
            recorded=True,
        ) as (room, tell),
    ):
        workers = worker_count(space, room.workers)
        jobs, data = [Job(ticket.id, path)], ray.put(dataset)
        stopped = {"event": "stopped", "run": ticket.id}
        try:
            retrain(space, jobs, data, sweep.path, workers, tell, use_gpu=room.gpus > 0)
        except Held:
            raise
        except KeyboardInterrupt:
            tell(stopped | {"reason": "interrupted"})
            raise
        except Exception as error:
            reason = _advised(_last_line(str(error) or repr(error)), sweep.path)
            tell(stopped | {"reason": reason})
            raise SweepFailed(f"retraining failed: {reason}") from error
    return select(sweep.events(), "retrained")[-1]


@contextlib.contextmanager
def interruptible(line: str) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP are KeyboardInterrupt, and a second one does nothing.

    But a second SIGTERM may end the process while Ray shuts down, which takes any handler away.

    A process that has not ended `LAST_S` later is ended, with exit code 130; with `line` printed if
    it did not come to the end of this.
    """
    interrupted, ended = threading.Event(), threading.Event()

    def interrupt(number: int, _: object) -> None:
        # A second one is not to cut off what the first one made begin to end.
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        if number == signal.SIGHUP:
            _leave_terminal()
        interrupted.set()
        timer = threading.Timer(LAST_S, end)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    def end() -> None:
        if not ended.is_set():
            os.write(1, f"{line}\n".encode())  # What writes to it may hang.
        os._exit(130)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    except SystemExit:  # So Ray answers SIGTERM while it starts.
        raise KeyboardInterrupt from None
    finally:
        ended.set()
        if not interrupted.is_set():
            for number, handler in before.items():
                signal.signal(number, handler)


def _leave_terminal() -> None:
    """Whatever writes to a terminal that is gone raises an OSError."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with contextlib.suppress(OSError):  # It may be closed.
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)


def _failure(reason: str, cause: Exception | None) -> str:
    return reason if isinstance(cause, NoRoom) else f"a stage failed: {reason}"


def _last_line(error: str) -> str:
    # What Ray brings from a worker is a traceback, and its last line says what happened.
    return error.strip().splitlines()[-1]


_FULL = ("No space left", "disk is full", "quota exceeded", "File too large", "Read-only file")
"""What the system and SQLite call a disk that takes no more."""


def _advised(reason: str, folder: Path) -> str:
    """The reason, with what to do about a disk that is full."""
    if not any(words in reason for words in _FULL):
        return reason
    return f"{reason}; make space to write in {folder}, and the same command goes on"


@contextlib.contextmanager
def _running(
    cluster: contextlib.AbstractContextManager[Room],
    folder: Path,
    lease: Lease,
    tracking_uri: str | None,
    observer: Observer,
    address: str | None,
    recorded: bool = False,
) -> Iterator[tuple[Room, Callable[[Event], None]]]:
    """Ray and MLflow: what there is room for, and how to tell of events.

    Without a `tracking_uri`, `recorded` is the store that the sweep was recorded in.
    """
    with ThreadPoolExecutor(1) as pool:
        # MLflow takes seconds to import, and Ray as long to start.
        tracker = pool.submit(_open_tracker, folder, tracking_uri, recorded)
        if not ray.is_initialized() and ray_address(address)[1] != "local":
            tracker.result()  # A store that is refused is to cost no machine.
        on_term = signal.getsignal(signal.SIGTERM)
        with contextlib.ExitStack() as stack:
            try:
                room = stack.enter_context(cluster)
            except NoRoom as error:
                raise SweepFailed(str(error)) from error
            tell = stack.enter_context(_told(folder, lease, tracker.result(), observer))
            # Ray puts its own in place, which ends the process without a word to the journal.
            if callable(on_term) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_term)
            yield room, tell


def _open_tracker(folder: Path, uri: str | None, recorded: bool) -> "Tracker":
    from raytickets.tracking import Tracker, prepare_store, recorded_uri, resolve_uri

    uri = resolve_uri(uri or (recorded_uri(folder) if recorded else None))
    if warning := prepare_store(uri):
        log.warning(warning)
    return Tracker(uri, folder)


@contextlib.contextmanager
def _told(
    folder: Path, lease: Lease, tracker: "Tracker", observer: Observer
) -> Iterator[Callable[[Event], None]]:
    """Tells an event to the journal, then to MLflow and the observer, once."""
    if mended := mend_journal(folder):
        log.warning(mended)
    journal = Journal(folder, lease.confirm)
    history = Sweep(folder).events()

    def tell(event: Event) -> None:
        lease.confirm()
        if journal.append(event):
            pass_on(event)

    def pass_on(event: Event) -> None:
        tracker.write(event)
        observer(event)

    for event in history:  # of what goes on
        pass_on(event)

    patience_s = PATIENCE_S
    try:
        try:
            yield tell
        except Held:
            patience_s = 0
            raise
        except KeyboardInterrupt:
            patience_s = INTERRUPTED_S
            raise
        finally:
            try:
                owed = tracker.close(patience_s)
            finally:
                journal.close()
    except OSError as error:
        raise SweepFailed(_advised(str(error), folder)) from error
    if owed:
        raise SweepFailed(owed)


def _with_study(plan: Plan, lease: Lease, tell: Callable[[Event], None]) -> Callable[[Event], None]:
    """Uploads the study's file as well, where the sweep is kept at an address.

    A trial is there before the journal tells of it, and what it came to afterwards.
    """
    file = places.fetch_database(study.file_of(plan.folder, plan.opening))
    there: set[str] = set()

    def told(event: Event) -> None:
        trial = event.get("trajectory")
        if trial and trial not in there and file.exists():
            lease.confirm()
            places.keep_database(file)
            there.add(trial)
        tell(event)
        if event["event"] in ("trajectory", "end") and file.exists():
            places.keep_database(file)

    return told


def _retrain_winners(
    space: SearchSpace,
    sweep: Sweep,
    data: "ray.ObjectRef[DataSet]",
    room: Room,
    tell: Callable[[Event], None],
) -> None:
    """Choose the winners, then retrain them and the dense reference, but for those that are."""
    events = sweep.events()
    winners = choose_winners(space, events)
    chosen: dict[str, Any] = {"event": "winners", "tickets": [event["ticket"] for event in winners]}
    jobs = [Job(DENSE, None)] if winners else []
    jobs += [Job(event["ticket"], sweep.path / event["path"]) for event in winners]
    done = {
        run
        for run, event in own_retrainings(events[0], events).items()
        if not has_lost(sweep.path, [event])
    }
    jobs = [job for job in jobs if job.run not in done]
    # Also says of one that goes on with these alone that it runs.
    if jobs or chosen != (select(events, "winners") or [None])[-1]:
        tell(chosen)
    if jobs:
        # Machines may have come and gone since the sweep began.
        workers = worker_count(space, workers_now(room.gpus), grows=room.most > room.slots)
        retrain(space, jobs, data, sweep.path, workers, tell, use_gpu=room.gpus > 0)
