"""The search on Ray Tune: trajectories, then further proofs of tickets on the same workers."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.util.queue import Queue

from raytickets import study
from raytickets.config import Range, SearchSpace
from raytickets.data import DataSet
from raytickets.halving import next_proofs
from raytickets.journal import Event
from raytickets.sweep import Sweep, select
from raytickets.ticket import DamagedTicket, load_ticket
from raytickets.trajectory import Point, grid
from raytickets.trial import Trial


def run_search(
    space: SearchSpace,
    sweep: Sweep,
    data: "ray.ObjectRef[DataSet]",
    slots: int,
    tell: Callable[[Event], None],
) -> None:
    """Run every trajectory and proof that has not ended yet, `slots` at a time.

    A trajectory that fails is told of and leaves the rest alone. Raises RuntimeError if a proof
    fails, or if trajectories are lost, and InputError if the study cannot be opened.
    """
    work = _Proposed(space, sweep, tell) if space.optuna else _Work(_grid_left(space, sweep))
    trajectories = work.trajectories
    if not trajectories and not next_proofs(space, sweep.events())[1]:
        return
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # The events tell of failures.
    resources = {"cpu": space.resources.cpus_per_trial, "gpu": space.resources.gpus_per_trial}
    queue = Queue(actor_options={"num_cpus": 0})
    trial = tune.with_parameters(Trial, space=space, dataset=data, sweep=sweep.path, queue=queue)
    work.provers = slots if space.proof.rungs > 1 else 0
    teller = _Teller(space, sweep, trajectories, queue, work.provers, tell)
    tuner = tune.Tuner(
        tune.with_resources(trial, resources),
        tune_config=tune.TuneConfig(
            search_alg=work,
            scheduler=_scheduler(space),
            num_samples=-1,
            # Else Tune asks for a second worker only once the first one has begun.
            max_concurrent_trials=slots,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"search-{time.time_ns()}",
            storage_path=str(sweep.path / "ray"),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[teller],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        work.close()
    queue.shutdown()
    if teller.failed_proofs:
        raise RuntimeError("; ".join(teller.failed_proofs))
    if teller.left:
        raise RuntimeError(
            f"Ray Tune stopped before {teller.left} of {trajectories} trajectories had ended"
        )


def _grid_left(space: SearchSpace, sweep: Sweep) -> list[Point]:
    """Points of the grid but for those that need not run again."""
    events = sweep.events()
    last = {event["trajectory"]: event["state"] for event in select(events, "trajectory")}
    ended = {name for name, state in last.items() if state != "failed"} - _damaged(sweep, events)
    return [point for point in grid(space) if point.id not in ended]


def _damaged(sweep: Sweep, events: list[Event]) -> set[str]:
    """Trajectories whose tickets are not whole."""
    damaged = set()
    for event in select(events, "ticket"):
        try:
            load_ticket(sweep.path / event["path"])
        except DamagedTicket:
            damaged.add(event["trajectory"])
    return damaged


def _scheduler(space: SearchSpace) -> TrialScheduler:
    if space.halving is None:
        return FIFOScheduler()
    # A result without an accuracy is not judged: within an epoch, about to draw, or a proof.
    return ASHAScheduler(
        time_attr="epoch",
        metric="accuracy",
        mode="max",
        max_t=_most_epochs(space),
        grace_period=space.halving.grace,
        reduction_factor=space.halving.reduction,
        stop_last_trials=False,
    )


def _most_epochs(space: SearchSpace) -> int:
    given = space.optuna.ranges.get("training.epochs") if space.optuna else None
    if isinstance(given, Range):
        return int(given.high)
    return max(given or [space.training.epochs])


_UNCHECKED: Event = {"epoch": 0, "train_macs": 0, "seconds": 0.0}


class _Teller(tune.Callback):
    """Tells of what trials report, of trajectories that halving ends, and of those that fail.

    Once all trajectories have ended it hands the provers one rung of proofs after another.
    """

    def __init__(
        self,
        space: SearchSpace,
        sweep: Sweep,
        trajectories: int,
        queue: Queue,
        provers: int,
        tell: Callable[[Event], None],
    ):
        self._space, self._sweep, self._queue, self._provers = space, sweep, queue, provers
        self._pass_on = tell
        self.left = trajectories
        """Trajectories that have not ended."""
        self._ended: set[str] = set()
        self._proofs: set[str] = set()
        self._heard: dict[str, list[Event]] = {}
        self.failed_proofs: list[str] = []
        self._hand_out()

    def __getstate__(self) -> dict:
        return {}  # Tune keeps a pickle of its callbacks to restore from, which is not done here.

    def on_trial_result(self, iteration, trials, trial, result, **info) -> None:  # noqa: ARG002
        for event in result["events"]:
            self._tell(event)

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:  # noqa: ARG002
        if "point" in trial.config and Point(**trial.config["point"]).id not in self._ended:
            self._end(trial, "hopeless", "others were more accurate by then")

    def on_trial_error(self, iteration, trials, trial, **info) -> None:  # noqa: ARG002
        # Tune has the error in this file before its own methods find it.
        error = Path(str(trial.error_file)).read_text(encoding="utf-8")
        reason = error.strip().splitlines()[-1]
        if "point" in trial.config:
            self._end(trial, "failed", reason)
        else:
            self.failed_proofs.append(f"a proof failed: {reason}")
            self._proofs.clear()
            self._hand_out()

    def _tell(self, event: Event) -> None:
        self._pass_on(event)
        match event["event"]:
            case "check" | "ticket":
                self._heard.setdefault(event["trajectory"], []).append(event)
            case "trajectory":
                self._ended.add(event["trajectory"])
                self.left -= 1
                self._hand_out()
            case "proof":
                self._proofs.discard(event["ticket"])
                self._hand_out()

    def _hand_out(self) -> None:
        if self.left or self._proofs or not self._provers:
            return
        rung, tickets = next_proofs(self._space, self._sweep.events())
        if tickets and not self.failed_proofs:
            self._proofs = {ticket["ticket"] for ticket in tickets}
            self._queue.put_nowait_batch([(ticket["path"], rung) for ticket in tickets])
        else:
            self._queue.put_nowait_batch([None] * self._provers)
            self._provers = 0

    def _end(self, trial: Any, state: str, reason: str) -> None:
        point = Point(**trial.config["point"])
        self._tell(_ending(self._space, point, self._heard.get(point.id, []), state, reason))


def _ending(
    space: SearchSpace, point: Point, events: list[Event], state: str, reason: str
) -> Event:
    """The `trajectory` event of one that did not come to it itself, after these events of it."""
    last = (select(events, "check") or [_UNCHECKED])[-1]
    drawn = {event["prune_ratio"] for event in select(events, "ticket")}
    return {
        "event": "trajectory",
        "trajectory": point.id,
        "method": "early_bird",
        "penalty": point.penalty,
        "seed": point.seed,
        "changes": dict(point.changes),
        "state": state,
        "reason": reason,
        "epochs": last["epoch"],
        "train_macs": last["train_macs"],
        "seconds": last["seconds"],
        "ratios": {
            f"{ratio:g}": "drawn" if ratio in drawn else state for ratio in space.prune_ratios
        },
        "distances_matrix": {"epochs": [], "ratios": {}},
    }


class _Work(Searcher):
    """Hands out trajectories, then their workers as provers of tickets."""

    def __init__(self, points: list[Point]):
        super().__init__()
        self._points = points
        self.provers = 0

    @property
    def trajectories(self) -> int:
        """How many there are to hand out."""
        return len(self._points)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:  # noqa: ARG002
        if self._points:
            return {"point": vars(self._points.pop(0))}
        if self.provers:
            self.provers -= 1
            return {"prover": self.provers}
        return Searcher.FINISHED  # pyright: ignore[reportReturnType]

    def on_trial_complete(self, trial_id, result=None, error=False) -> None:
        """Nothing: what follows from results is in the journal."""

    def close(self) -> None:
        """Nothing: no study is to be told."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is what a sweep goes on from, not Tune's snapshots."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


class _Proposed(_Work):
    """Hands out what Optuna proposes, and tells it once what each trajectory came to.

    Of a sweep that goes on, trajectories that ended count. One that was cut off is told of as
    failed, and another is proposed in its place, as for all that failed. One whose tickets were
    damaged runs again.
    """

    def __init__(self, space: SearchSpace, sweep: Sweep, tell: Callable[[Event], None]):
        events = sweep.events()
        settings, opening = study.settings(space), events[0]
        storage = study.open_storage(space, sweep.path)
        name = study.study_name(space, opening["data"]["fingerprint"])
        self._study = study.open_study(space, storage, name)
        study.settle(self._study, space, events)
        for point in study.cut_off(self._study, space, events):
            mine = [event for event in events if event.get("trajectory") == point.id]
            tell(_ending(space, point, mine, "failed", "it was cut off"))
        ends = {e["trajectory"]: e for e in select(sweep.events(), "trajectory")}
        damaged = _damaged(sweep, events)
        super().__init__([study.point(event) for name, event in ends.items() if name in damaged])
        whole = [event for name, event in ends.items() if name not in damaged]
        done = sum(event["state"] != "failed" for event in whole)
        self._proposals = max(0, settings.trajectories - done - len(self._points))
        self._space, self._sweep, self._dense_macs = space, sweep, opening["dense"]["macs"]
        self._numbers: set[int] = set()
        self._heard: dict[str, list[Event]] = {}
        directions = study.DIRECTIONS[settings.objective]
        self._optuna = OptunaSearch(
            lambda trial: {"point": vars(study.propose(space, trial))},
            metric=[str(place) for place in range(len(directions))],
            mode=[direction[:3] for direction in directions],
            sampler=self._study.sampler,
            study_name=name,
            storage=storage,
        )

    @property
    def trajectories(self) -> int:
        return len(self._points) + self._proposals

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self._points or not self._proposals:
            return super().suggest(trial_id)
        self._proposals -= 1
        point = self._optuna.suggest(trial_id)["point"]  # pyright: ignore
        self._numbers.add(point["number"])
        self._heard[trial_id] = []
        return {"point": point}

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        if trial_id in self._heard:
            self._heard[trial_id] += result["events"]

    def on_trial_complete(self, trial_id, result=None, error=False) -> None:
        if trial_id not in self._heard:
            return  # A prover, or one that runs again.
        # Tune keeps the last result for here.
        events = self._heard.pop(trial_id) + (result["events"] if result else [])
        failed = error or not result
        values = None if failed else study.outcome(self._space, self._dense_macs, events)
        told = {str(place): value for place, value in enumerate(values or [])}
        self._optuna.on_trial_complete(trial_id, told, error=values is None)

    def close(self) -> None:
        """Leave no trial in the study that seems to be running."""
        study.settle(self._study, self._space, self._sweep.events(), self._numbers)
