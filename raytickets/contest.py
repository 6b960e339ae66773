"""A comparison on Ray Tune: every source of tickets, and the retraining of each ticket found."""

from collections.abc import Callable

import ray
from ray import tune

from raytickets.config import SearchSpace
from raytickets.crew import Job, Work, run_crew
from raytickets.data import DataSet
from raytickets.halving import drawn
from raytickets.journal import Event
from raytickets.methods import Source, sources
from raytickets.room import Room
from raytickets.sweep import Sweep, select
from raytickets.ticket import is_whole
from raytickets.trial import Trial


def run_contest(
    space: SearchSpace,
    sweep: Sweep,
    data: "ray.ObjectRef[DataSet]",
    room: Room,
    tell: Callable[[Event], None],
) -> None:
    """Run every source that has not ended and retrain every ticket that is not.

    One whose worker is lost runs again. A source that fails is told of and leaves the rest alone.
    Raises RuntimeError once all is done if a retraining failed or something was left undone, and at
    once if what was found cannot be kept.
    """
    work = _Contest(space, sweep, tell)
    if not work.ready:
        return
    given = {"space": space, "dataset": data, "sweep": sweep.path}
    trial = tune.with_parameters(Trial, **given, cpus=room.cpus, gpus=room.gpus)
    run_crew("compare", trial, work, sweep, room)
    reasons = [f"ticket {ticket}: {reason}" for ticket, reason in work.failed.items()]
    reasons += [f"Ray Tune stopped before {', '.join(work.left)} ended"] if work.left else []
    if reasons:
        raise RuntimeError("; ".join(reasons))


def _left(space: SearchSpace, sweep: Sweep) -> tuple[list[Source], list[Event]]:
    """Sources to run, and tickets of the others to retrain.

    A source need not run again if it did not fail and its tickets are whole.
    """
    events = sweep.events()
    tickets = drawn(events)
    damaged = {e["trajectory"] for e in tickets if not is_whole(sweep.path / e["path"])}
    last = {event["trajectory"]: event["state"] for event in select(events, "trajectory")}
    ended = {name for name, state in last.items() if state != "failed"} - damaged
    done = _retrained(sweep)
    waiting = [e for e in tickets if e["trajectory"] in ended and e["ticket"] not in done]
    return [source for source in sources(space) if source.id not in ended], waiting


def _retrained(sweep: Sweep) -> set[str]:
    """Tickets that the comparison retrained and that are whole.

    `raytickets retrain` keeps no ledger.
    """
    retrained = [event for event in select(sweep.events(), "retrained") if "ledger" in event]
    return {event["run"] for event in retrained if is_whole(sweep.path / event["path"])}


class _Contest(Work):
    """Hands out the sources, and every ticket to retrain once it is found."""

    keeps_workers = True

    def __init__(self, space: SearchSpace, sweep: Sweep, tell: Callable[[Event], None]):
        super().__init__(sweep, tell)
        self._ratios: list[float] = sweep.opening()["prune_ratios"]
        left, waiting = _left(space, sweep)
        self._sources = {source.id: source for source in left}
        self._jobs = [Job("trajectory", source.id, {"source": vars(source)}) for source in left]
        self._known = _retrained(sweep)
        self.left = set(self._sources)
        """Sources and tickets that have not ended."""
        self.failed: dict[str, str] = {}
        """Why the retraining of a ticket failed, by its id."""
        for ticket in waiting:
            self._add(ticket)

    @property
    def ready(self) -> bool:
        return bool(self._jobs)

    def next(self) -> Job:
        return self._jobs.pop(0)

    def heard(self, event: Event) -> None:
        match event["event"]:
            case "ticket":
                self._add(event)
            case "trajectory":
                self.left.discard(event["trajectory"])
            case "retrained":
                self.left.discard(event["run"])

    def fail(self, job: Job, reason: str) -> None:
        if job.kind == "trajectory":
            source = self._sources[job.id]
            ratios = [0.0] if source.kind == "dense" else self._ratios
            self.tell(self.ending(source, source.kind, ratios, "failed", reason))
        else:
            self.left.discard(job.id)
            self.failed[job.id] = reason

    def _add(self, ticket: Event) -> None:
        if ticket["ticket"] not in self._known:
            self._known.add(ticket["ticket"])
            self.left.add(ticket["ticket"])
            self._jobs.append(Job("run", ticket["ticket"], {"ticket": ticket["path"]}))
