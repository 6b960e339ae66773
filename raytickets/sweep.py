"""A sweep or a comparison on disk: its folder, its journal and the report made from them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytickets import comparison
from raytickets.config import InputError, SearchSpace
from raytickets.halving import proved
from raytickets.journal import Event, read_journal


@dataclass(frozen=True)
class Sweep:
    """Everything one `raytickets search` or `raytickets compare` found, in one folder.

    The folder holds `journal.jsonl`, `tickets/<id>/`, `retrained/<id>/` and Ray's own files.
    """

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def events(self) -> list[Event]:
        """The journal, oldest first; InputError if the folder holds none."""
        try:
            return read_journal(self.path)
        except OSError as error:
            allowed = "must be the folder of a sweep, which holds journal.jsonl"
            raise InputError("sweep", str(self.path), allowed) from error
        except ValueError as error:
            raise InputError("sweep", str(self.path), f"its journal is damaged: {error}") from error

    def opening(self) -> Event:
        """The journal's `sweep` or `comparison` event; InputError if there is none."""
        for event in self.events():
            return event
        raise InputError("sweep", str(self.path), "its journal is empty: it never began")

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

        Of a comparison it is what `raytickets.comparison.report` documents, of a sweep this:
        `kind` ("sweep"), `name`, `space`, `state` (done, failed or unfinished), `dense` and
        `winners` (rows), `tickets` (see `halving.proved`), `trajectories` (every `trajectory`
        event), `search_macs` (training of all trajectories and proofs), `sweep_cost` (all training
        of the sweep, without the reference's own, relative to the reference's), and what
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
            return comparison.report(events)
        tickets = {e["ticket"]: e for e in proved(events)}
        trajectories = {e["trajectory"]: e for e in select(events, "trajectory")}
        # The sweep's own retraining, not what `raytickets retrain` did later by another recipe.
        retrained = {e["run"]: e for e in reversed(select(events, "retrained"))}
        winners = [id for e in select(events, "winners")[-1:] for id in e["tickets"]]
        endings = select(events, "end")

        shared_macs = sum(e["train_macs"] for e in trajectories.values())
        proof_macs = sum(e["proof_macs"] for e in tickets.values())
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
        unshared = _unshared_macs(events, tickets.values(), trajectories.values())

        def relative(macs: float) -> float | None:
            return macs / dense_macs if dense_macs else None

        return {
            "kind": "sweep",
            "name": opening["name"],
            "space": opening["space"]["name"],
            "state": endings[-1]["state"] if endings else "unfinished",
            "dense": row("dense"),
            "winners": [row(run) for run in winners],
            "tickets": list(tickets.values()),
            "trajectories": list(trajectories.values()),
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
