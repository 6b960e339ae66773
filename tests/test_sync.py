"""MLflow's server dead, killed, slow or failing: no event is lost or doubled, and nothing waits."""

import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import made_up_sweep
import pytest
from faulty_server import Proxy, Server
from mlflow import MlflowClient

from raytickets.store import RECORDED, TOKEN, prepare_store
from raytickets.tracking import Tracker, Undelivered, sync

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EVENTS = made_up_sweep.FINISHED
WHOLE = (len(EVENTS), 7)


@dataclass
class Sweep:
    """A finished sweep of its own name, and what MLflow has of it."""

    folder: Path

    def events(self) -> list[dict[str, Any]]:
        return [EVENTS[0] | {"name": self.folder.name}, *EVENTS[1:]]

    def track(self, uri: str, start: int = 0, end: int | None = None) -> Tracker:
        tracker = Tracker(uri, self.folder)
        self.tell(tracker, start, end)
        return tracker

    def tell(self, tracker: Tracker, start: int = 0, end: int | None = None) -> None:
        for event in self.events()[start:end]:
            started = time.monotonic()
            tracker.write(event)
            assert time.monotonic() - started < 0.5

    def found(self, uri: str) -> dict[str, Any]:
        """Of every run, by its key: all points, params, status and files."""
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("raytickets/digits")
        assert experiment is not None
        runs = client.search_runs(
            [experiment.experiment_id], f"tags.`raytickets.sweep` = '{self.folder.name}'"
        )
        assert len({run.data.tags["raytickets.run"] for run in runs}) == len(runs)
        names = {run.info.run_id: run.data.tags["raytickets.run"] for run in runs}
        return {
            names[run.info.run_id]: {
                "parent": names.get(run.data.tags.get("mlflow.parentRunId", "")),
                "points": sorted(
                    (name, point.step, point.value)
                    for name in run.data.metrics
                    for point in client.get_metric_history(run.info.run_id, name)
                ),
                "params": run.data.params,
                "status": run.info.status,
                "files": sorted(
                    file.path
                    for place in (None, "ticket", "retrained")
                    for file in client.list_artifacts(run.info.run_id, place)
                    if not file.is_dir
                ),
            }
            for run in runs
        }


@pytest.fixture
def sweep(tmp_path: Path, request: pytest.FixtureRequest) -> Sweep:
    found = Sweep(tmp_path / re.sub(r"\W", "-", request.node.name))
    made_up_sweep.write(found.folder, found.events())
    made_up_sweep.write_tickets(found.folder, EVENTS)
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What MLflow has of an undisturbed sweep."""
    folder = tmp_path_factory.mktemp("undisturbed")
    uri, undisturbed = f"sqlite:///{folder}/mlflow.db", Sweep(folder / "sweep")
    made_up_sweep.write(undisturbed.folder, undisturbed.events())
    made_up_sweep.write_tickets(undisturbed.folder, EVENTS)
    assert prepare_store(uri) is None
    assert undisturbed.track(uri).close() is None
    found = undisturbed.found(uri)
    points = [point for run in found.values() for point in run["points"]]
    assert len(points) == 85
    assert sum(len(run["files"]) for run in found.values()) == 26 + 2
    return without_champion(found)


def without_champion(found: dict[str, Any]) -> dict[str, Any]:
    """The first sweep of a store alone has the files of its best ticket's retraining."""
    for run in found.values():
        run["files"] = [path for path in run["files"] if not path.startswith("retrained/")]
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def running(server: Server) -> Server:
    server.kill()
    server.start()
    return server


def check(sweep: Sweep, server: Server, expected: dict[str, Any]) -> None:
    """All is there once, also after it is delivered again."""
    for _ in range(2):
        assert sync(sweep.folder, server.address) == WHOLE
        found = without_champion(sweep.found(server.address))
        expected["sweep"]["params"] |= {"name": found["sweep"]["params"]["name"]}
        assert found == expected


def test_a_server_that_is_dead_for_the_whole_sweep(
    sweep: Sweep, server: Server, expected: dict[str, Any]
):
    server.kill()
    said = prepare_store(server.address)
    assert said is not None
    assert said.startswith(f"MLflow at {server.address} does not answer (")
    tracker = sweep.track(server.address)
    started = time.monotonic()
    owed = tracker.close()
    assert time.monotonic() - started < 5
    assert owed is not None
    assert owed.startswith(f"{len(EVENTS)} events did not reach MLflow (")
    with pytest.raises(Undelivered, match=f"^{len(EVENTS)} events did not reach MLflow .*refused"):
        sync(sweep.folder)
    server.start()
    assert sync(sweep.folder) == WHOLE  # To where it was to be recorded.
    check(sweep, server, expected)


def test_a_server_that_is_killed_and_comes_back(
    sweep: Sweep, running: Server, expected: dict[str, Any]
):
    tracker = sweep.track(running.address, end=9)
    time.sleep(3)
    running.kill()
    sweep.tell(tracker, 9, 15)
    time.sleep(3)
    running.start()
    sweep.tell(tracker, 15)
    assert tracker.close(120) is None
    assert without_champion(sweep.found(running.address)).keys() == expected.keys()
    check(sweep, running, expected)


def test_a_server_that_takes_long_for_every_call(
    sweep: Sweep, running: Server, expected: dict[str, Any]
):
    proxy = Proxy(running.address, delay=1.0)
    tracker = sweep.track(proxy.address, end=10)
    time.sleep(5)
    sweep.tell(tracker, 10)
    started = time.monotonic()
    owed = tracker.close(5)
    assert time.monotonic() - started < 6
    assert owed is not None
    assert "it took too long" in owed
    time.sleep(3)  # What was under way is done.
    before = proxy.calls.total()
    time.sleep(3)
    assert proxy.calls.total() == before
    proxy.close()
    check(sweep, running, expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_fails_now_and_then(
    sweep: Sweep, running: Server, expected: dict[str, Any], seed: int
):
    proxy = Proxy(running.address, failing=0.25, seed=seed)
    tracker = Tracker(proxy.address, sweep.folder)
    for event in sweep.events():
        tracker.write(event)
        time.sleep(0.2)
    tracker.close(60)
    assert proxy.failed >= 5
    assert sync(sweep.folder) == WHOLE  # Through the same proxy.
    proxy.close()
    check(sweep, running, expected)


def test_a_store_that_is_new_again_gets_everything(
    sweep: Sweep, tmp_path: Path, expected: dict[str, Any]
):
    (tmp_path / "first").mkdir()
    server = Server(tmp_path / "first")
    server.start()
    try:
        tracker = sweep.track(server.address, end=12)
        time.sleep(3)
        server.kill()
        (tmp_path / "first" / "mlflow.db").unlink()
        server.start()
        sweep.tell(tracker, 12)
        assert tracker.close(120) is None
        check(sweep, server, expected)
    finally:
        server.kill()


WRITER = """
import sys
from pathlib import Path
import made_up_sweep
from raytickets.tracking import Tracker, prepare_store

uri, folder = sys.argv[1], Path(sys.argv[2])
folder.mkdir()
print("ready", flush=True)
sys.stdin.readline()
assert prepare_store(uri) is None
tracker = Tracker(uri, folder)
tracker.write(made_up_sweep.OPENING | {"name": folder.name})
for number in range(1, 201):
    tracker.write(made_up_sweep.check("one", number, {}))
print(tracker.close(300))
"""


def test_eight_processes_that_write_at_once_to_a_store_that_is_not_there_yet(tmp_path: Path):
    uri, names = f"sqlite:///{tmp_path}/new/mlflow.db", [f"writer{n}" for n in range(8)]
    code = textwrap.dedent(WRITER)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, uri, str(tmp_path / name)],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        assert writer.communicate(timeout=300) == ("None\n", "")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("raytickets/digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`raytickets.run` = 'one'")
    points = [client.get_metric_history(run.info.run_id, "loss") for run in runs]
    assert [len(found) for found in points] == [200] * 8


def test_a_sweep_remembers_its_store_without_the_credentials(sweep: Sweep, running: Server):
    address = running.address.replace("://", "://me:secret@")
    assert sweep.track(address).close() is None
    assert (sweep.folder / RECORDED).read_text() == running.address
    texts = [p.read_text() for p in sweep.folder.iterdir() if p.is_file()]
    assert (sweep.folder / TOKEN).read_text() in texts
    assert "secret" not in "".join(texts)
    assert sync(sweep.folder) == WHOLE
