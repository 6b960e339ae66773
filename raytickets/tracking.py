"""Tells MLflow of a journal's events, in the driver while it runs or later with `raytickets sync`.

Each search space is an experiment; in it are the runs that `raytickets.runs` makes of a journal.
"""

import shlex
import threading
import time
from collections import deque
from pathlib import Path
from urllib.parse import quote, urlencode

from raytickets import storage
from raytickets.config import InputError, masked
from raytickets.journal import NAME, Event, read_journal
from raytickets.store import (
    MlflowClient,
    Store,
    is_passing,
    is_server,
    one_line,
    prepare_store,
    recorded_uri,
    resolve_uri,
    without_user,
)
from raytickets.sweep import Sweep

GATHER_S = 0.5
"""How long events gather before they are sent together; longer where sending takes longer."""
LONGEST_PAUSE_S = 15.0
LAST_TRIES = 5
"""How many tries without any progress end a delivery that is waited for."""


class Undelivered(RuntimeError):
    """MLflow has not got all of a journal; one line says why."""


def sync(folder: Path, uri: str | None = None) -> tuple[int, int]:
    """Deliver what MLflow has not got of a sweep's or comparison's journal, as often as you like.

    Returns how many events it has, which are all, and in how many runs. Without `uri` it goes to
    the store that the sweep was recorded in, with the credentials of MLFLOW_TRACKING_URI if that is
    the same store. Raises InputError on a folder without a whole journal or a store that cannot be
    used, and Undelivered if the store does not take all.
    """
    storage.fetch_journal(folder / NAME)
    events = Sweep(folder).events()
    if not events:
        raise InputError("sweep", str(folder), "its journal is empty: it never began")
    uri = resolve_uri(uri or recorded_uri(folder))
    prepare_store(uri)
    tracker = Tracker(uri, folder)
    for event in events:
        tracker.write(event)
    if owed := tracker.close(None):
        raise Undelivered(owed)
    return len(events), tracker.runs


def ui_command(uri: str) -> str:
    """What shows the runs: a shell command for a local store, a server's own address."""
    if is_server(uri):
        return without_user(uri)
    return f"mlflow ui --backend-store-uri {shlex.quote(masked(uri))}"


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
    server = without_user(uri).rstrip("/") if is_server(uri) else "http://127.0.0.1:5000"
    return f"{server}/#/{page}?{urlencode(query, quote_via=quote)}"


class Tracker:
    """Sends events to MLflow from a thread of its own; nothing waits for it or fails by it.

    What goes on after its driver died writes its whole journal again: what MLflow has already is
    found and not doubled. While the store does not answer, events are owed, and it is tried again
    after pauses that double up to `LONGEST_PAUSE_S`.
    """

    def __init__(self, uri: str, folder: Path):
        self._folder = folder
        self._store = Store(uri, folder)
        self._waiting: deque[Event] = deque()
        self._taken = self._sent = 0
        self._reason = "it took too long"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return len(self._store.runs.all) if self._store.runs else 0

    def write(self, event: Event) -> None:
        """Events come in the order of the journal, and are in it already."""
        self._waiting.append(event)

    def close(self, timeout_s: float | None = 60) -> str | None:
        """Wait for delivery, but not for a dead store; None waits while there is any progress.

        Returns a line about what is owed and how to deliver it, None if nothing is.
        """
        self._closing.set()
        self._thread.join(timeout_s)
        self._store.stopped.set()
        owed = self._taken + len(self._waiting) - self._sent
        if not owed:
            return None
        again = f"raytickets sync {shlex.quote(storage.address(self._folder))}"
        return f"{owed} events did not reach MLflow ({self._reason}); deliver them with: {again}"

    def _send(self) -> None:
        pause, failures, closing = GATHER_S, 0, False
        while not self._store.stopped.is_set():
            if not closing and (closing := self._closing.wait(pause)):
                failures = min(failures, LAST_TRIES - 2)
            calls, started = self._store.calls, time.monotonic()
            try:
                self._deliver()
            except Exception as error:
                self._reason = one_line(error)
                passing = is_passing(error)
                self._store.look_again() if passing else self._store.forget()
                if passing and self._store.calls > calls:
                    pause, failures = GATHER_S, 0
                else:
                    pause, failures = min(2 * pause, LONGEST_PAUSE_S), failures + 1
                if closing and failures >= LAST_TRIES:
                    return
                if closing:
                    time.sleep(GATHER_S)
            else:
                if closing:
                    return
                took = time.monotonic() - started
                pause, failures = min(max(took, GATHER_S), LONGEST_PAUSE_S), 0

    def _deliver(self) -> None:
        while self._sent < self._taken + len(self._waiting):
            if self._store.runs is None:
                told = read_journal(self._folder)[: self._taken] if self._taken else []
                self._store.open((told or self._waiting)[0])
                self._store.add(told)
            fresh = list(self._waiting)
            self._store.add(fresh)
            for _ in fresh:
                self._waiting.popleft()
            self._taken += len(fresh)
            self._store.flush()
            self._sent = self._taken
