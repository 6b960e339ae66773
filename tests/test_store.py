"""Which MLflow store is used, where it is shown, and that one which cannot be used is refused."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import made_up_sweep
import pytest
from made_up_sweep import HIGH, LARGE, OPENING, SMALL, retrained, ticket
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from obstore.store import MemoryStore

from raytickets import storage
from raytickets.config import InputError
from raytickets.store import (
    TOKEN,
    Store,
    prepare_store,
    recorded_uri,
    resolve_uri,
    without_user,
)
from raytickets.tracking import Tracker, tickets_address, ui_command


def test_the_store_is_the_one_given_or_of_the_environment_or_in_the_working_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri("sqlite:///runs/a.db") == f"sqlite:///{tmp_path}/runs/a.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert resolve_uri() == "http://host:5000"
    assert resolve_uri("sqlite:////a.db") == "sqlite:////a.db"


def test_a_server_shows_itself_and_a_file_needs_a_command():
    assert ui_command("http://host:5000") == "http://host:5000"
    assert ui_command("sqlite:////a b/m.db").endswith("--backend-store-uri 'sqlite:////a b/m.db'")


def test_the_address_is_of_the_tickets_of_a_sweep(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    experiment = MlflowClient(uri).create_experiment("raytickets/digits")
    address = tickets_address(uri, "digits", "sweep", "monday")
    assert address.startswith(f"http://127.0.0.1:5000/#/experiments/{experiment}/runs?")
    assert "searchFilter=tags.%22raytickets.kind%22%20%3D%20%22ticket%22" in address
    assert "tags.%22raytickets.sweep%22%20%3D%20%22monday%22" in address
    nowhere = tickets_address(uri, "other", "sweep", "monday")
    assert nowhere.startswith("http://127.0.0.1:5000/#/experiments?")


def test_a_store_that_cannot_be_used_is_refused_in_one_line_and_at_once(tmp_path: Path):
    (tmp_path / "file").write_text("not a database")
    for uri in (f"sqlite:///{tmp_path}/file", "ftp://host"):
        started = time.monotonic()
        with pytest.raises(InputError, match="tracking_uri: ") as caught:
            prepare_store(uri)
        assert time.monotonic() - started < 5
        assert "\n" not in str(caught.value)


@pytest.fixture
def answering() -> Iterator[str]:
    """A server whose answer to everything is the status that the address's path names."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status = int(self.path.split("/")[1])
            body = b"<html>" if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_answers_but_never_will_as_it_should_is_refused(answering: str):
    for status, why in ((401, "asks for credentials"), (403, "refuses"), (404, "as MLflow does")):
        with pytest.raises(InputError, match=why) as caught:
            prepare_store(f"http://me:hidden@{answering}/{status}")
        assert "hidden" not in str(caught.value)
    with pytest.raises(InputError, match="as MLflow does"):
        prepare_store(f"http://{answering}/200")


def test_a_server_that_does_not_answer_now_is_no_bad_input(answering: str):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        for place, why in (
            (f"127.0.0.1:{port}", "refused"),
            ("nowhere.invalid:5000", "nowhere.invalid"),
            (f"{answering}/503", "error 503"),
            (f"{answering}/429", "error 429"),
        ):
            said = prepare_store(f"http://me:hidden@{place}")
            assert said is not None
            assert said.startswith(f"MLflow at http://{place} does not answer (")
            assert why in said
            assert "hidden" not in said
            assert "\n" not in said


def test_what_ties_a_sweep_at_an_address_to_its_runs_is_the_same_on_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    objects = MemoryStore()
    monkeypatch.setattr(storage, "_store", lambda *_: objects)
    one, two = (tmp_path / name / "raytickets/remote/s3/b/first" for name in ("one", "two"))
    one.mkdir(parents=True)
    (one / TOKEN).write_text("begun")  # A driver was killed before it was uploaded.
    Store("http://first:5000", one)
    assert recorded_uri(two) == "http://first:5000"
    Store("http://second:5000", two)
    assert (two / TOKEN).read_text() == "begun"
    assert recorded_uri(one) == "http://second:5000"
    (one / TOKEN).write_text("never uploaded")
    Store("http://second:5000", one)
    assert (one / TOKEN).read_text() == "begun"


def test_no_password_is_shown():
    assert ui_command("http://me:hidden@host:5000") == "http://host:5000"
    assert "hidden" not in ui_command("postgresql://me:hidden@host/mlflow")


@pytest.mark.parametrize(
    ("uri", "kept"),
    [
        ("https://me:secret@mlflow.example/x", "https://mlflow.example/x"),
        ("postgresql://me:a/b@host/db", "postgresql://host/db"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db"),
        ("sqlite:////home/me@example.org/mlflow.db", "sqlite:////home/me@example.org/mlflow.db"),
    ],
)
def test_the_user_of_a_server_is_not_kept_and_a_path_is(uri, kept):
    assert without_user(uri) == kept


def champion(client: MlflowClient) -> ModelVersion:
    return client.get_model_version_by_alias("raytickets-digits", "champion")


@pytest.mark.slow
def test_the_champion_is_replaced_by_what_is_better_and_not_heavier_alone(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert prepare_store(uri) is None
    client = MlflowClient(uri)

    def finish(name: str, winners: list[tuple[str, int, float]], state: str = "done") -> None:
        """A sweep with these winners: id, MACs and test accuracy, 0.01 above in validation."""
        events = [
            OPENING | {"name": name},
            *(ticket(HIGH, id, 0.3 if id == LARGE else 0.5, macs, 0.9) for id, macs, _ in winners),
            {"event": "winners", "tickets": [id for id, _, _ in winners]},
            *(retrained(id, macs, 10, accuracy) for id, macs, accuracy in winners),
            {"event": "end", "state": state, "reason": ""},
        ]
        if not (tmp_path / name).exists():
            made_up_sweep.write(tmp_path / name, events)
            made_up_sweep.write_tickets(tmp_path / name, events)
        tracker = Tracker(uri, tmp_path / name)
        for event in events:
            tracker.write(event)
        assert tracker.close() is None

    finish("failed", [(LARGE, 900, 0.99)], state="failed")
    assert not client.search_registered_models()
    first = [(SMALL, 500, 0.9), (LARGE, 1000, 0.95)]
    finish("first", first)
    found = champion(client)
    assert found.tags == {
        "raytickets.ticket": LARGE,
        "raytickets.sweep": "first",
        "raytickets.validation_accuracy": str(0.95 - 0.01),
        "raytickets.test_accuracy": "0.95",
        "raytickets.macs": "1000",
    }
    run = client.get_run(str(found.run_id))
    assert run.data.tags["raytickets.run"] == LARGE
    assert found.source == f"runs:/{found.run_id}/retrained"
    path = client.download_artifacts(run.info.run_id, "retrained", str(tmp_path))
    weights = (Path(path) / "ticket.safetensors").read_text()
    assert weights == f"weights of retrained/{LARGE}"
    finish("first", first)
    finish("better but heavier", [(LARGE, 1001, 0.99)])
    finish("lighter but worse", [(LARGE, 10, 0.94)])
    assert int(champion(client).version) == int(found.version) == 1
    finish("lighter", [(LARGE, 1001, 0.99), (SMALL, 990, 0.95)])
    assert champion(client).tags["raytickets.sweep"] == "lighter"
    assert champion(client).tags["raytickets.ticket"] == SMALL
    finish("first", first)
    versions = client.search_model_versions("name='raytickets-digits'")
    assert sorted(int(version.version) for version in versions) == [1, 2]
    assert int(champion(client).version) == 2
    client.delete_model_version_tag("raytickets-digits", "2", "raytickets.macs")
    finish("a person's choice stays", [(SMALL, 1, 1.0)])
    assert int(champion(client).version) == 2
