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
from ray.util.queue import Queue

from raytickets.config import SearchSpace
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
    fails, or if trajectories are lost.
    """
    ended = _ended_trajectories(sweep)
    points = [point for point in grid(space) if point.id not in ended]
    if not points and not next_proofs(space, sweep.events())[1]:
        return
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # The events tell of failures.
    resources = {"cpu": space.resources.cpus_per_trial, "gpu": space.resources.gpus_per_trial}
    queue = Queue(actor_options={"num_cpus": 0})
    trial = tune.with_parameters(Trial, space=space, dataset=data, sweep=sweep.path, queue=queue)
    provers = slots if space.proof.rungs > 1 else 0
    teller = _Teller(space, sweep, points, queue, provers, tell)
    tune.Tuner(
        tune.with_resources(trial, resources),
        tune_config=tune.TuneConfig(
            search_alg=_Work(points, provers),
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
    ).fit()
    queue.shutdown()
    if teller.failed_proofs:
        raise RuntimeError("; ".join(teller.failed_proofs))
    told = {event["trajectory"] for event in select(sweep.events(), "trajectory")}
    if lost := [point.id for point in points if point.id not in told]:
        raise RuntimeError(f"Ray Tune stopped before {', '.join(lost)} ended")


def _ended_trajectories(sweep: Sweep) -> set[str]:
    """Those that need not run again: they did not fail, and their tickets are whole."""
    events = sweep.events()
    lost = set()
    for event in select(events, "ticket"):
        try:
            load_ticket(sweep.path / event["path"])
        except DamagedTicket:
            lost.add(event["trajectory"])
    last = {event["trajectory"]: event["state"] for event in select(events, "trajectory")}
    return {name for name, state in last.items() if state != "failed"} - lost


def _scheduler(space: SearchSpace) -> TrialScheduler:
    if space.halving is None:
        return FIFOScheduler()
    # A result without an accuracy is not judged: within an epoch, about to draw, or a proof.
    return ASHAScheduler(
        time_attr="epoch",
        metric="accuracy",
        mode="max",
        max_t=space.training.epochs,
        grace_period=space.halving.grace,
        reduction_factor=space.halving.reduction,
        stop_last_trials=False,
    )


_UNCHECKED: Event = {"epoch": 0, "train_macs": 0, "seconds": 0.0}


class _Teller(tune.Callback):
    """Tells of what trials report, of trajectories that halving ends, and of those that fail.

    Once all trajectories have ended it hands the provers one rung of proofs after another.
    """

    def __init__(
        self,
        space: SearchSpace,
        sweep: Sweep,
        points: list[Point],
        queue: Queue,
        provers: int,
        tell: Callable[[Event], None],
    ):
        self._space, self._sweep, self._queue, self._provers = space, sweep, queue, provers
        self._pass_on = tell
        self._open = {point.id for point in points}
        self._drawn: set[tuple[str, float]] = set()
        self._last = {point.id: _UNCHECKED for point in points}
        self.failed_proofs: list[str] = []
        self._hand_out()

    def __getstate__(self) -> dict:
        return {}  # Tune keeps a pickle of its callbacks to restore from, which is not done here.

    def on_trial_result(self, iteration, trials, trial, result, **info) -> None:  # noqa: ARG002
        for event in result["events"]:
            self._tell(event)

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:  # noqa: ARG002
        if "point" in trial.config and Point(**trial.config["point"]).id in self._open:
            self._end(trial, "hopeless", "others were more accurate by then")

    def on_trial_error(self, iteration, trials, trial, **info) -> None:  # noqa: ARG002
        # Tune has the error in this file before its own methods find it.
        error = Path(str(trial.error_file)).read_text(encoding="utf-8")
        reason = error.strip().splitlines()[-1]
        if "point" in trial.config:
            self._end(trial, "failed", reason)
        else:
            self.failed_proofs.append(f"a proof failed: {reason}")
            self._open.clear()
            self._hand_out()

    def _tell(self, event: Event) -> None:
        self._pass_on(event)
        match event["event"]:
            case "check":
                self._last[event["trajectory"]] = event
            case "ticket":
                self._drawn.add((event["trajectory"], event["prune_ratio"]))
            case "trajectory":
                self._open.discard(event["trajectory"])
                self._hand_out()
            case "proof":
                self._open.discard(event["ticket"])
                self._hand_out()

    def _hand_out(self) -> None:
        if self._open or not self._provers:
            return
        rung, tickets = next_proofs(self._space, self._sweep.events())
        if tickets and not self.failed_proofs:
            self._open = {ticket["ticket"] for ticket in tickets}
            self._queue.put_nowait_batch([(ticket["path"], rung) for ticket in tickets])
        else:
            self._queue.put_nowait_batch([None] * self._provers)
            self._provers = 0

    def _end(self, trial: Any, state: str, reason: str) -> None:
        point = Point(**trial.config["point"])
        last = self._last[point.id]
        self._tell(
            {
                "event": "trajectory",
                "trajectory": point.id,
                "penalty": point.penalty,
                "seed": point.seed,
                "state": state,
                "reason": reason,
                "epochs": last["epoch"],
                "train_macs": last["train_macs"],
                "seconds": last["seconds"],
                "ratios": {
                    f"{ratio:g}": "drawn" if (point.id, ratio) in self._drawn else state
                    for ratio in self._space.prune_ratios
                },
            }
        )


class _Work(Searcher):
    """Hands out the trajectories, then their workers as provers of tickets."""

    def __init__(self, points: list[Point], provers: int):
        super().__init__()
        self._configs: list[dict[str, Any]] = [{"point": vars(point)} for point in points]
        self._configs += [{"prover": number} for number in range(provers)]

    def suggest(self, trial_id: str) -> dict[str, Any] | None:  # noqa: ARG002
        return self._configs.pop(0) if self._configs else Searcher.FINISHED  # pyright: ignore

    def on_trial_complete(self, trial_id, result=None, error=False) -> None:
        """Nothing: what follows from results is in the journal."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is what a sweep goes on from, not Tune's snapshots."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError
