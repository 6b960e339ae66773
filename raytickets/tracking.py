"""MLflow, fed from the journal's events in the sweep's driver; the only module that knows it.

One experiment for each search space; in it a run for the sweep, below that one for each trajectory
and for the dense reference, and below its trajectory one for each ticket.
"""

import os
import shlex
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

# By default MLflow retries a dead server for minutes, prints a line for every run, and reports to
# its makers that it was used.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from raytickets import halving, plots
from raytickets.config import InputError, StopRule
from raytickets.journal import Event

GATHER_S = 0.5
"""How long events gather before they are sent together."""
LONGEST_PAUSE_S = 60.0
LAST_TRIES = 3
TOKEN = "mlflow_id"
"""File in the sweep's folder that ties it to its runs: names may be used again."""
SQLITE = "sqlite:///"
ABOUT = """This sweep looked for early-bird tickets: smaller networks that train as well.

Below it are its trajectories (trainings of the dense network under a penalty), below each its
tickets, and the dense network, retrained like the winners to compare them with. The table and the
plot of all tickets are under *Artifacts*. To list tickets alone, filter runs by
`tags."raytickets.kind" = "ticket"` and sort them by a metric, such as `proof_accuracy`.
"""


def resolve_uri(uri: str | None = None) -> str:
    """The MLflow store to use: `uri`, else MLFLOW_TRACKING_URI, else ./mlflow.db.

    The path of an SQLite file comes back absolute.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    if uri.startswith(SQLITE) and uri != SQLITE:
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    return uri


def prepare_store(uri: str) -> None:
    """Create or open the store, before several processes would race to.

    Raises InputError if it cannot be used; a server that does not answer takes 15 s to tell.
    """
    try:
        database = _database(uri)
        if database:
            database.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(database if database.exists() else database.parent, os.W_OK):
                raise PermissionError(f"no permission to write {database}")
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow lets those of SQLAlchemy, requests and the system through.
        raise InputError("tracking_uri", uri, _one_line(error)) from error


def ui_command(uri: str) -> str:
    """What shows the runs: a shell command for a local store, a server's own address."""
    if _is_server(uri):
        return uri
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def tickets_address(uri: str, space: str) -> str:
    """Where the UI compares the tickets of a search space, the most accurate first.

    For a local store that is where `ui_command` serves it unless told another port. Without the
    query MLflow opens on a page about language models, and folds tickets into their trajectories.
    """
    experiment = MlflowClient(uri).get_experiment_by_name(f"raytickets/{space}")
    page = f"experiments/{experiment.experiment_id}/runs" if experiment else "experiments"
    query = {
        "workflowType": "machine_learning",
        "searchFilter": 'tags."raytickets.kind" = "ticket"',
        "orderByKey": "metrics.`proof_accuracy`",
        "orderByAsc": "false",
        "compareRunsMode": "CHART",
    }
    server = uri.rstrip("/") if _is_server(uri) else "http://127.0.0.1:5000"
    return f"{server}/#/{page}?{urlencode(query, quote_via=quote)}"


class Tracker:
    """Sends events to MLflow from a thread of its own; the sweep never waits for it or fails by it.

    A sweep that goes on after its driver died writes its whole journal again: what MLflow has
    already is found and not doubled. While the store cannot be reached, events wait.
    """

    def __init__(self, uri: str, sweep_folder: Path):
        self._runs = _Runs(uri, sweep_folder)
        self._events: list[Event] = []
        self._sent = 0
        self._reason = "it took too long"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def write(self, event: Event) -> None:
        self._events.append(event)

    def close(self, timeout_s: float = 120) -> str | None:
        """Wait for delivery; a line about what could not be delivered, None if all was."""
        self._closing.set()
        self._thread.join(timeout_s)
        owed = len(self._events) - self._sent
        return f"{owed} events did not reach MLflow: {self._reason}" if owed else None

    def _send(self) -> None:
        pause, last_tries = GATHER_S, LAST_TRIES
        while last_tries:
            closing = self._closing.wait(pause)
            try:
                # All at once: a journal written again then ends where MLflow has it already.
                while self._sent < (count := len(self._events)):
                    self._runs.deliver(self._events[:count], self._sent)
                    self._sent, pause = count, GATHER_S
            except Exception as error:
                self._reason = _one_line(error)
                self._runs.forget()
                pause = min(2 * pause, LONGEST_PAUSE_S)
                if closing:
                    last_tries -= 1
                    time.sleep(GATHER_S)
            else:
                if closing:
                    return


@dataclass
class _Run:
    id: str
    started: int
    """Milliseconds since 1970."""
    status: str
    wanted: str
    metrics: list[Metric] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def measure(self, values: Mapping[str, float | None], step: int = 0, place: int = 0) -> None:
        """Add metrics, stamped by their step and the event's place in the journal, not by the time.

        MLflow keeps equal points once, so that an event may be sent again, and shows the latest.
        """
        at = self.started + step + place
        pairs = values.items()
        self.metrics += [Metric(key, value, at, step) for key, value in pairs if value is not None]


class _Runs:
    """A sweep's runs in MLflow; every delivery may be repeated."""

    def __init__(self, uri: str, folder: Path):
        self._uri, self._folder = uri, folder
        token = folder / TOKEN
        if not token.exists():
            token.write_text(uuid.uuid4().hex, encoding="utf-8")
        self._token = token.read_text(encoding="utf-8")
        self.forget()

    def forget(self) -> None:
        """After a failure nobody knows what arrived: look again."""
        self._known: dict[str, _Run] = {}

    def deliver(self, history: Sequence[Event], start: int) -> None:
        """Send `history[start:]`; what comes before was sent already."""
        self._client = MlflowClient(self._uri)
        self._sweep = history[0]
        if not self._known:
            self._find()
        for index in range(start, len(history)):
            self._add(history[index], history[: index + 1])
        if {"winners", "retrained", "end"} & {event["event"] for event in history[start:]}:
            self._summarise(history)
        for run in self._known.values():
            self._flush(run)

    def _find(self) -> None:
        space = self._sweep["space"]["name"]
        experiment = self._client.get_experiment_by_name(f"raytickets/{space}")
        if experiment is None:
            database = _database(self._uri)
            folder = database and (database.parent / "mlartifacts" / space).as_uri()
            self._experiment = self._client.create_experiment(f"raytickets/{space}", folder)
        else:
            self._experiment = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                self._client.restore_experiment(self._experiment)
        mine = f"tags.`raytickets.sweep_id` = '{self._token}'"
        for run in self._client.search_runs([self._experiment], mine, max_results=50_000):
            info = run.info
            known = _Run(info.run_id, info.start_time, info.status, info.status)
            self._known[run.data.tags["raytickets.run"]] = known
        self._run("sweep", "sweep", self._sweep["name"])

    def _run(self, key: str, kind: str, name: str, parent: str = "") -> _Run:
        if key not in self._known:
            tags = {
                "raytickets.kind": kind,
                "raytickets.run": key,
                "raytickets.sweep": self._sweep["name"],
                "raytickets.sweep_id": self._token,
            }
            if parent:
                tags["mlflow.parentRunId"] = self._known[parent].id
            info = self._client.create_run(self._experiment, tags=tags, run_name=name).info
            self._known[key] = _Run(info.run_id, info.start_time, info.status, info.status)
        return self._known[key]

    def _add(self, event: Event, history: Sequence[Event]) -> None:
        sweep, place = self._known["sweep"], len(history)
        if event["event"] in ("sweep", "check", "winners"):
            sweep.wanted = "RUNNING"
        match event["event"]:
            case "sweep":
                facts = _pick(event, "fingerprint", "channels", "dense", "versions")
                sweep.params = _flat(event["space"] | facts | {"images": event["data"]})
                sweep.tags["mlflow.note.content"] = ABOUT
            case "check":
                run = self._run(event["trajectory"], "trajectory", event["trajectory"], "sweep")
                run.wanted = "RUNNING"
                curves = _pick(event, "epoch", "loss", "validation_accuracy", "train_macs")
                distances = {f"mask_distance_{r}": d for r, d in event["distances"].items()}
                run.measure(curves | distances, event["check"])
            case "ticket":
                self._add_ticket(event, history)
            case "proof":
                proof = _pick(event, "proof_accuracy", "proof_macs")
                self._known[event["ticket"]].measure(proof, event["rung"])
            case "trajectory":
                key, state = event["trajectory"], event["state"]
                run = self._run(key, "trajectory", key, "sweep")
                run.wanted = "FAILED" if state in ("diverged", "failed") else "FINISHED"
                run.params = _pick(event, "penalty", "seed")
                run.params["learning_rate"] = self._sweep["space"]["training"]["learning_rate"]
                run.measure(_pick(event, "epochs", "seconds"), place=place)
                run.tags = {f"raytickets.ratio_{r}": s for r, s in event["ratios"].items()}
                run.tags |= {"raytickets.state": state, "mlflow.note.content": event["reason"]}
                if run.status != "FINISHED":
                    self._draw_distances(run, history, key)
            case "epoch":
                run = self._retraining(event["run"])
                run.wanted = "RUNNING"
                curves = _pick(event, "loss", "validation_accuracy", "learning_rate")
                run.measure(curves, event["epoch"])
            case "retrained":
                run = self._retraining(event["run"])
                run.wanted = "FINISHED"
                facts = ("test_accuracy", "train_macs", "seconds", "num_workers")
                run.measure(_pick(event, *facts), place=place)
                if event["run"] == "dense":  # A ticket said so when it was drawn.
                    run.measure(_pick(event, "macs", "params"))
                if event["path"]:
                    run.tags["raytickets.retrained_path"] = str(self._folder / event["path"])
            case "end":
                for run in self._known.values():
                    run.wanted = "KILLED" if run.wanted == "RUNNING" else run.wanted
                sweep.wanted = "FINISHED" if event["state"] == "done" else "FAILED"
                reason = f"**{event['state'].capitalize()}**: {event['reason']}\n\n"
                sweep.tags["mlflow.note.content"] = (reason if event["reason"] else "") + ABOUT

    def _add_ticket(self, event: Event, history: Sequence[Event]) -> None:
        trajectory, ratio = event["trajectory"], f"{event['prune_ratio']:g}"
        self._run(trajectory, "trajectory", trajectory, "sweep")
        run = self._run(event["ticket"], "ticket", f"ratio{ratio}-{trajectory}", trajectory)
        run.wanted = "FINISHED"
        network = self._sweep["space"]["network"]["name"]
        run.params = _pick(event, "penalty", "prune_ratio", "learning_rate", "seed")
        run.params |= {"stop_rule": event["rule"], "network": network}
        run.measure(_pick(event, "macs", "params", "draw_epoch", "mask_distance"))
        run.measure(_pick(event, "proof_accuracy", "proof_macs"), step=1)
        if run.status == "FINISHED":
            return  # From an earlier time, artifacts and all.
        files = self._folder / event["path"]
        if files.is_dir():
            self._client.log_artifacts(run.id, str(files), "ticket")
        self._draw_distances(run, history, trajectory, ratio)
        self._client.log_figure(run.id, plots.kept_channels(event["kept"]), "kept_channels.png")

    def _retraining(self, key: str) -> _Run:
        return self._known[key] if key != "dense" else self._run(key, key, key, "sweep")

    def _draw_distances(
        self, run: _Run, history: Sequence[Event], trajectory: str, only: str | None = None
    ) -> None:
        mine = [event for event in history if event.get("trajectory") == trajectory]
        checks = {event["check"]: event for event in mine if event["event"] == "check"}.values()
        draws = {f"{e['prune_ratio']:g}": e["draw_epoch"] for e in mine if e["event"] == "ticket"}
        ratios = [only] if only else [f"{r:g}" for r in self._sweep["space"]["prune_ratios"]]
        if not checks:
            return
        figure = plots.distance_curve(
            [check["epoch"] for check in checks],
            {ratio: [check["distances"][ratio] for check in checks] for ratio in ratios},
            draws,
            StopRule(**self._sweep["space"]["stop_rule"]),
        )
        self._client.log_figure(run.id, figure, "mask_distance.png")

    def _summarise(self, history: Sequence[Event]) -> None:
        """The sweep's totals, the table of its tickets and their plot."""
        run, dense = self._known["sweep"], self._sweep["dense"]
        tickets = halving.proved(history)
        retrained = {e["run"]: e for e in history if e["event"] == "retrained"}
        winners = next((e["tickets"] for e in history[::-1] if e["event"] == "winners"), [])
        tests = {key: event["test_accuracy"] for key, event in retrained.items()}
        totals: dict[str, float | None] = {"tickets": len(tickets), "winners": len(winners)}
        totals["dense_test_accuracy"] = tests.pop("dense", None)
        # Of the ticket that was best in validation: the best on test images would flatter.
        totals["winner_test_accuracy"] = tests.get(winners[0]) if winners else None
        totals["best_proof_accuracy"] = max((t["proof_accuracy"] for t in tickets), default=None)
        run.measure(totals)
        if not tickets:
            return
        rows = [
            _pick(t, "prune_ratio", "penalty", "seed", "proof_accuracy", "proof_rung")
            | {"test_accuracy": tests.get(t["ticket"]), "macs": t["macs"]}
            | {"share_of_dense_macs": t["macs"] / dense["macs"]}
            | _pick(t, "params", "draw_epoch", "mask_distance", "ticket")
            for t in tickets
        ]
        data = [[_short(value) for value in row.values()] for row in rows]
        table = {"columns": list(rows[0]), "data": data}
        # As log_table does, which would append to the rows of an earlier time.
        self._client.log_dict(run.id, table, "tickets.json")
        run.tags["mlflow.loggedArtifacts"] = '[{"path": "tickets.json", "type": "table"}]'
        figure = plots.accuracy_against_macs(tickets, halving.front(tickets), dense, retrained)
        self._client.log_figure(run.id, figure, "accuracy_against_macs.png")

    def _flush(self, run: _Run) -> None:
        params = [Param(key, str(value)[:500]) for key, value in run.params.items()]
        tags = [RunTag(key, value) for key, value in run.tags.items()]
        # The most that MLflow takes in one call: 100 params, 100 tags, 1,000 of everything.
        parts = (_chunks(run.metrics, 800), _chunks(params, 100), _chunks(tags, 100))
        for some_metrics, some_params, some_tags in zip_longest(*parts, fillvalue=()):
            self._client.log_batch(run.id, some_metrics, some_params, some_tags)
        if run.wanted == "RUNNING" and run.status != "RUNNING":
            self._client.update_run(run.id, "RUNNING")
        elif run.wanted != run.status:
            self._client.set_terminated(run.id, run.wanted)
        run.status, run.metrics, run.params, run.tags = run.wanted, [], {}, {}


def _chunks(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _pick(event: Event, *keys: str) -> dict[str, Any]:
    return {key: event[key] for key in keys}


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


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _database(uri: str) -> Path | None:
    """The file of an SQLite store, None for any other store."""
    if not uri.startswith("sqlite:"):
        return None
    if not uri.startswith(SQLITE) or uri == SQLITE:
        raise ValueError(f"a file is missing: {SQLITE}<path>")
    return Path(uri.removeprefix(SQLITE))


def _one_line(error: Exception) -> str:
    # The HTTP client wraps what happened in what it was doing, at length.
    text = str(error).split("(Caused by ")[-1].strip()
    return text.split("\n")[0][:300] or type(error).__name__
