"""Jobs of a sweep or comparison on Ray Tune: handed out, handed out again when a worker is lost.

A job is a Tune trial, and its worker goes on to the next job in place, unless its machine was given
notice. What a trial itself raises fails its job at once; one that ran out of memory is tried once
more with nothing beside it. Where nothing can be kept, as on a full disk, all ends.
"""

import contextlib
import errno
import logging
import os
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray._private import state as ray_state
from ray.air.execution._internal import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from raytickets.journal import Event
from raytickets.plan import deadline_s
from raytickets.room import LOOK_S, Room, Waiting, leaving
from raytickets.sweep import Sweep
from raytickets.trajectory import ending

RETRIES = 3
"""How often a job is handed out again whose worker was lost; machines taken at the end of their
notice are not counted, as they say nothing about the job."""


@dataclass(frozen=True)
class Job:
    """A trajectory, a source, a proof or a retraining."""

    kind: str
    """`trajectory` or `run`: the field of a `retry` event that names it."""
    id: str
    """Of the trajectory, source or ticket."""
    config: dict[str, Any]
    """For `raytickets.trial.Trial`."""


class Work:
    """What there is to do, and what was heard of it; a sweep and a comparison say what."""

    keeps_workers = False
    """Whether more jobs may come once there are none to hand out."""

    def __init__(self, sweep: Sweep, tell: Callable[[Event], None]):
        self._pass_on = tell
        self._last: dict[str, Event] = {}
        self._drawn: dict[str, set[float]] = {}
        for event in sweep.events():
            self._note(event)

    @property
    def ready(self) -> bool:
        """Whether there is a job to hand out now."""
        raise NotImplementedError

    def next(self) -> Job:
        """The job to hand out now."""
        raise NotImplementedError

    def heard(self, event: Event) -> None:
        """An event was told, maybe not for the first time: what goes on yields its old ones."""
        raise NotImplementedError

    def complete(self, job: Job) -> None:
        """A job's trial has ended by itself, or halving ended it."""

    def fail(self, job: Job, reason: str) -> None:
        """A job has failed for good."""
        raise NotImplementedError

    def tell(self, event: Event) -> None:
        self._pass_on(event)
        self._note(event)
        self.heard(event)

    def ending(
        self, trajectory: Any, method: str, ratios: Collection[float], state: str, reason: str
    ) -> Event:
        """The `trajectory` event of a point or source that did not come to it itself."""
        last = self._last.get(trajectory.id, {"epoch": 0, "train_macs": 0, "seconds": 0.0})
        drawn = self._drawn.get(trajectory.id, set())
        states = {ratio: "drawn" if ratio in drawn else state for ratio in ratios}
        used = last["epoch"], last["train_macs"], last["seconds"]
        return ending(trajectory, method, state, states, *used, reason)

    def _note(self, event: Event) -> None:
        match event["event"]:
            case "check":
                last = self._last.get(event["trajectory"], event)
                if event["check"] >= last["check"]:
                    self._last[event["trajectory"]] = event
            case "ticket":
                self._drawn.setdefault(event["trajectory"], set()).add(event["prune_ratio"])
            case "retry" if event.get("anew"):
                self._last.pop(event.get("trajectory", ""), None)
                self._drawn.pop(event.get("trajectory", ""), None)


def run_crew(
    name: str,
    trainable: Any,
    work: Work,
    sweep: Sweep,
    room: Room,
    scheduler: TrialScheduler | None = None,
) -> None:
    """Do all the work, on as many workers as the room has or can get.

    Raises NoRoom if for `RAYTICKETS_DEADLINE_S` seconds no job ran and no machine had room.
    """
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # The events tell of failures.
    RayActorManager._actor_task_failed = _tell_of_any_error
    TuneController._maybe_cache_trial_actor = _keep_what_stays
    # Else Tune runs a trial again by itself, untold of, that lost a machine given notice.
    os.environ["RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE"] = "1"
    crew = _Crew(work, room)
    heard = _Heard(crew)
    tune.Tuner(
        tune.with_resources(trainable, {"cpu": room.cpus, "gpu": room.gpus}),
        tune_config=tune.TuneConfig(
            search_alg=_Asked(crew),
            scheduler=scheduler,
            num_samples=-1,
            # Trials that wait for a worker are what an autoscaler sees.
            max_concurrent_trials=room.most,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"{name}-{time.time_ns()}",
            storage_path=str(sweep.path / "ray"),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[heard],
            stop=_Ended(crew),
            verbose=0,
        ),
    ).fit()
    heard.fail()


class _Crew:
    """Which jobs are running, which are to run again, and which workers wait for one.

    On a cluster of fixed size a worker without a job waits for one, since a new worker takes
    seconds to start; one that can grow gets its workers back.
    """

    def __init__(self, work: Work, room: Room):
        self.work = work
        self._running: dict[str, Job] = {}
        self._unbegun: set[str] = set()
        self._again: list[Job] = []
        self._alone: list[Job] = []
        self._solo: str | None = None
        """The trial that nothing is to run beside."""
        self._attempts: Counter[tuple[str, str]] = Counter()
        self._counted: Counter[tuple[str, str]] = Counter()
        """Those attempts that `RETRIES` limits."""
        self._free = 0
        self._keeps = work.keeps_workers and room.most == room.slots
        # Every result takes the driver some milliseconds.
        self._pause = max(0.2, room.slots / 50)
        self._no_room = Waiting(room.needed, deadline_s())
        self._looked = float("-inf")

    @property
    def over(self) -> bool:
        return not self._running and not self._waiting

    @property
    def wanted(self) -> bool:
        """Whether there is a job for a worker that waits."""
        return bool(self._unbegun) or (self._waiting and not self._solo)

    @property
    def _waiting(self) -> bool:
        return bool(self._again or self._alone) or self.work.ready

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The config of the next trial; None if there is none now."""
        job = self._next(trial_id)
        if job:
            self._running[trial_id] = job
            self._unbegun.add(trial_id)
        elif self.over or not self._keeps or not self._free or self._alone or self._solo:
            return None
        self._free = max(0, self._free - 1)
        return job.config if job else {"wait": self._pause}

    def _next(self, trial_id: str) -> Job | None:
        if self._solo:
            return None
        if self._again:
            return self._again.pop(0)
        if self.work.ready:
            return self.work.next()
        if self._alone and not self._running:
            self._solo = trial_id
            return self._alone.pop(0)
        return None

    def begun(self, trial_id: str) -> None:
        self._unbegun.discard(trial_id)
        self._no_room.end()

    def look(self) -> None:
        """Look for machines if none does a job, at most once a second; NoRoom by the deadline."""
        if self.over or self._running.keys() - self._unbegun:
            return
        if (now := time.monotonic()) - self._looked >= LOOK_S:
            self._looked = now
            self._no_room.look()

    def complete(self, trial_id: str, stays: bool = True) -> None:
        """A trial has ended without an error; its worker is free if it `stays`."""
        self._free += stays
        if job := self._end(trial_id):
            self.work.complete(job)

    def lost(self, trial_id: str, kind: str, reason: str) -> None:
        """A trial has ended for this reason, of a kind as `why` tells it."""
        alone = trial_id == self._solo
        job = self._end(trial_id)
        if job is None:
            return
        if kind == "storage":  # Nothing is told: what goes on does so from the last checkpoint.
            raise OSError(reason.partition(": ")[2])
        key = job.kind, job.id
        self._attempts[key] += 1
        self._counted[key] += kind != "taken"
        if kind == "raised" or (alone and kind == "memory") or self._counted[key] > RETRIES:
            self.work.fail(job, reason)
            return
        (self._alone if alone or kind == "memory" else self._again).append(job)
        retry = {"event": "retry", job.kind: job.id, "attempt": self._attempts[key]}
        self.work.tell(retry | {"reason": reason})

    def _end(self, trial_id: str) -> Job | None:
        self._unbegun.discard(trial_id)
        if trial_id == self._solo:
            self._solo = None
        return self._running.pop(trial_id, None)


class _OfCrew:
    def __init__(self, crew: _Crew):
        super().__init__()
        self._crew = crew

    def __getstate__(self) -> dict:
        return {}  # Tune keeps a pickle to restore from, which is not done here.


class _Asked(_OfCrew, Searcher):
    """What Tune asks for trials."""

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        config = self._crew.suggest(trial_id)
        if config is None and self._crew.over:
            return Searcher.FINISHED  # pyright: ignore[reportReturnType]
        return config  # None is for Tune to ask again later.

    def on_trial_complete(self, trial_id, result=None, error=False) -> None:
        """Nothing: `_Heard` hears of it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is what a sweep goes on from, not Tune's snapshots."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


class _Heard(_OfCrew, tune.Callback):
    """What Tune tells of trials, and that its loop goes round."""

    def __init__(self, crew: _Crew):
        super().__init__(crew)
        self._error: Exception | None = None

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._error = error
            raise

    def fail(self) -> None:
        """Raise what went wrong when a trial ended: Tune may take it for the trial's own."""
        if self._error:
            raise self._error

    def on_step_begin(self, iteration, trials, **info) -> None:  # noqa: ARG002
        self.fail()
        self._crew.look()

    def on_trial_start(self, iteration, trials, trial, **info) -> None:  # noqa: ARG002
        self._crew.begun(trial.trial_id)

    def on_trial_result(self, iteration, trials, trial, result, **info) -> None:  # noqa: ARG002
        for event in result.pop("events"):
            self._crew.work.tell(event)

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:  # noqa: ARG002
        with self._failing():
            self._crew.complete(trial.trial_id, stays=not _leaves(trial))
        _forget(trial)

    def on_trial_error(self, iteration, trials, trial, **info) -> None:  # noqa: ARG002
        with self._failing():
            self._crew.lost(trial.trial_id, *why(trial))
        _forget(trial)


def _forget(trial: TuneTrial) -> None:
    """What a trial reported, and statistics of it, which Tune keeps for as long as it runs."""
    trial.run_metadata.last_result = {}
    trial.run_metadata.metric_analysis = {}
    trial.run_metadata.metric_n_steps = {}


class _Ended(_OfCrew, tune.Stopper):
    """Ends a trial that only waits when there is a job for its worker, and all when all is done."""

    def __call__(self, trial_id: str, result: dict) -> bool:  # noqa: ARG002
        return "wait" in result["config"] and self._crew.wanted

    def stop_all(self) -> bool:
        return self._crew.over


def why(trial: TuneTrial) -> tuple[str, str]:
    """Why a trial has failed, and in one line.

    `lost`, if its worker died; `taken`, if its machine did at the end of its notice; `storage`, if
    what it found could not be kept; `memory` or `raised`.
    """
    # Tune has the error in these files before its own methods find it.
    text = Path(str(trial.error_file)).read_text(encoding="utf-8").strip()
    pickled = trial.pickled_error_file
    error = cloudpickle.loads(Path(pickled).read_bytes()) if pickled else None
    if isinstance(error, RayTaskError):
        cause: BaseException = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        reason = "".join(traceback.format_exception_only(cause)).split("\n")[0]
        if isinstance(cause, OSError) and cause.errno in _STORAGE:
            return "storage", reason
        raised = True
    else:
        reason, raised = text.split("\n")[-1], getattr(error, "actor_init_failed", False)
    if raised:
        return ("memory" if _NO_MEMORY.search(reason) else "raised"), reason
    if found := re.search(r".*running low on memory[^\n]*", text):
        return "memory", f"its worker was killed: {found[0]}"
    if getattr(error, "preempted", False):
        return "taken", "its machine was given notice, and taken at its end"
    # What follows lists causes that are common.
    detail = reason.split("Worker exit detail: ")[-1].split(" Some common causes")[0]
    return "lost", f"its worker was lost: {detail.strip()}"


_STORAGE = {None, *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)}
"""Numbers of errors; a store at an address has none."""

_NO_MEMORY = re.compile(r"^(\S*\b_Array)?MemoryError\b|can't allocate memory")
"""An exception of Python, NumPy or PyTorch, the latter on a processor; that of a GPU is no such."""

_tell_of_error = RayActorManager._actor_task_failed


def _tell_of_any_error(self: RayActorManager, tracked_actor_task: Any, exception: Exception):
    """Tune gives up on an error of Ray of neither kind, as when a worker is killed for memory."""
    if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
        exception = RayActorError(error_msg=str(exception))
    _tell_of_error(self, tracked_actor_task, exception)


def _leaves(trial: TuneTrial) -> bool:
    """Whether the machine of a trial's worker was given notice."""
    noticed, worker = leaving(), trial.temporary_state.ray_actor
    if not noticed or worker is None:
        return False
    return ray_state.actors(worker._actor_id.hex())["Address"]["NodeID"] in noticed


_keep = TuneController._maybe_cache_trial_actor


def _keep_what_stays(self: TuneController, trial: TuneTrial) -> bool:
    """Tune would hand the next job to a worker whose machine is about to be taken away."""
    return not _leaves(trial) and _keep(self, trial)
