"""A sweep or a comparison on disk: its folder, its journal and the report made from them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytickets import comparison, storage
from raytickets.config import InputError, SearchSpace, expanded
from raytickets.halving import drawn, proved
from raytickets.journal import NAME, Event, read_journal


def place(given: str | Path) -> Path:
    """The local copy of an address, any other path with `~` expanded."""
    return (
        storage.local(given)
        if re.match(r"[A-Za-z][\w+.-]*:/", str(given))
        else expanded("path", given)
    )


@dataclass(frozen=True)
class Sweep:
    """Everything one `raytickets search` or `raytickets compare` found, in one folder.

    The folder holds `journal.jsonl`, `tickets/<id>/`, `retrained/<id>/` and Ray's own files. Of one
    that is kept at an address, as `Sweep("s3://bucket/sweeps/first")`, it is the local copy.
    """

    path: Path

    def __post_init__(self):
        object.__setattr__(self, "path", place(self.path))

    @property
    def name(self) -> str:
        return self.path.name

    def fetched(self) -> "Sweep":
        """The same with the newest journal, if it is kept at an address: others may go on there."""
        storage.fetch_journal(self.path / NAME)
        return self

    def events(self) -> list[Event]:
        """The journal, oldest first; InputError if the folder holds none."""
        try:
            return read_journal(self.path)
        except (FileNotFoundError, NotADirectoryError) as error:
            allowed = "must be the folder of a sweep, which holds journal.jsonl"
            raise InputError("sweep", storage.address(self.path), allowed) from error
        except OSError as error:
            allowed = f"its journal cannot be read: {error}"
            raise InputError("sweep", storage.address(self.path), allowed) from error
        except ValueError as error:
            allowed = f"its journal is damaged: {error}; the command that began it mends it"
            raise InputError("sweep", storage.address(self.path), allowed) from error

    def opening(self) -> Event:
        """The journal's `sweep` or `comparison` event; InputError if there is none."""
        for event in self.events():
            return event
        raise InputError(
            "sweep", storage.address(self.path), "its journal is empty: it never began"
        )

    def space(self) -> SearchSpace:
        """The search space as it was when the sweep began."""
        return SearchSpace.from_dict(self.opening()["space"])

    def failures(self) -> list[Event]:
        """The `trajectory` events of those that failed, unless others have run in their place."""
        last = {e["trajectory"]: e for e in select(self.events(), "trajectory")}.values()
        failed = [event for event in last if event["state"] == "failed"]
        optuna = self.opening()["event"] == "sweep" and self.space().optuna
        return [] if optuna and len(last) - len(failed) >= optuna.trajectories else failed

    def report(self) -> dict[str, Any]:
        """What was found and what it cost, as plain JSON values.

        `state` is done, failed, interrupted, or unfinished: it runs, or its driver was killed.
        `interrupted` names the trajectories (or sources of tickets) that have begun and not ended,
        once the sweep has; `retries` says how often each trajectory or retraining was run again,
        as its worker was lost or its checkpoint damaged. The rest is of a comparison what
        `raytickets.comparison.report` documents, of a sweep this:

        `kind` ("sweep"), `name`, `space`, `dense` and `winners` (rows), `tickets` (see
        `halving.proved`), `trajectories` (every `trajectory` event), `search_macs` (training of all
        trajectories and proofs), `sweep_cost` (all training of the sweep, without the reference's
        own, relative to the reference's), and what
        `sweep_cost` would have been with a trajectory for each prune ratio, which would draw the
        same tickets at the same checks (`without_sharing`), and with every ticket retrained and
        none proved (`without_halving`). `proof_correlation` says how well proofs foretold
        retraining: `spearman`, the rank correlation of the accuracy in the last proof and the
        validation accuracy after retraining, over all `n` tickets that were retrained; null below
        3. A row has `run`, `path` (of the retrained ticket, relative to the sweep), `penalty`,
        `prune_ratio`, `seed`, `draw_epoch`, `macs`, `params`, `proof_accuracy`,
        `validation_accuracy`, `test_accuracy`, `train_macs` (its own retraining) and
        `relative_cost`: its retraining and an equal share of the whole search, relative to the
        reference's training. What is not known yet is null.
        """
        opening, events = self.opening(), self.events()
        if opening["event"] == "comparison":
            return comparison.report(events) | {"state": _state(events)} | _lost(events)
        tickets = {e["ticket"]: e for e in proved(events)}
        trajectories = {e["trajectory"]: e for e in select(events, "trajectory")}
        retrained = own_retrainings(opening, events)
        winners = [
            id for e in select(events, "winners")[-1:] for id in e["tickets"] if id in tickets
        ]

        shared_macs = sum(e["train_macs"] for e in trajectories.values())
        # Two of Optuna's trajectories at one point draw the same tickets, each at its own cost.
        paid = [*tickets.values()]
        paid += [e for e in drawn(events) if tickets[e["ticket"]]["trajectory"] != e["trajectory"]]
        proof_macs = sum(e["proof_macs"] for e in paid)
        search_macs = shared_macs + proof_macs
        dense_macs: Any = retrained.get("dense", {}).get("train_macs")

        def row(run: str) -> dict[str, Any]:
            done, ticket = retrained.get(run, {}), tickets.get(run, {})
            share = 0 if run == "dense" else search_macs / len(winners)
            spent: Any = done.get("train_macs")
            relative = None if None in (spent, dense_macs) else (spent + share) / dense_macs
            return {
                "run": run,
                "path": done.get("path"),
                **{
                    name: ticket.get(name)
                    for name in ("penalty", "prune_ratio", "seed", "draw_epoch", "proof_accuracy")
                },
                "macs": ticket.get("macs", opening["dense"]["macs"]),
                "params": ticket.get("params", opening["dense"]["params"]),
                "validation_accuracy": done.get("validation_accuracy"),
                "test_accuracy": done.get("test_accuracy"),
                "train_macs": spent,
                "relative_cost": relative,
            }

        own = sum(e["train_macs"] for run, e in retrained.items() if run in winners)
        every = sum(e["macs"] for e in tickets.values()) / opening["dense"]["macs"]
        unshared = _unshared_macs(events, paid, trajectories.values())

        def relative(macs: float) -> float | None:
            return macs / dense_macs if dense_macs else None

        return {
            "kind": "sweep",
            "name": opening["name"],
            "space": opening["space"]["name"],
            "state": _state(events),
            "dense": row("dense"),
            "winners": [row(run) for run in winners],
            "tickets": list(tickets.values()),
            "trajectories": list(trajectories.values()),
            **_lost(events),
            "search_macs": search_macs,
            "sweep_cost": relative(search_macs + own),
            "without_sharing": relative(unshared + proof_macs + own),
            "without_halving": relative(shared_macs + every * (dense_macs or 0)),
            "proof_correlation": _rank_correlation(
                [
                    (tickets[run]["proof_accuracy"], event["validation_accuracy"])
                    for run, event in retrained.items()
                    if run in tickets
                ]
            ),
        }


def _state(events: Iterable[Event]) -> str:
    """How the last run ended; unfinished if one goes on, or did until its driver was killed."""
    state = "unfinished"
    for event in events:
        if event["event"] == "end":
            state = event["state"]
        elif goes_on(event):
            state = "unfinished"
    return state


def goes_on(event: Event) -> bool:
    """Whether a sweep or a comparison tells this while it runs, and retraining by hand does not."""
    if event["event"] == "epoch":
        return "identity" not in event
    return event["event"] in ("check", "proof", "winners")


def _lost(events: Iterable[Event]) -> dict[str, Any]:
    """What was cut off, or lost a worker: a part of the report."""
    events = list(events)
    ended = _state(events) != "unfinished"
    retries: dict[str, int] = {}
    for event in select(events, "retry"):
        who = event.get("trajectory") or event["run"]
        retries[who] = retries.get(who, 0) + 1
    return {"interrupted": [*_begun(events)] if ended else [], "retries": retries}


def _begun(events: Iterable[Event]) -> dict[str, float]:
    """Trajectories that have not ended and the epoch of the last check of each."""
    begun = {}
    for event in events:
        if event["event"] == "check":
            begun[event["trajectory"]] = event["epoch"]
        elif event["event"] == "trajectory":
            begun.pop(event["trajectory"], None)
    return begun


def standing(events: Sequence[Event]) -> str:
    """What a sweep that goes on has done already, as a line; nothing if it only began."""
    if len(events) < 2:
        return ""
    states = {e["trajectory"]: e["state"] for e in select(events, "trajectory")}
    begun = _begun(events)
    failed = [name for name, state in states.items() if state == "failed" and name not in begun]
    counts = {
        "trajectories ended": len(states.keys() - begun.keys() - {*failed}),
        "tickets": len({event["ticket"] for event in drawn(events)}),
        "networks retrained": len({event["run"] for event in select(events, "retrained")}),
    }
    line = "found here: " + ", ".join(f"{count} {what}" for what, count in counts.items())
    parts = [f"{name} was at epoch {epoch:.4g}" for name, epoch in begun.items()]
    parts += [f"{name} failed" for name in failed]
    shown = "; ".join(parts[:_SHOWN]) + (f"; {len(parts) - _SHOWN} more" * (len(parts) > _SHOWN))
    return f"{line}; to go on: {shown}" if parts else line


_SHOWN = 5
"""How many trajectories a line names."""


def _unshared_macs(
    events: Iterable[Event], tickets: Iterable[Event], trajectories: Iterable[Event]
) -> int:
    """Training MACs of one trajectory for each prune ratio, to its draw or the budget's end."""
    checks = {(e["trajectory"], e["check"]): e["train_macs"] for e in select(events, "check")}
    drawn = [checks[ticket["trajectory"], ticket["draw_check"]] for ticket in tickets]
    others = [
        event["train_macs"] * (len(event["ratios"]) - list(event["ratios"].values()).count("drawn"))
        for event in trajectories
    ]
    return sum(drawn) + sum(others)


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Spearman's, which is not defined where one side is all the same."""
    proofs, finals = [proof for proof, _ in pairs], [final for _, final in pairs]
    if len(pairs) < 3 or len(set(proofs)) == 1 or len(set(finals)) == 1:
        return {"spearman": None, "n": len(pairs)}
    from scipy.stats import spearmanr

    found: Any = spearmanr(proofs, finals)
    return {"spearman": float(found.statistic), "n": len(pairs)}


def select(events: Iterable[Event], kind: str) -> list[Event]:
    """The events of one kind, in order."""
    return [event for event in events if event["event"] == kind]


def own_retrainings(opening: Event, events: Iterable[Event]) -> dict[str, Event]:
    """What came of the dense network and each ticket that counts, the newest `retrained` events.

    By the sweep's recipe, not by one that `raytickets retrain` was told.
    """
    events, recipe = list(events), opening["space"]["retraining"]
    runs = {"dense", *(ticket["ticket"] for ticket in drawn(events))}
    retrained = [event for event in select(events, "retrained") if event["recipe"] == recipe]
    return {event["run"]: event for event in retrained if event["run"] in runs}


def ticket_folder(sweep: Path, place: object) -> Path:
    """The folder of a ticket from the `path` of an event; InputError if it leaves the sweep."""
    if not isinstance(place, str) or not re.fullmatch(r"(tickets|retrained)/[0-9a-z]+", place):
        raise InputError("journal", place, "must name the place of a ticket in its sweep")
    return sweep / place
