"""An MLflow store: which one is used, and how the runs of a journal get there.

The best ticket of a space is the version of the registered model `raytickets-<space>` with the
alias `champion`. Once a sweep ended well, the most accurate (in validation) of its retrained
winners becomes it if there is none yet, else the most accurate of those that dominate it: no less
accurate with no more MACs, and better in one of the two. The source of a version is the retrained
ticket, in the folder `retrained` of its run; its tags say what it is. A version without these tags,
which a person made the champion, stays it.
"""

import contextlib
import fcntl
import json
import os
import re
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

# By default MLflow retries a dead server for minutes, prints a line for every run, and reports to
# its makers that it was used.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from raytickets import storage
from raytickets.config import InputError, masked
from raytickets.journal import Event
from raytickets.plan import check_store
from raytickets.runs import Run, Runs

TOKEN, RECORDED = "mlflow_id", "mlflow_uri"
"""Files in the journal's folder: what ties it to its runs, as names may be used again, and the
store that they are in.
"""
SQLITE = "sqlite:///"
CHAMPION = "champion"


class Stopped(RuntimeError):
    """Nobody waits for the store any more."""


def resolve_uri(uri: str | None = None) -> str:
    """The MLflow store to use: `uri`, else MLFLOW_TRACKING_URI, else ./mlflow.db.

    The path of an SQLite file comes back absolute.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    if uri.startswith(SQLITE) and uri != SQLITE:
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    return uri


def prepare_store(uri: str) -> str | None:
    """Create or open the store; one process at a time creates an SQLite file.

    Returns one line about a server that does not answer now, which a sweep need not wait for, and
    None if all is well. Raises InputError on a store that cannot be used: no such scheme, a file
    that cannot be written, credentials that are refused, or what is no MLflow.
    """
    check_store(uri)
    try:
        if is_server(uri):
            return _ask(uri)
        database = _database(uri)
        with _locked(database) if database else contextlib.nullcontext():
            MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow lets those of SQLAlchemy, requests and the system through.
        raise InputError("tracking_uri", masked(uri), one_line(error)) from error
    return None


def recorded_uri(folder: Path) -> str | None:
    """The store that a sweep is in, with the environment's credentials if they are for it."""
    path = storage.fetch(folder / RECORDED, again=True)
    uri = path.read_text(encoding="utf-8") if path.exists() else None
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return given if given and without_user(given) == uri else uri


class Store:
    """A journal's runs in MLflow; whatever is sent may be sent again.

    What MLflow, its HTTP client and the system raise comes through, and Stopped after `stopped` is
    set; `is_passing` says whether the same call may succeed later.
    """

    def __init__(self, uri: str, folder: Path):
        self._uri, self._folder = uri, folder
        token = storage.fetch(folder / TOKEN, again=True)
        self._token = token.read_text(encoding="utf-8") if token.exists() else uuid.uuid4().hex
        _write(token, self._token)  # Also what was there: its upload may have been cut off.
        _write(folder / RECORDED, without_user(uri))
        self.stopped = threading.Event()
        self.calls = 0
        """That were answered."""
        self._failed = False
        self.forget()

    def forget(self) -> None:
        """All is to be sent again: the store does not have what it was thought to have."""
        self.runs: Runs | None = None
        self._searched, self._summarised, self._crowned = False, True, True

    def look_again(self) -> None:
        """Nobody knows whether a call without an answer made a run."""
        self._searched, self._failed = False, True

    def open(self, opening: Event) -> None:
        """Begin with the `sweep` or `comparison` event."""
        self._client = MlflowClient(self._uri)
        self._opening = opening
        space = opening["space"]["name"]
        experiment = self._call(self._client.get_experiment_by_name, f"raytickets/{space}")
        if experiment is None:
            database = _database(self._uri)
            place = database and (database.parent / "mlartifacts" / space).as_uri()
            create = self._client.create_experiment
            self._experiment = self._call(create, f"raytickets/{space}", place)
        else:
            self._experiment = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                self._call(self._client.restore_experiment, self._experiment)
        self.runs = Runs(self._folder, opening, self._find(set()))

    def add(self, events: Sequence[Event]) -> None:
        """Take in the next events of the journal; nothing is sent."""
        assert self.runs
        kinds = {event["event"] for event in events}
        try:
            for event in events:
                self.runs.add(event)
        except Exception:
            self.forget()  # Some were taken in.
            raise
        self._summarised &= not kinds & {"winners", "retrained", "end"}
        self._crowned &= "end" not in kinds

    def flush(self) -> None:
        """Send what the store has not got."""
        assert self.runs
        if not self._searched:
            for key, found in self._find({run.id for run in self.runs.all.values()}).items():
                run = self.runs.all.get(key)
                if run and not run.id:
                    run.id, run.started = found.id, found.started
                    run.artifacts, run.status = found.artifacts, found.status
        if not self._summarised:
            self.runs.summarise()
            self._summarised = True
        for key, run in self.runs.all.items():
            if not run.id:
                self._create(key, run, self.runs.all[run.parent].id if run.parent else "")
        for run in reversed(self.runs.all.values()):
            self._send(run)  # What has ended has all its files, and those of what is below it.
        if not self._crowned:
            if self._failed:
                self._find({run.id for run in self.runs.all.values()})
            self._crown(self.runs.candidates())
            self._crowned = True

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self.stopped.is_set():
            raise Stopped("it took too long")
        answer = function(*args, **options)
        self.calls += 1
        return answer

    def _find(self, mine: set[str]) -> dict[str, Run]:
        """What MLflow has of this journal; a run made twice goes, `mine` being those to keep."""
        filtered = f"tags.`raytickets.journal` = '{self._token}'"
        search, found = self._client.search_runs, {}
        runs = self._call(search, [self._experiment], filtered, max_results=50_000)
        for run in sorted(runs, key=lambda run: (run.info.run_id not in mine, run.info.start_time)):
            key = run.data.tags["raytickets.run"]
            if key in found:
                self._call(self._client.delete_run, run.info.run_id)
                continue
            found[key] = Run(
                kind=run.data.tags["raytickets.kind"],
                name=run.info.run_name or "",
                parent="",
                id=run.info.run_id,
                started=run.info.start_time,
                artifacts=run.info.artifact_uri,
                status=run.info.status,
                wanted=run.info.status,
            )
        self._searched = True
        return found

    def _create(self, key: str, run: Run, parent: str) -> None:
        tags = {
            "raytickets.kind": run.kind,
            "raytickets.run": key,
            f"raytickets.{self._opening['event']}": self._opening["name"],
            "raytickets.journal": self._token,
        }
        if parent:
            tags["mlflow.parentRunId"] = parent
        create = self._client.create_run
        info = self._call(create, self._experiment, tags=tags, run_name=run.name).info
        run.id, run.started, run.status = info.run_id, info.start_time, info.status
        run.artifacts = info.artifact_uri

    def _send(self, run: Run) -> None:
        for name in list(run.files):
            self._upload(run, name, run.files[name])
            del run.files[name]
        # MLflow keeps equal points once, so that an event may be sent again, and shows the latest:
        # stamped by their step and their place among their kind, not by the time.
        metrics = [
            Metric(key, value, run.started + step + place, step)
            for key, value, step, place in run.metrics
        ]
        params = [Param(key, str(value)[:500]) for key, value in run.params.items()]
        tags = [RunTag(key, value) for key, value in run.tags.items()]
        # The most that MLflow takes in one call: 100 params, 100 tags, 1,000 of everything.
        parts = (_chunks(metrics, 800), _chunks(params, 100), _chunks(tags, 100))
        for batch in zip_longest(*parts, fillvalue=()):
            self._call(self._client.log_batch, run.id, *batch)
        run.metrics, run.params, run.tags = [], {}, {}
        if run.wanted == "RUNNING" and run.status != "RUNNING":
            self._call(self._client.update_run, run.id, "RUNNING")
        elif run.wanted != run.status:
            self._call(self._client.set_terminated, run.id, run.wanted)
        run.status = run.wanted

    def _upload(self, run: Run, name: str, content: Any) -> None:
        files = get_artifact_repository(run.artifacts, tracking_uri=self._uri)
        if isinstance(content, Path):
            if storage.fetch(content).is_dir():
                self._call(files.log_artifacts, str(content), name)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            if isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            elif isinstance(content, dict):
                path.write_text(json.dumps(content, indent=2), encoding="utf-8")
            else:
                content.savefig(path)
            self._call(files.log_artifact, str(path))

    def _crown(self, candidates: Sequence[Event]) -> None:
        """Make the best of these the champion if it may be."""
        name = f"raytickets-{self._opening['space']['name']}"
        if not candidates:
            return
        now = None
        with _unless("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            now = self._call(self._client.get_model_version_by_alias, name, CHAMPION)
        if now:
            if "raytickets.macs" not in now.tags:
                return  # A person chose it.
            champion = (
                float(now.tags["raytickets.validation_accuracy"]),
                -int(now.tags["raytickets.macs"]),
            )
            candidates = [event for event in candidates if _dominates(_merit(event), champion)]
            if not candidates:
                return
        else:
            with _unless("RESOURCE_ALREADY_EXISTS"):
                self._call(self._client.create_registered_model, name)
        assert self.runs
        best = max(candidates, key=_merit)
        run = self.runs.all[best["run"]]
        versions = self._call(
            self._client.search_model_versions, f"name='{name}' and run_id='{run.id}'"
        )
        if not versions:
            self._upload(run, "retrained", self._folder / best["path"])
            told = {"ticket": best["run"], self._opening["event"]: self._opening["name"]}
            told |= {key: best[key] for key in ("validation_accuracy", "test_accuracy", "macs")}
            tags = {f"raytickets.{key}": str(value) for key, value in told.items()}
            create, source = self._client.create_model_version, f"runs:/{run.id}/retrained"
            versions = [self._call(create, name, source, run.id, tags, await_creation_for=None)]
        set_alias = self._client.set_registered_model_alias
        self._call(set_alias, name, CHAMPION, versions[0].version)


@contextlib.contextmanager
def _unless(*codes: str) -> Iterator[None]:
    """Passes over MLflow's errors of these codes."""
    try:
        yield
    except MlflowException as error:
        if error.error_code not in codes:
            raise


def _merit(event: Event) -> tuple[float, int]:
    return event["validation_accuracy"], -event["macs"]


def _dominates(one: tuple[float, int], other: tuple[float, int]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def _ask(uri: str) -> str | None:
    """One line if a server does not answer; raises what tells that it never will as it should."""
    asked, credentials = "/api/2.0/mlflow/experiments/search", get_default_host_creds(uri)
    options: dict[str, Any] = {"timeout": 5, "max_retries": 0, "raise_on_status": False}
    try:
        response: Any = http_request(credentials, asked, "POST", json={"max_results": 1}, **options)
    except Exception as error:
        silent = one_line(error)
    else:
        if response.status_code == 200 and response.text.lstrip().startswith("{"):
            return None
        if response.status_code < 500 and response.status_code != 429:
            why = {401: "it asks for credentials", 403: "it refuses these credentials"}
            raise ValueError(why.get(response.status_code, "it does not answer as MLflow does"))
        silent = f"error {response.status_code}"
    return (
        f"MLflow at {without_user(uri)} does not answer ({silent}): "
        "what it does not get meanwhile is delivered when it does"
    )


@contextlib.contextmanager
def _locked(database: Path) -> Iterator[None]:
    """An SQLite file to oneself: of several that create its tables at once all but one fail."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    storage.keep(path)


def _chunks(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def without_user(uri: str) -> str:
    if _database(uri):  # A file's path may hold an @.
        return uri
    # The options of a database may hold a password as well.
    return re.sub(r"(://)\S*@", r"\1", uri).partition("?")[0]


def _database(uri: str) -> Path | None:
    """The file of an SQLite store, None for any other store."""
    if not uri.startswith("sqlite:"):
        return None
    return Path(uri.removeprefix(SQLITE))


def is_passing(error: Exception) -> bool:
    """Whether it is a call's that may succeed when it is tried again."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    else:
        status = getattr(getattr(error, "response", None), "status_code", 500)
    return isinstance(error, MlflowException | OSError) and (status >= 500 or status == 429)


def one_line(error: Exception) -> str:
    # The HTTP client wraps what happened in what it was doing, at length.
    text = str(error).split("(Caused by ")[-1].strip()
    return masked(text.split("\n")[0][:300]) or type(error).__name__
