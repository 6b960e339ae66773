"""A comparison on Ray Tune: every source of tickets, then their retraining on the same workers."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher
from ray.util.queue import Queue

from raytickets.config import SearchSpace
from raytickets.data import DataSet
from raytickets.journal import Event
from raytickets.methods import Source, retrain_alone, run_source, sources
from raytickets.sweep import Sweep, select
from raytickets.ticket import DamagedTicket, load_ticket
from raytickets.trial import Trial


def run_contest(
    space: SearchSpace,
    sweep: Sweep,
    data: "ray.ObjectRef[DataSet]",
    slots: int,
    tell: Callable[[Event], None],
) -> None:
    """Run every source that has not ended and retrain every ticket that is not, `slots` at a time.

    A source that fails is told of and leaves the rest alone. Raises RuntimeError once all is done
    if a retraining failed or something was lost.
    """
    left, waiting = _left(space, sweep)
    if not left and not waiting:
        return
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # The events tell of failures.
    resources = {"cpu": space.resources.cpus_per_trial, "gpu": space.resources.gpus_per_trial}
    queue = Queue(actor_options={"num_cpus": 0})
    trial = tune.with_parameters(
        Contestant, space=space, dataset=data, sweep=sweep.path, queue=queue
    )
    work = _Work(left, slots)
    teller = _Teller(sweep, left, waiting, work, queue, slots, tell)
    tune.Tuner(
        tune.with_resources(trial, resources),
        tune_config=tune.TuneConfig(
            search_alg=work, num_samples=-1, max_concurrent_trials=slots, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name=f"compare-{time.time_ns()}",
            storage_path=str(sweep.path / "ray"),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[teller],
            verbose=0,
        ),
    ).fit()
    queue.shutdown()
    left, waiting = _left(space, sweep)
    told = {event["trajectory"] for event in select(sweep.events(), "trajectory")}
    lost = [source.id for source in left if source.id not in told]
    lost += [
        f"ticket {ticket['ticket']}" for ticket in waiting if ticket["ticket"] not in teller.failed
    ]
    reasons = [f"ticket {ticket}: {reason}" for ticket, reason in teller.failed.items()]
    reasons += [f"Ray Tune stopped before {', '.join(lost)} ended"] if lost else []
    if reasons:
        raise RuntimeError("; ".join(reasons))


def _left(space: SearchSpace, sweep: Sweep) -> tuple[list[Source], list[Event]]:
    """Sources to run, and tickets of the others to retrain.

    A source need not run again if it did not fail and its tickets are whole.
    """
    events = sweep.events()
    tickets = {event["ticket"]: event for event in select(events, "ticket")}
    damaged = set()
    for event in tickets.values():
        try:
            load_ticket(sweep.path / event["path"])
        except DamagedTicket:
            damaged.add(event["trajectory"])
    last = {event["trajectory"]: event["state"] for event in select(events, "trajectory")}
    ended = {name for name, state in last.items() if state != "failed"} - damaged
    done = _retrained(events)
    waiting = [
        event for id, event in tickets.items() if event["trajectory"] in ended and id not in done
    ]
    return [source for source in sources(space) if source.id not in ended], waiting


def _retrained(events: list[Event]) -> set[str]:
    """Tickets that the comparison retrained; `raytickets retrain` keeps no ledger."""
    return {event["run"] for event in select(events, "retrained") if "ledger" in event}


class Contestant(Trial):
    """A source if its config names one, else a retrainer.

    A retrainer takes paths of tickets from the queue until it finds None there, and tells which
    one it has taken before it begins.
    """

    def reset_config(self, new_config: dict) -> bool:
        if "source" in new_config:
            steps = run_source(self._setting, Source(**new_config["source"]))
            self._results = ({"events": events} for events in steps)
        else:
            self._results = self._retrain()
        return True

    def _retrain(self) -> Iterator[dict]:
        while path := self._queue.get():
            yield {"events": [], "ticket": Path(path).name}
            for events in retrain_alone(self._setting, self._setting.sweep / path):
                yield {"events": events}

    def step(self) -> dict:
        return next(self._results, {"events": [], "done": True})


class _Work(Searcher):
    """Hands out the sources, then their workers as retrainers, until it is closed."""

    def __init__(self, left: list[Source], retrainers: int):
        super().__init__()
        self._configs: list[dict[str, Any]] = [{"source": vars(source)} for source in left]
        self._retrainers = 0
        self._closed = False
        for _ in range(retrainers):
            self.add_retrainer()

    def add_retrainer(self) -> None:
        self._configs.append({"retrainer": self._retrainers})
        self._retrainers += 1

    def close(self) -> None:
        self._closed = True

    def suggest(self, trial_id: str) -> dict[str, Any] | None:  # noqa: ARG002
        if self._configs:
            return self._configs.pop(0)
        # None is for Tune to ask again later.
        return Searcher.FINISHED if self._closed else None  # pyright: ignore

    def on_trial_complete(self, trial_id, result=None, error=False) -> None:
        """Nothing: what follows from results is in the journal."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal is what a comparison goes on from, not Tune's snapshots."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


class _Teller(tune.Callback):
    """Tells of what trials report and of those that fail, and hands tickets to the retrainers.

    Each retrainer finds its None after the last ticket. One that dies of a ticket is replaced.
    """

    def __init__(
        self,
        sweep: Sweep,
        left: list[Source],
        waiting: list[Event],
        work: _Work,
        queue: Queue,
        retrainers: int,
        tell: Callable[[Event], None],
    ):
        self._work, self._queue, self._pass_on = work, queue, tell
        self._open, self._retrainers, self._alive = {s.id for s in left}, retrainers, retrainers
        self._ratios: list[float] = sweep.opening()["prune_ratios"]
        self._handed_out = _retrained(sweep.events())
        self._taken: dict[str, str] = {}
        self._heard: dict[str, list[Event]] = {}
        self.failed: dict[str, str] = {}
        """Why the retraining of a ticket failed, by its id."""
        for ticket in waiting:
            self._hand_out(ticket)
        self._end_queue()

    def __getstate__(self) -> dict:
        return {}  # Tune keeps a pickle of its callbacks to restore from, which is not done here.

    def on_trial_result(self, iteration, trials, trial, result, **info) -> None:  # noqa: ARG002
        if "ticket" in result:
            self._taken[trial.trial_id] = result["ticket"]
        for event in result["events"]:
            self._tell(event)

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:  # noqa: ARG002
        if "retrainer" in trial.config:
            self._retire()

    def on_trial_error(self, iteration, trials, trial, **info) -> None:  # noqa: ARG002
        # Tune has the error in this file before its own methods find it.
        error = Path(str(trial.error_file)).read_text(encoding="utf-8")
        reason = error.strip().splitlines()[-1]
        if "source" in trial.config:
            self._end(Source(**trial.config["source"]), reason)
        elif ticket := self._taken.get(trial.trial_id):
            self.failed[ticket] = reason
            self._work.add_retrainer()
        else:
            self._retire()

    def _tell(self, event: Event) -> None:
        self._pass_on(event)
        self._heard.setdefault(event.get("trajectory", ""), []).append(event)
        if event["event"] == "ticket":
            self._hand_out(event)
        if event["event"] == "trajectory":
            self._open.discard(event["trajectory"])
            self._end_queue()

    def _hand_out(self, ticket: Event) -> None:
        if ticket["ticket"] not in self._handed_out:
            self._handed_out.add(ticket["ticket"])
            self._queue.put(ticket["path"])

    def _end_queue(self) -> None:
        if not self._open:
            self._queue.put_nowait_batch([None] * self._retrainers)

    def _retire(self) -> None:
        self._alive -= 1
        if not self._alive:
            self._work.close()

    def _end(self, source: Source, reason: str) -> None:
        heard = self._heard.get(source.id, [])
        last = {"epoch": 0, "train_macs": 0, "seconds": 0.0}
        last |= (select(heard, "check") or [{}])[-1]
        drawn = {event["prune_ratio"] for event in select(heard, "ticket")}
        self._tell(
            {
                "event": "trajectory",
                "trajectory": source.id,
                "method": source.kind,
                "penalty": source.penalty,
                "seed": source.seed,
                "state": "failed",
                "reason": reason,
                "epochs": last["epoch"],
                "train_macs": last["train_macs"],
                "seconds": last["seconds"],
                "ratios": {
                    f"{ratio:g}": "drawn" if ratio in drawn else "failed"
                    for ratio in ((0.0,) if source.kind == "dense" else self._ratios)
                },
                "changes": {},
                "distances_matrix": {"epochs": [], "ratios": {}},
            }
        )
