"""MLflow, fed from the journal's events in the driver; the only module that knows it.

Each search space is an experiment; in it are the runs that `raytickets.runs` makes of a journal.
"""

import os
import shlex
import threading
import time
import uuid
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
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

from raytickets.config import InputError
from raytickets.journal import Event
from raytickets.runs import Run, Runs

GATHER_S = 0.5
"""How long events gather before they are sent together."""
LONGEST_PAUSE_S = 60.0
LAST_TRIES = 3
TOKEN = "mlflow_id"
"""File in the journal's folder that ties it to its runs: names may be used again."""
SQLITE = "sqlite:///"


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


def tickets_address(uri: str, space: str, kind: str, name: str) -> str:
    """Where the UI compares the tickets of a sweep or comparison (its `kind`), the best first.

    For a local store that is where `ui_command` serves it unless told another port. Without the
    query MLflow opens on a page about language models, and folds tickets into their trajectories.
    """
    experiment = MlflowClient(uri).get_experiment_by_name(f"raytickets/{space}")
    page = f"experiments/{experiment.experiment_id}/runs" if experiment else "experiments"
    accuracy = {"sweep": "proof_accuracy", "comparison": "test_accuracy"}[kind]
    tickets = 'tags."raytickets.kind" = "ticket"'
    query = {
        "workflowType": "machine_learning",
        "searchFilter": f'{tickets} and tags."raytickets.{kind}" = "{name}"',
        "orderByKey": f"metrics.`{accuracy}`",
        "orderByAsc": "false",
        "compareRunsMode": "CHART",
    }
    server = uri.rstrip("/") if _is_server(uri) else "http://127.0.0.1:5000"
    return f"{server}/#/{page}?{urlencode(query, quote_via=quote)}"


class Tracker:
    """Sends events to MLflow from a thread of its own; nothing waits for it or fails by it.

    What goes on after its driver died writes its whole journal again: what MLflow has already is
    found and not doubled. While the store cannot be reached, events wait.
    """

    def __init__(self, uri: str, folder: Path):
        self._store = _Store(uri, folder)
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
                    self._store.deliver(self._events[:count], self._sent)
                    self._sent, pause = count, GATHER_S
            except Exception as error:
                self._reason = _one_line(error)
                self._store.forget()
                pause = min(2 * pause, LONGEST_PAUSE_S)
                if closing:
                    last_tries -= 1
                    time.sleep(GATHER_S)
            else:
                if closing:
                    return


class _Store:
    """A journal's runs in MLflow; every delivery may be repeated."""

    def __init__(self, uri: str, folder: Path):
        self._uri, self._folder = uri, folder
        token = folder / TOKEN
        if not token.exists():
            token.write_text(uuid.uuid4().hex, encoding="utf-8")
        self._token = token.read_text(encoding="utf-8")
        self.forget()

    def forget(self) -> None:
        """After a failure nobody knows what arrived: look again."""
        self._runs: Runs | None = None

    def deliver(self, history: Sequence[Event], start: int) -> None:
        """Send `history[start:]`; what comes before was sent already."""
        self._client = MlflowClient(self._uri)
        opening = history[0]
        if self._runs is None:
            found = self._find(opening["space"]["name"])
            self._runs, start = Runs(self._folder, opening, found), 0
        runs = self._runs
        for index in range(start, len(history)):
            runs.add(history[index], history[: index + 1])
        if {"winners", "retrained", "end"} & {event["event"] for event in history[start:]}:
            runs.summarise(history)
        for key, run in runs.all.items():
            if not run.id:
                parent = runs.all[run.parent].id if run.parent else ""
                self._create(key, run, parent, opening)
            self._flush(run)

    def _find(self, space: str) -> dict[str, Run]:
        """What MLflow has of this journal."""
        experiment = self._client.get_experiment_by_name(f"raytickets/{space}")
        if experiment is None:
            database = _database(self._uri)
            folder = database and (database.parent / "mlartifacts" / space).as_uri()
            self._experiment = self._client.create_experiment(f"raytickets/{space}", folder)
        else:
            self._experiment = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                self._client.restore_experiment(self._experiment)
        mine = f"tags.`raytickets.journal` = '{self._token}'"
        found = self._client.search_runs([self._experiment], mine, max_results=50_000)
        return {
            run.data.tags["raytickets.run"]: Run(
                kind=run.data.tags["raytickets.kind"],
                name=run.info.run_name or "",
                parent="",
                id=run.info.run_id,
                started=run.info.start_time,
                status=run.info.status,
                wanted=run.info.status,
            )
            for run in found
        }

    def _create(self, key: str, run: Run, parent: str, opening: Event) -> None:
        tags = {
            "raytickets.kind": run.kind,
            "raytickets.run": key,
            f"raytickets.{opening['event']}": opening["name"],
            "raytickets.journal": self._token,
        }
        if parent:
            tags["mlflow.parentRunId"] = parent
        info = self._client.create_run(self._experiment, tags=tags, run_name=run.name).info
        run.id, run.started, run.status = info.run_id, info.start_time, info.status

    def _flush(self, run: Run) -> None:
        for name, content in run.files.items():
            if isinstance(content, Path):
                self._client.log_artifacts(run.id, str(content), name)
            elif isinstance(content, str):
                self._client.log_text(run.id, content, name)
            elif isinstance(content, dict):
                self._client.log_dict(run.id, content, name)
            else:
                self._client.log_figure(run.id, content, name)
        # MLflow keeps equal points once, so that an event may be sent again, and shows the latest:
        # stamped by their step and the event's place in the journal, not by the time.
        metrics = [
            Metric(key, value, run.started + step + place, step)
            for key, value, step, place in run.metrics
        ]
        params = [Param(key, str(value)[:500]) for key, value in run.params.items()]
        tags = [RunTag(key, value) for key, value in run.tags.items()]
        # The most that MLflow takes in one call: 100 params, 100 tags, 1,000 of everything.
        parts = (_chunks(metrics, 800), _chunks(params, 100), _chunks(tags, 100))
        for some_metrics, some_params, some_tags in zip_longest(*parts, fillvalue=()):
            self._client.log_batch(run.id, some_metrics, some_params, some_tags)
        if run.wanted == "RUNNING" and run.status != "RUNNING":
            self._client.update_run(run.id, "RUNNING")
        elif run.wanted != run.status:
            self._client.set_terminated(run.id, run.wanted)
        run.status = run.wanted
        run.metrics, run.params, run.tags, run.files = [], {}, {}, {}


def _chunks(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


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
