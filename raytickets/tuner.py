"""The search on Ray Tune: trajectories, then further proofs of tickets on the same workers."""

import contextlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from raytickets import storage, study
from raytickets.config import SearchSpace
from raytickets.crew import Job, Work, run_crew
from raytickets.data import DataSet
from raytickets.halving import drawn, next_proofs
from raytickets.journal import Event
from raytickets.room import Room
from raytickets.sweep import Sweep, select
from raytickets.ticket import is_whole
from raytickets.trajectory import Point, grid
from raytickets.trial import Trial


def run_search(
    space: SearchSpace,
    sweep: Sweep,
    data: "ray.ObjectRef[DataSet]",
    room: Room,
    tell: Callable[[Event], None],
) -> None:
    """Run every trajectory and proof that has not ended yet.

    One whose worker is lost runs again, and goes on from its checkpoint. A trajectory that fails
    is told of and leaves the rest alone. Raises RuntimeError if a proof fails, if something is left
    undone or what was found cannot be kept, and InputError if the study cannot be opened.
    """
    work = (_Proposed if space.optuna else _Search)(space, sweep, tell)
    if not work.ready:
        return
    given = {"space": space, "dataset": data, "sweep": sweep.path}
    trial = tune.with_parameters(Trial, **given, cpus=room.cpus, gpus=room.gpus)
    scheduler = _Halving(space, sweep) if space.halving else None
    try:
        run_crew("search", trial, work, sweep, room, scheduler)
    finally:
        # What goes on does it; a Ctrl-C is not to become what an unreachable study raises.
        with contextlib.suppress(Exception):
            work.close()
    if work.failed_proofs:
        raise RuntimeError("; ".join(work.failed_proofs))
    if left := work.left:
        raise RuntimeError(f"Ray Tune stopped before {left} trajectories and proofs had ended")


def _grid_left(space: SearchSpace, sweep: Sweep) -> list[Point]:
    """Points of the grid but for those that need not run again."""
    events = sweep.events()
    last = {event["trajectory"]: event["state"] for event in select(events, "trajectory")}
    ended = {name for name, state in last.items() if state != "failed"} - _damaged(sweep, events)
    return [point for point in grid(space) if point.id not in ended]


def _damaged(sweep: Sweep, events: list[Event]) -> set[str]:
    """Trajectories whose tickets are not whole."""
    return {e["trajectory"] for e in drawn(events) if not is_whole(sweep.path / e["path"])}


class _Halving(ASHAScheduler):
    """Knows a trajectory by its own id, so that it is judged once for every number of epochs.

    What it tells again when it goes on is not judged again, on another worker or after the sweep
    was cut off. A result without an accuracy is not judged: within an epoch, about to draw, or a
    proof.
    """

    def __init__(self, space: SearchSpace, sweep: Sweep):
        assert space.halving is not None
        super().__init__(
            time_attr="epoch",
            metric="accuracy",
            mode="max",
            max_t=space.most_epochs,
            grace_period=space.halving.grace,
            reduction_factor=space.halving.reduction,
            stop_last_trials=False,
        )
        self._stopped: dict[str, float] = {}
        """The epochs at which trajectories were stopped before: they are again, by the same."""
        for event in select(sweep.events(), "check"):
            if event["validation_accuracy"] is not None and not event["about_to_draw"]:
                before: Any = SimpleNamespace(trial_id=event["trajectory"])
                result = {"epoch": event["epoch"], "accuracy": event["validation_accuracy"]}
                super().on_trial_add(None, before)  # pyright: ignore[reportArgumentType]
                if super().on_trial_result(None, before, result) == self.STOP:  # pyright: ignore
                    self._stopped.setdefault(event["trajectory"], event["epoch"])

    def on_trial_add(self, tune_controller, trial) -> None:
        super().on_trial_add(tune_controller, _known(trial))

    def on_trial_result(self, tune_controller, trial, result) -> str:
        action = super().on_trial_result(tune_controller, _known(trial), result)
        stopped = self._stopped.get(_known(trial).trial_id, math.inf)
        return self.STOP if result.get("epoch", 0) >= stopped else action

    def on_trial_complete(self, tune_controller, trial, result) -> None:
        super().on_trial_complete(tune_controller, _known(trial), result)

    def on_trial_remove(self, tune_controller, trial) -> None:
        super().on_trial_remove(tune_controller, _known(trial))


def _known(trial: Any) -> Any:
    if "point" not in trial.config:
        return trial
    return SimpleNamespace(trial_id=Point(**trial.config["point"]).id)


class _Search(Work):
    """Hands out trajectories, and once all of them have ended one rung of proofs after another."""

    def __init__(self, space: SearchSpace, sweep: Sweep, tell: Callable[[Event], None]):
        super().__init__(sweep, tell)
        self._space, self._sweep = space, sweep
        self.keeps_workers = space.proof.rungs > 1
        self.failed_proofs: list[str] = []
        self._running: dict[str, Point] = {}
        self._proofs: list[Job] = []
        self._unproved: set[str] = set()
        self._points = self._to_run()
        self._prove()

    def _to_run(self) -> list[Point]:
        return _grid_left(self._space, self._sweep)

    @property
    def ready(self) -> bool:
        return bool(self._points or self._proofs)

    @property
    def left(self) -> int:
        """Trajectories, or proofs of this rung, that have not ended."""
        return len(self._points) + len(self._running) + len(self._unproved)

    def next(self) -> Job:
        if self._points:
            return self._begin(self._points.pop(0))
        return self._proofs.pop(0)

    def _begin(self, point: Point) -> Job:
        self._running[point.id] = point
        return Job("trajectory", point.id, {"point": vars(point)})

    def heard(self, event: Event) -> None:
        match event["event"]:
            case "trajectory" if event["trajectory"] in self._running:
                self._settle(self._running.pop(event["trajectory"]), event)
                self._prove()
            case "proof" if event["ticket"] in self._unproved:
                self._unproved.discard(event["ticket"])
                self._prove()

    def _settle(self, point: Point, ending: Event) -> None:
        """Nothing: a grid has no study."""

    def close(self) -> None:
        """Nothing: a grid has no study."""

    def _prove(self) -> None:
        """Hand out the next rung once all that is to come before it has ended."""
        if self.left or self.failed_proofs:
            return
        rung, tickets = next_proofs(self._space, self._sweep.events())
        self._unproved = {ticket["ticket"] for ticket in tickets}
        self._proofs = [
            Job("run", ticket["ticket"], {"proof": ticket["path"], "rung": rung})
            for ticket in tickets
        ]

    def complete(self, job: Job) -> None:
        if point := self._running.get(job.id):
            self._end(point, "hopeless", "others were more accurate by then")
            # What may be left there only takes space.
            with contextlib.suppress(OSError):
                storage.remove(self._sweep.path / "checkpoints" / point.id)

    def fail(self, job: Job, reason: str) -> None:
        if point := self._running.get(job.id):
            self._end(point, "failed", reason)
        else:
            self._unproved.discard(job.id)
            self.failed_proofs.append(f"a proof failed: {reason}")

    def _end(self, point: Point, state: str, reason: str) -> None:
        ratios = self._space.prune_ratios
        self.tell(self.ending(point, "early_bird", ratios, state, reason))


class _Proposed(_Search):
    """Hands out what Optuna proposes, and tells it once what each trajectory came to.

    Of a sweep that goes on, trajectories that ended count, and those that have a checkpoint go on
    at their own points. Any other that was cut off is told of as failed, and another is proposed
    in its place, as for all that failed. One whose tickets were damaged runs again.
    """

    def _to_run(self) -> list[Point]:
        space, sweep = self._space, self._sweep
        events = sweep.events()
        self._opening = events[0]
        self._study = study.open_study(
            space,
            study.open_storage(space, sweep.path),
            study.study_name(space, self._opening["data"]["fingerprint"]),
        )
        self._checkpoints = sweep.path / "checkpoints"
        self._tickets: dict[str, list[Event]] = {}
        study.settle(self._study, space, events, self._checkpoints)
        going_on = study.going_on(self._study, space, events, self._checkpoints)
        for point in study.cut_off(self._study, space, events, going_on):
            self._end(point, "failed", "it was cut off")
        ends = {e["trajectory"]: e for e in select(sweep.events(), "trajectory")}
        damaged = _damaged(sweep, events)
        again = [study.point(event) for name, event in ends.items() if name in damaged]
        whole = [event for name, event in ends.items() if name not in damaged]
        done = sum(event["state"] != "failed" for event in whole)
        asked = study.settings(space).trajectories
        self._proposals = max(0, asked - done - len(again) - len(going_on))
        return going_on + again

    @property
    def ready(self) -> bool:
        return super().ready or bool(self._proposals)

    @property
    def left(self) -> int:
        return super().left + self._proposals

    def next(self) -> Job:
        if self._points or not self._proposals:
            return super().next()
        self._proposals -= 1
        return self._begin(study.ask(self._study, self._space))

    def heard(self, event: Event) -> None:
        if event["event"] == "ticket":
            self._tickets.setdefault(event["trajectory"], []).append(event)
        elif event["event"] == "retry" and event.get("anew"):
            self._tickets.pop(event["trajectory"], None)
        super().heard(event)

    def _settle(self, point: Point, ending: Event) -> None:
        events = [self._opening, *self._tickets.pop(point.id, []), ending]
        assert point.number is not None
        study.settle(self._study, self._space, events, self._checkpoints, {point.number})

    def close(self) -> None:
        """Leave no trial in the study that seems to be running and cannot be gone on with."""
        begun = {point.number for point in self._running.values() if point.number is not None}
        study.settle(self._study, self._space, self._sweep.events(), self._checkpoints, begun)
