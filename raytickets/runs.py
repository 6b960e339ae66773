"""What MLflow shows of a journal: runs with their params, metrics, tags and files.

A sweep is a run, and so is a comparison. Below it is one for each trajectory (in a comparison: for
each source) and for the dense reference of a sweep, and below its trajectory one for each ticket.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytickets import comparison, halving, plots, storage
from raytickets.config import InputError, SearchSpace, masked
from raytickets.journal import Event
from raytickets.sweep import goes_on, own_retrainings, ticket_folder

log = logging.getLogger("raytickets")

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
    artifacts: str = ""
    """The address of its files."""
    status: str = ""
    """In MLflow."""
    wanted: str = "RUNNING"
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    """Names, values, steps, and which of their kind they are where a later one replaces it."""
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    """By name: figures, plain values as JSON, texts, or the path of a folder, if it is there."""

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
        self._history: list[Event] = []
        """Without checks and epochs, which are most of a journal."""
        self._checks: dict[str, dict[int, Event]] = {}  # Until their trajectory ends.
        self._shown: Counter[str] = Counter()
        """The last step of a trajectory's curves."""
        self._given_up: Counter[str] = Counter()
        """The last step of those that it showed before it began anew."""
        self._retries: dict[str, list[str]] = {}
        self._totals: dict[str, float | None] = {}
        self._told: Counter[tuple[str, str]] = Counter()
        """How many events of a kind a run had."""
        self.top: str = opening["event"]
        self.all = dict(found)
        self._searches: dict[str, Event] = {}
        self._run(self.top, self.top, opening["name"])

    def add(self, event: Event) -> None:
        """Take in the next event of the journal."""
        top = self.all[self.top]
        if event["event"] == self.top or goes_on(event):
            top.wanted = "RUNNING"
        if event["event"] not in ("check", "epoch"):
            self._history.append(event)
        match event["event"]:
            case self.top:
                self._open(event)
            case "check":
                run = self._run(event["trajectory"], "trajectory", event["trajectory"], self.top)
                run.wanted = "RUNNING"
                curves = _pick(event, "epoch", "loss", "validation_accuracy", "train_macs")
                distances = {f"mask_distance_{r}": d for r, d in event["distances"].items()}
                step = self._given_up[event["trajectory"]] + event["check"]
                run.measure(curves | distances, step)
                self._shown[event["trajectory"]] = max(self._shown[event["trajectory"]], step)
                self._checks.setdefault(event["trajectory"], {})[event["check"]] = event
            case "ticket":
                self._add_ticket(event)
            case "proof":
                proof = _pick(event, "proof_accuracy", "proof_macs")
                run = self.all[event["ticket"]]
                run.measure(proof, event["rung"])
                run.wanted = "FINISHED"
            case "trajectory":
                self._end_trajectory(event)
            case "winners" if self._space.optuna and top.status != "FINISHED":
                from raytickets.study import figures

                try:
                    drawn = figures(self._space, self._folder)
                except InputError as error:  # The study's database may be out of reach from here.
                    log.warning(f"Optuna's figures are left out: {error}")
                    drawn = {}
                if drawn:
                    top.files["optuna.html"] = plots.page(drawn)
            case "epoch":
                run = self._retraining(event["run"])
                run.wanted = "RUNNING"
                curves = _pick(event, "loss", "validation_accuracy", "learning_rate")
                run.measure(curves, event["epoch"], self._told["retrained", event["run"]])
            case "retrained":
                self._end_retraining(event)
            case "retry":
                self._retry(event)
            case "stopped":
                self._retraining(event["run"]).wanted = "KILLED"
            case "end":
                self._end(event)
        if event["event"] in ("winners", "retrained", "end"):
            self._add_totals()

    def summarise(self) -> None:
        """The table of all tickets and their plot, on the run at the top."""
        run, history = self.all[self.top], self._history
        if self.top == "comparison":
            rows = comparison.table(history)
            _show_table(run, "comparison.json", rows)
            if any(row["n"] for row in rows):
                figure = plots.methods_against_macs(comparison.runs(history))
                run.files["accuracy_against_macs.png"] = figure
            return
        tickets, dense = halving.proved(history), self._opening["dense"]
        if not tickets:
            return
        retrained = own_retrainings(self._opening, history)
        tests = {key: event["test_accuracy"] for key, event in retrained.items()}
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

    def candidates(self) -> list[Event]:
        """The `retrained` events of a sweep's winners, by its own recipe, if it ended well and
        their files are here."""
        history = self._history
        ends = [place for place, e in enumerate(history) if e["event"] == "end"]
        if self.top != "sweep" or not ends or history[ends[-1]]["state"] != "done":
            return []
        winners = next((e["tickets"] for e in history[::-1] if e["event"] == "winners"), [])
        retrained = own_retrainings(self._opening, history)
        found = [event for run, event in retrained.items() if run in winners]
        return [e for e in found if storage.fetch(self._folder / e["path"]).is_dir()]

    def _add_totals(self) -> None:
        history = self._history
        totals: dict[str, float | None] = {}
        if self.top == "comparison":
            for row in comparison.table(history):
                if row["method"] == "dense":
                    totals["dense_test_accuracy"] = row["test_accuracy"]
                else:
                    name = f"{row['method']}_{row['prune_ratio']:g}"
                    totals[f"{name}_test_accuracy"] = row["test_accuracy"]
                    totals[f"{name}_cost_to_dense"] = row["macs_to_dense"]
        else:
            tickets = halving.proved(history)
            winners = next((e["tickets"] for e in history[::-1] if e["event"] == "winners"), [])
            retrained = own_retrainings(self._opening, history)
            tests = {run: event["test_accuracy"] for run, event in retrained.items()}
            totals = {"tickets": len(tickets), "winners": len(winners)}
            totals["dense_test_accuracy"] = tests.get("dense")
            # Of the ticket that was best in validation: the best on test images would flatter.
            totals["winner_test_accuracy"] = tests.get(winners[0]) if winners else None
            accuracies = [ticket["proof_accuracy"] for ticket in tickets]
            totals["best_proof_accuracy"] = max(accuracies, default=None)
        changed = {key: total for key, total in totals.items() if total != self._totals.get(key)}
        self._totals |= changed
        self.all[self.top].measure(changed, place=self._place("totals", self.top))

    def _place(self, kind: str, key: str) -> int:
        self._told[kind, key] += 1
        return self._told[kind, key]

    def _retry(self, event: Event) -> None:
        key = event.get("trajectory")
        run = self._run(key, "trajectory", key, self.top) if key else self._retraining(event["run"])
        run.wanted = "RUNNING"
        if event.get("anew"):
            # What MLflow has stays there, and its latest step is what it shows of a run.
            if key:
                self._given_up[key] = self._shown[key]
                self._checks.pop(key, None)
            else:
                self._place("retrained", event["run"])
        reasons = self._retries.setdefault(key or event["run"], [])
        reasons.append(event["reason"])
        run.measure({"retries": len(reasons)}, len(reasons))
        run.tags["raytickets.retry_reasons"] = "\n".join(reasons)[:5000]

    def _end(self, event: Event) -> None:
        top, state = self.all[self.top], event["state"]
        for run in self.all.values():
            if run.wanted == "RUNNING":
                run.wanted = "KILLED"
                if run.kind == "trajectory":
                    run.tags["raytickets.state"] = "interrupted"
        top.wanted = {"done": "FINISHED", "interrupted": "KILLED"}.get(state, "FAILED")
        lines = [f"**{state.capitalize()}**: {event['reason']}"] if event["reason"] else []
        if self.top == "comparison":
            lines += [f"- {claim['sentence']}" for claim in comparison.claims(self._history)]
        lines += ["", ABOUT[self.top]] if lines else [ABOUT[self.top]]
        top.tags["mlflow.note.content"] = "\n".join(lines)

    def _open(self, event: Event) -> None:
        run = self.all[self.top]
        facts = _pick(event, "fingerprint", "channels", "dense", "versions")
        run.params = _flat(masked(event["space"]) | facts | {"images": event["data"]})
        run.files["space.json"] = masked(event["space"])
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
        run.files["ticket"] = ticket_folder(self._folder, event["path"])
        if event["method"] != "dense":
            run.files["kept_channels.png"] = plots.kept_channels(event["kept"])

    def _end_trajectory(self, event: Event) -> None:
        key, state = event["trajectory"], event["state"]
        run = self._run(key, "trajectory", key, self.top)
        run.wanted = "FAILED" if state in ("diverged", "failed") else "FINISHED"
        space = self._space.with_changes(event["changes"])
        run.params = _known(_pick(event, "penalty", "seed")) | masked(event["changes"])
        if self.top == "sweep":  # The sources of a comparison have recipes of their own.
            run.params["learning_rate"] = space.training.learning_rate
        run.params["method"] = event["method"]
        run.measure(_pick(event, "epochs", "seconds"), place=self._place("trajectory", key))
        run.tags |= {f"raytickets.ratio_{r}": s for r, s in event["ratios"].items()}
        run.tags |= {"raytickets.state": state, "mlflow.note.content": event["reason"]}
        drawn = halving.drawn(self._history)
        tickets = {e["ticket"]: e for e in drawn if e["trajectory"] == key}
        checks = list(self._checks.get(key, {}).values())
        if state != "failed":  # Its next try may go on from here.
            self._checks.pop(key, None)
        if run.status == "FINISHED":
            return
        for one in (run, *(self.all[ticket] for ticket in tickets)):
            self._explain(one, space)
        self._draw_distances(event, tickets, space, checks)

    def _draw_distances(
        self,
        event: Event,
        tickets: Mapping[str, Event],
        space: SearchSpace,
        checks: Sequence[Event],
    ) -> None:
        key, rule = event["trajectory"], space.stop_rule
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

    def _end_retraining(self, event: Event) -> None:
        run, place = self._retraining(event["run"]), self._place("retrained", event["run"])
        run.wanted = "FINISHED"
        facts = ("test_accuracy", "train_macs", "seconds", "num_workers")
        run.measure(_pick(event, *facts), place=place)
        if event["run"] == "dense":  # A ticket said so when it was drawn.
            run.measure(_pick(event, "macs", "params"))
            if run.status != "FINISHED":
                self._explain(run, self._space)
        if "recipe" in event:
            run.files["retraining.json"] = event["recipe"]
        if event["path"]:
            run.tags["raytickets.retrained_path"] = masked(
                storage.address(self._folder / event["path"])
            )
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
        run.files["space.json"] = masked(space.as_dict())
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
