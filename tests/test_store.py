"""Which MLflow store is used, where it is shown, and that one which cannot be used is refused."""

import socket
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from raytickets.config import InputError
from raytickets.tracking import prepare_store, resolve_uri, tickets_address, ui_command


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
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        for uri in (
            f"sqlite:///{tmp_path}/file/mlflow.db",
            f"sqlite:///{tmp_path}/file",
            "sqlite://",
            "ftp://host",
            str(tmp_path / "mlruns"),
            f"http://127.0.0.1:{deaf.getsockname()[1]}",
        ):
            started = time.monotonic()
            with pytest.raises(InputError, match="tracking_uri: ") as caught:
                prepare_store(uri)
            assert time.monotonic() - started < 5
            assert "\n" not in str(caught.value)
