"""What MLflow shows of a journal: runs with their params, metrics, tags and files.

A sweep is a run, and so is a comparison. Below it is one for each trajectory (in a comparison: for
each source) and for the dense reference of a sweep, and below its trajectory one for each ticket.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytickets import comparison, halving, plots
from raytickets.config import SearchSpace
from raytickets.journal import Event

ABOUT = {
    "sweep": """This sweep looked for early-bird tickets: smaller networks that train as well.

Below it are its trajectories (trainings of the dense network under a penalty), below each its
tickets, and the dense network, retrained like the winners to compare them with. The table and the
plot of all tickets are under *Artifacts*. To list tickets alone, filter runs by
`tags."raytickets.kind" = "ticket"` and sort them by a metric, such as `proof_accuracy`.
""",
    "comparison": """This comparison trained smaller networks that different methods found.

Below it is the search of each method, and below each search its tickets: the networks that it gave,
all trained by the same recipe. The param `method` tells them apart; `dense` is the whole network.
The table and the plot of all methods are under *Artifacts*. To list tickets alone, filter runs by
`tags."raytickets.kind" = "ticket"` and sort them by `test_accuracy`.
""",
}


@dataclass
class Run:
    """One run, and what of it MLflow has not got yet."""

    kind: str
    name: str
    parent: str
    """Its parent's key, empty at the top."""
    id: str = ""
    """MLflow's, empty before it is there."""
    started: int = 0
    """Milliseconds since 1970."""
    status: str = ""
    """In MLflow."""
    wanted: str = "RUNNING"
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    """Names, values, steps, and the places of their events in the journal."""
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    """By name: figures, plain values as JSON, texts, or the path of a folder."""

    def measure(self, values: Mapping[str, float | None], step: int = 0, place: int = 0) -> None:
        """Add metrics, but for those that are None."""
        pairs = values.items()
        self.metrics += [(key, value, step, place) for key, value in pairs if value is not None]


class Runs:
    """The runs of one journal by their keys; parents come before their children.

    What has ended in MLflow from an earlier time keeps the files it has there.
    """

    def __init__(self, folder: Path, opening: Event, found: Mapping[str, Run]):
        self._folder, self._opening = folder, opening
        self._space = SearchSpace.from_dict(opening["space"])
        self.top: str = opening["event"]
        self.all = dict(found)
        self._searches: dict[str, Event] = {}
        self._run(self.top, self.top, opening["name"])

    def add(self, event: Event, history: Sequence[Event]) -> None:
        """Take in an event; `history` ends with it."""
        top = self.all[self.top]
        if event["event"] in (self.top, "check", "winners"):
            top.wanted = "RUNNING"
        match event["event"]:
            case self.top:
                self._open(event)
            case "check":
                run = self._run(event["trajectory"], "trajectory", event["trajectory"], self.top)
                run.wanted = "RUNNING"
                curves = _pick(event, "epoch", "loss", "validation_accuracy", "train_macs")
                distances = {f"mask_distance_{r}": d for r, d in event["distances"].items()}
                run.measure(curves | distances, event["check"])
            case "ticket":
                self._add_ticket(event)
            case "proof":
                proof = _pick(event, "proof_accuracy", "proof_macs")
                self.all[event["ticket"]].measure(proof, event["rung"])
            case "trajectory":
                self._end_trajectory(event, history)
            case "winners" if self._space.optuna and top.status != "FINISHED":
                from raytickets.study import figures

                if drawn := figures(self._space, self._folder):
                    top.files["optuna.html"] = _page(drawn)
            case "epoch":
                run = self._retraining(event["run"])
                run.wanted = "RUNNING"
                curves = _pick(event, "loss", "validation_accuracy", "learning_rate")
                run.measure(curves, event["epoch"])
            case "retrained":
                self._end_retraining(event, len(history))
            case "end":
                for run in self.all.values():
                    run.wanted = "KILLED" if run.wanted == "RUNNING" else run.wanted
                top.wanted = "FINISHED" if event["state"] == "done" else "FAILED"
                lines = [f"**{event['state'].capitalize()}**: {event['reason']}"]
                lines = lines if event["reason"] else []
                if self.top == "comparison":
                    lines += [f"- {claim['sentence']}" for claim in comparison.claims(history)]
                lines += ["", ABOUT[self.top]] if lines else [ABOUT[self.top]]
                top.tags["mlflow.note.content"] = "\n".join(lines)

    def summarise(self, history: Sequence[Event]) -> None:
        """The totals, the table of all tickets and their plot, on the run at the top."""
        if self.top == "comparison":
            self._summarise_comparison(history)
            return
        tickets = halving.proved(history)
        retrained = {e["run"]: e for e in history if e["event"] == "retrained"}
        winners = next((e["tickets"] for e in history[::-1] if e["event"] == "winners"), [])
        tests = {key: event["test_accuracy"] for key, event in retrained.items()}
        totals: dict[str, float | None] = {"tickets": len(tickets), "winners": len(winners)}
        totals["dense_test_accuracy"] = tests.pop("dense", None)
        # Of the ticket that was best in validation: the best on test images would flatter.
        totals["winner_test_accuracy"] = tests.get(winners[0]) if winners else None
        totals["best_proof_accuracy"] = max((t["proof_accuracy"] for t in tickets), default=None)
        run, dense = self.all[self.top], self._opening["dense"]
        run.measure(totals, place=len(history))
        if not tickets:
            return
        rows = [
            _pick(t, "prune_ratio", "penalty", "seed", "proof_accuracy", "proof_rung")
            | {"test_accuracy": tests.get(t["ticket"]), "macs": t["macs"]}
            | {"share_of_dense_macs": t["macs"] / dense["macs"]}
            | _pick(t, "params", "draw_epoch", "mask_distance", "ticket")
            for t in tickets
        ]
        _show_table(run, "tickets.json", rows)
        run.files["accuracy_against_macs.png"] = plots.accuracy_against_macs(
            tickets, halving.front(tickets), dense, retrained
        )

    def _summarise_comparison(self, history: Sequence[Event]) -> None:
        run, rows = self.all[self.top], comparison.table(history)
        _show_table(run, "comparison.json", rows)
        means: dict[str, float | None] = {}
        for row in rows:
            if row["method"] == "dense":
                means["dense_test_accuracy"] = row["test_accuracy"]
            else:
                name = f"{row['method']}_{row['prune_ratio']:g}"
                means[f"{name}_test_accuracy"] = row["test_accuracy"]
                means[f"{name}_cost_to_dense"] = row["macs_to_dense"]
        run.measure(means, place=len(history))
        if any(row["n"] for row in rows):
            figure = plots.methods_against_macs(comparison.runs(history))
            run.files["accuracy_against_macs.png"] = figure

    def _open(self, event: Event) -> None:
        run = self.all[self.top]
        facts = _pick(event, "fingerprint", "channels", "dense", "versions")
        run.params = _flat(event["space"] | facts | {"images": event["data"]})
        run.files["space.json"] = event["space"]
        run.tags["mlflow.note.content"] = ABOUT[self.top]

    def _add_ticket(self, event: Event) -> None:
        trajectory, ratio = event["trajectory"], f"{event['prune_ratio']:g}"
        self._run(trajectory, "trajectory", trajectory, self.top)
        name = f"ratio{ratio}-{trajectory}"
        if self.top == "comparison":
            method, seed = event["method"], event["seed"]
            name = f"dense-seed{seed}" if method == "dense" else f"{method}-{ratio}-seed{seed}"
        run = self._run(event["ticket"], "ticket", name, trajectory)
        run.wanted = "FINISHED"
        facts = _pick(event, "method", "penalty", "prune_ratio", "learning_rate", "seed")
        facts |= {"stop_rule": event["rule"], "network": self._space.network.name}
        run.params = _known(facts)
        run.measure(_pick(event, "macs", "params", "draw_epoch", "mask_distance"))
        if self.top == "comparison":
            self._searches[event["ticket"]] = event["search"]
            _count(run, "search", event["search"])
        else:
            run.measure(_pick(event, "proof_accuracy", "proof_macs"), step=1)
        if run.status == "FINISHED":
            return  # From an earlier time, files and all.
        files = self._folder / event["path"]
        if files.is_dir():
            run.files["ticket"] = files
        if event["method"] != "dense":
            run.files["kept_channels.png"] = plots.kept_channels(event["kept"])

    def _end_trajectory(self, event: Event, history: Sequence[Event]) -> None:
        key, state = event["trajectory"], event["state"]
        run = self._run(key, "trajectory", key, self.top)
        run.wanted = "FAILED" if state in ("diverged", "failed") else "FINISHED"
        space = self._space.with_changes(event["changes"])
        run.params = _known(_pick(event, "penalty", "seed")) | event["changes"]
        run.params["learning_rate"] = space.training.learning_rate
        run.params["method"] = event["method"]
        run.measure(_pick(event, "epochs", "seconds"), place=len(history))
        run.tags |= {f"raytickets.ratio_{r}": s for r, s in event["ratios"].items()}
        run.tags |= {"raytickets.state": state, "mlflow.note.content": event["reason"]}
        tickets = {
            e["ticket"]: e for e in history if e["event"] == "ticket" and e["trajectory"] == key
        }
        if run.status == "FINISHED":
            return
        for one in (run, *(self.all[ticket] for ticket in tickets)):
            self._explain(one, space)
        self._draw_distances(event, tickets, space, history)

    def _draw_distances(
        self,
        event: Event,
        tickets: Mapping[str, Event],
        space: SearchSpace,
        history: Sequence[Event],
    ) -> None:
        key, rule = event["trajectory"], space.stop_rule
        mine = [e for e in history if e["event"] == "check" and e["trajectory"] == key]
        checks = list({check["check"]: check for check in mine}.values())
        draws = {
            f"{ticket['prune_ratio']:g}": ticket["draw_epoch"]
            for ticket in tickets.values()
            if ticket["draw_epoch"] is not None
        }
        curves = {
            ratio: [check["distances"].get(ratio) for check in checks]
            for ratio in (checks[-1]["distances"] if checks else ())
        }
        matrix = event["distances_matrix"]
        if len(matrix["epochs"]) > 1:
            figure = plots.distance_matrix(matrix["epochs"], matrix["ratios"], draws, rule)
            self.all[key].files["mask_distance_matrix.png"] = figure
        if not curves:
            return
        epochs = [check["epoch"] for check in checks]
        figure = plots.distance_curve(epochs, curves, draws, rule)
        self.all[key].files["mask_distance.png"] = figure
        for id, ticket in tickets.items():
            ratio = f"{ticket['prune_ratio']:g}"
            if ratio in draws:
                until = [e for e in epochs if e <= draws[ratio]]
                curve = {ratio: curves[ratio][: len(until)]}
                figure = plots.distance_curve(until, curve, draws, rule)
                self.all[id].files["mask_distance.png"] = figure

    def _retraining(self, key: str) -> Run:
        if key != "dense":
            return self.all[key]
        run = self._run(key, key, key, self.top)
        run.params = {"method": "dense", "seed": self._space.seeds[0]}
        run.params["network"] = self._space.network.name
        return run

    def _end_retraining(self, event: Event, place: int) -> None:
        run = self._retraining(event["run"])
        run.wanted = "FINISHED"
        facts = ("test_accuracy", "train_macs", "seconds", "num_workers")
        run.measure(_pick(event, *facts), place=place)
        if event["run"] == "dense":  # A ticket said so when it was drawn.
            run.measure(_pick(event, "macs", "params"))
            if run.status != "FINISHED":
                self._explain(run, self._space)
        if event["path"]:
            run.tags["raytickets.retrained_path"] = str(self._folder / event["path"])
        if event["run"] in self._searches and "ledger" in event:  # Retraining by hand has none.
            run.measure(_pick(event, "latency_ms", "relative_latency"), place=place)
            _count(run, "train", event["ledger"], place)
            parts = [self._searches[event["run"]], event["ledger"]]
            # A search of no work costs nothing, whatever could be measured.
            parts = [part for part in parts if part["samples"]]
            joules = [part["joules"] for part in parts]
            known = None not in joules
            run.measure({"total_joules": sum(joules) if known else None}, place=place)
            run.tags["raytickets.energy"] = " + ".join(dict.fromkeys(p["energy"] for p in parts))

    def _explain(self, run: Run, space: SearchSpace) -> None:
        """What it takes, with the seed among the params, to get the same again."""
        run.files["space.json"] = space.as_dict()
        run.tags["raytickets.fingerprint"] = space.fingerprint
        run.tags["raytickets.versions"] = json.dumps(self._opening["versions"])

    def _run(self, key: str, kind: str, name: str, parent: str = "") -> Run:
        return self.all.setdefault(key, Run(kind, name, parent))


def _count(run: Run, stage: str, ledger: Event, place: int = 0) -> None:
    names = ("forward_macs", "backward_macs", "samples", "seconds", "joules")
    run.measure({f"{stage}_{name}": ledger[name] for name in names}, place=place)
    macs = ledger["forward_macs"] + ledger["backward_macs"]
    run.measure({f"{stage}_macs": macs}, place=place)


def _show_table(run: Run, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A file that MLflow shows as a table, as its log_table writes it, which would append to it."""
    data = [[_short(value) for value in row.values()] for row in rows]
    run.files[name] = {"columns": list(rows[0]), "data": data}
    run.tags["mlflow.loggedArtifacts"] = json.dumps([{"path": name, "type": "table"}])


def _page(figures: Mapping[str, Any]) -> str:
    """Plotly's figures below each other, with its code, so that they show without a network."""
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=place == 0, default_height="480px")
        for place, figure in enumerate(figures.values())
    ]
    return "\n".join(["<!doctype html>", '<meta charset="utf-8">', *parts])


def _pick(event: Event, *keys: str) -> dict[str, Any]:
    return {key: event[key] for key in keys}


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
