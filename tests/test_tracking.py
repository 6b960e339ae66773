"""What MLflow shows of a sweep, and that it is whole however the sweep and the store fared."""

import json
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import made_up_comparison
import pytest
from made_up_sweep import (
    GIGA,
    HIGH,
    LOW,
    OPENING,
    SPACE,
    check,
    epoch,
    proof,
    retrained,
    ticket,
    trajectory,
    write_tickets,
)
from mlflow import MlflowClient
from mlflow.entities import Run

from raytickets.config import SearchSpace
from raytickets.journal import Event
from raytickets.sweep import select
from raytickets.tracking import Tracker, prepare_store, tickets_address

TICKETS = ("aaaa", "bbbb", "cccc")
MATRIX = {"epochs": [2.5, 3.0], "ratios": {"0.3": [[0, 0.1], [0.1, 0]]}}
NONE_YET: dict[str, float | None] = {"0.3": None, "0.5": None}


def ended(key: str, state: str, epochs: float, reason: str = "") -> Event:
    macs = int(epochs * 10 * GIGA)
    return trajectory(key, state, macs, {"0.3": "drawn", "0.5": state}, reason)


def retraining(run: str, macs: int, test_accuracy: float) -> list[Event]:
    """As by hand, which does not say that the sweep goes on."""
    epochs = [epoch(run, number) | {"identity": ""} for number in (1, 2, 3)]
    return [*epochs, retrained(run, macs, 9 * macs, test_accuracy)]


def sweep_events(folder: Path) -> list[Event]:
    """Two trajectories, the second of which diverges after its first ticket; two winners."""
    events = [
        OPENING | {"name": folder.name},
        *(check(LOW, number / 2, NONE_YET) for number in range(1, 5)),
        check(HIGH, 0.5, NONE_YET),
        check(LOW, 2.5, {"0.3": 0.15, "0.5": 0.4}),
        ticket(LOW, "aaaa", 0.3, 1_000_000, 0.84, epoch=2.5),
        check(LOW, 3.0, {"0.3": 0.1, "0.5": 0.15}),
        ticket(LOW, "bbbb", 0.5, 500_000, 0.8, epoch=3.0),
        ended(LOW, "drawn", 3) | {"distances_matrix": MATRIX},
        *(check(HIGH, number / 2, NONE_YET) for number in (2, 3, 4)),
        check(HIGH, 2.5, {"0.3": 0.15, "0.5": 0.9}),
        ticket(HIGH, "cccc", 0.3, 1_000_000, 0.84, epoch=2.5),
        ended(HIGH, "diverged", 3, "the loss was nan in epoch 3"),
        proof("bbbb", 2, 0.79),
        proof("aaaa", 2, 0.92),
        {"event": "winners", "tickets": ["aaaa", "bbbb"]},
        *retraining("aaaa", 1_000_000, 0.95),
        *retraining("bbbb", 500_000, 0.93),
        *retraining("dense", 2_000_000, 0.96),
        {"event": "end", "state": "done", "reason": ""},
    ]
    write_tickets(folder, select(events, "ticket"))
    return events


def track(uri: str, folder: Path, events: list[Event]) -> str | None:
    tracker = Tracker(uri, folder)
    for event in events:
        tracker.write(event)
    return tracker.close()


def runs_of(client: MlflowClient, folder: Path) -> dict[str, Run]:
    experiment = client.get_experiment_by_name("raytickets/digits")
    assert experiment is not None
    found = client.search_runs(
        [experiment.experiment_id], f"tags.`raytickets.sweep` = '{folder.name}'"
    )
    assert len({run.data.tags["raytickets.run"] for run in found}) == len(found)
    return {run.data.tags["raytickets.run"]: run for run in found}


def history(client: MlflowClient, run: Run, metric: str) -> list[tuple[int, float]]:
    points = client.get_metric_history(run.info.run_id, metric)
    return [(point.step, point.value) for point in points]


def all_points(client: MlflowClient, run: Run) -> list[tuple[str, int, float]]:
    return [(key, *point) for key in run.data.metrics for point in history(client, run, key)]


def artifacts(client: MlflowClient, run: Run, folder: str | None = None) -> set[str]:
    return {file.path for file in client.list_artifacts(run.info.run_id, folder)}


def table(client: MlflowClient, run: Run) -> list[dict[str, Any]]:
    """What the UI shows as a table, by MLflow's own marks."""
    marks = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert marks == [{"path": "tickets.json", "type": "table"}]
    path = client.download_artifacts(run.info.run_id, "tickets.json")
    content = json.loads(Path(path).read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    prepare_store(store)
    return store


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    return MlflowClient(uri)


@pytest.fixture(scope="module")
def tracked(
    uri: str, client: MlflowClient, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Event], dict[str, Run]]:
    folder = tmp_path_factory.mktemp("whole")
    events = sweep_events(folder)
    assert track(uri, folder, events) is None
    return folder, events, runs_of(client, folder)


def test_runs_are_nested_named_and_ended(tracked: Any):
    folder, _, runs = tracked
    parents = {run.info.run_id: key for key, run in runs.items()}
    tree = {key: parents.get(run.data.tags.get("mlflow.parentRunId")) for key, run in runs.items()}
    assert tree == {
        "sweep": None,
        LOW: "sweep",
        HIGH: "sweep",
        "aaaa": LOW,
        "bbbb": LOW,
        "cccc": HIGH,
        "dense": "sweep",
    }
    assert runs["sweep"].info.run_name == folder.name
    assert runs["bbbb"].info.run_name == f"ratio0.5-{LOW}"
    kinds = {key: run.data.tags["raytickets.kind"] for key, run in runs.items()}
    assert kinds == {
        "sweep": "sweep",
        LOW: "trajectory",
        HIGH: "trajectory",
        **dict.fromkeys(TICKETS, "ticket"),
        "dense": "dense",
    }
    statuses = {key: run.info.status for key, run in runs.items()}
    assert statuses.pop(HIGH) == "FAILED"
    assert set(statuses.values()) == {"FINISHED"}
    assert runs[HIGH].data.tags["raytickets.state"] == "diverged"
    assert runs[HIGH].data.tags["mlflow.note.content"] == "the loss was nan in epoch 3"


def test_params(tracked: Any):
    _, _, runs = tracked
    sweep = runs["sweep"].data.params
    assert sweep["penalties"] == "[0.0001, 0.001]"
    assert sweep["training.epochs"] == "20"
    assert sweep["network.options.width"] == "0.125"
    assert sweep["fingerprint"] == SPACE.fingerprint
    assert sweep["images.train"] == "1200"
    assert sweep["data.validation"] == "0.1"
    assert sweep["dense.macs"] == "2000000"
    assert sweep["versions.raytickets"] == "0.1.0"
    assert runs[LOW].data.params == {
        "method": "early_bird",
        "penalty": "0.0001",
        "seed": "0",
        "learning_rate": "0.1",
    }
    assert runs["bbbb"].data.params == {
        "penalty": "0.0001",
        "prune_ratio": "0.5",
        "learning_rate": "0.1",
        "seed": "0",
        "stop_rule": "corrected",
        "network": "cifar_vgg",
        "method": "early_bird",
    }
    reference = {"method": "dense", "seed": "0", "network": "cifar_vgg"}
    assert runs["dense"].data.params == reference


def test_every_run_says_how_to_get_it_again(tracked: Any, client: MlflowClient):
    _, _, runs = tracked
    for key, run in runs.items():
        path = client.download_artifacts(run.info.run_id, "space.json")
        assert SearchSpace.from_dict(json.loads(Path(path).read_text())) == SPACE, key
        if key != "sweep":  # There they are params.
            assert run.data.tags["raytickets.fingerprint"] == SPACE.fingerprint
            assert json.loads(run.data.tags["raytickets.versions"]) == OPENING["versions"]
            assert run.data.params["seed"] == "0"


def test_a_trajectorys_steps_are_its_checks(tracked: Any, client: MlflowClient):
    _, _, runs = tracked
    low = runs[LOW]
    assert history(client, low, "loss") == [(number, 4 / number) for number in range(1, 7)]
    assert history(client, low, "epoch") == [(number, number / 2) for number in range(1, 7)]
    assert history(client, low, "mask_distance_0.5") == [(5, 0.4), (6, 0.15)]
    assert history(client, low, "train_macs")[-1] == (6, 30 * GIGA)
    assert low.data.metrics["epochs"] == 3
    # Validation is at the end of an epoch, which is every second check.
    assert [step for step, _ in history(client, low, "validation_accuracy")] == [2, 4, 6]


def test_a_tickets_proofs_are_steps_by_rung_and_the_last_one_is_shown(
    tracked: Any, client: MlflowClient
):
    _, _, runs = tracked
    assert history(client, runs["bbbb"], "proof_accuracy") == [(1, 0.8), (2, 0.79)]
    assert history(client, runs["bbbb"], "proof_macs") == [(1, 20 * GIGA), (2, 40 * GIGA)]
    assert runs["bbbb"].data.metrics["proof_accuracy"] == 0.79
    assert history(client, runs["cccc"], "proof_accuracy") == [(1, 0.84)]


def test_a_tickets_figures_and_those_of_its_retraining(tracked: Any, client: MlflowClient):
    _, _, runs = tracked
    found = runs["bbbb"].data.metrics
    expected = {"macs": 500_000, "params": 50_000, "draw_epoch": 3, "mask_distance": 0.125}
    expected |= {"test_accuracy": 0.93, "train_macs": 4.5e6}
    assert {key: found[key] for key in expected} == expected
    assert [step for step, _ in history(client, runs["bbbb"], "validation_accuracy")] == [1, 2, 3]
    assert "test_accuracy" not in runs["cccc"].data.metrics
    assert runs["dense"].data.metrics["test_accuracy"] == 0.96
    assert [step for step, _ in history(client, runs["dense"], "learning_rate")] == [1, 2, 3]
    totals = runs["sweep"].data.metrics
    assert (totals["tickets"], totals["winners"], totals["winner_test_accuracy"]) == (3, 2, 0.95)
    assert totals["best_proof_accuracy"] == 0.92


def test_artifacts(tracked: Any, client: MlflowClient, tmp_path: Path):
    folder, _, runs = tracked
    everywhere = {"space.json", "mask_distance.png"}
    assert artifacts(client, runs[LOW]) == everywhere | {"mask_distance_matrix.png"}
    assert artifacts(client, runs[HIGH]) == everywhere
    of_ticket = {"ticket", "kept_channels.png", "retraining.json"}
    assert artifacts(client, runs["aaaa"]) == everywhere | of_ticket
    shown = {"space.json", "tickets.json", "accuracy_against_macs.png"}
    assert artifacts(client, runs["sweep"]) == shown
    path = client.download_artifacts(runs["aaaa"].info.run_id, "ticket", str(tmp_path))
    weights = (Path(path) / "ticket.safetensors").read_bytes()
    assert weights == (folder / "tickets/aaaa/ticket.safetensors").read_bytes()
    rows = table(client, runs["sweep"])
    assert [row["ticket"] for row in rows] == list(TICKETS)
    assert [row["test_accuracy"] for row in rows] == [0.95, 0.93, None]
    proofs = [(row["proof_rung"], row["proof_accuracy"]) for row in rows]
    assert proofs == [(2, 0.92), (2, 0.79), (1, 0.84)]
    assert rows[1]["share_of_dense_macs"] == 0.25


def test_artifacts_lie_beside_the_database(tracked: Any, uri: str):
    _, _, runs = tracked
    beside = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
    assert runs["sweep"].info.artifact_uri.startswith(beside)


def test_replaying_a_journal_doubles_nothing(tracked: Any, uri: str, client: MlflowClient):
    folder, events, before = tracked
    points = {key: all_points(client, run) for key, run in before.items()}
    assert all(len(set(found)) == len(found) for found in points.values())
    assert track(uri, folder, events) is None
    after = runs_of(client, folder)
    assert after.keys() == before.keys()
    for key, run in after.items():
        assert run.info.end_time == before[key].info.end_time
        assert run.data.to_dictionary() == before[key].data.to_dictionary()
        assert all_points(client, run) == points[key]
    assert len(table(client, after["sweep"])) == len(TICKETS)


def test_a_sweep_goes_on_where_its_driver_died(uri: str, client: MlflowClient, tmp_path: Path):
    events = sweep_events(tmp_path)
    cut = next(i for i, event in enumerate(events) if event.get("ticket") == "bbbb")
    assert track(uri, tmp_path, events[:cut]) is None
    first = runs_of(client, tmp_path)
    assert first["sweep"].info.status == first[LOW].info.status == "RUNNING"
    interrupted: Event = {"event": "end", "state": "failed", "reason": "interrupted"}
    assert track(uri, tmp_path, [*events[:cut], interrupted]) is None
    second = runs_of(client, tmp_path)
    assert (second["sweep"].info.status, second[LOW].info.status) == ("FAILED", "KILLED")
    assert "interrupted" in second["sweep"].data.tags["mlflow.note.content"]
    assert track(uri, tmp_path, [*events[:cut], interrupted, *events[cut:]]) is None
    third = runs_of(client, tmp_path)
    assert {key: third[key].info.run_id for key in first} == {
        key: run.info.run_id for key, run in first.items()
    }
    assert (third["sweep"].info.status, third[LOW].info.status) == ("FINISHED", "FINISHED")
    assert history(client, third[LOW], "loss") == [(e, 4 / e) for e in range(1, 7)]


def test_a_sweep_that_was_cut_off_between_proofs_goes_on(
    uri: str, client: MlflowClient, tmp_path: Path
):
    events = sweep_events(tmp_path)
    cut = next(i for i, event in enumerate(events) if event["event"] == "proof")
    for end in (cut, cut + 1, len(events)):
        assert track(uri, tmp_path, events[:end]) is None
    runs = runs_of(client, tmp_path)
    assert set(runs) == {"sweep", LOW, HIGH, *TICKETS, "dense"}
    assert history(client, runs["bbbb"], "proof_accuracy") == [(1, 0.8), (2, 0.79)]
    assert history(client, runs["aaaa"], "proof_accuracy") == [(1, 0.84), (2, 0.92)]
    assert runs["aaaa"].info.status == "FINISHED"


def test_a_trajectory_that_halving_ends_is_no_failure(
    uri: str, client: MlflowClient, tmp_path: Path
):
    events = [
        *sweep_events(tmp_path)[:6],
        ended(HIGH, "hopeless", 0.5, "others were more accurate by then"),
    ]
    assert track(uri, tmp_path, events) is None
    run = runs_of(client, tmp_path)[HIGH]
    assert run.info.status == "FINISHED"
    assert run.data.tags["raytickets.state"] == "hopeless"
    assert run.data.tags["mlflow.note.content"] == "others were more accurate by then"


def test_a_name_used_again_is_another_sweep(uri: str, client: MlflowClient, tmp_path: Path):
    for parent in ("one", "two"):
        folder = tmp_path / parent / "same-name"
        folder.mkdir(parents=True)
        assert track(uri, folder, sweep_events(folder)[:3]) is None
    filtered = "tags.`raytickets.sweep` = 'same-name' and tags.`raytickets.kind` = 'sweep'"
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert len(client.search_runs(experiments, filtered)) == 2


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_dead_server_neither_blocks_nor_fails_the_sweep(tmp_path: Path):
    events = sweep_events(tmp_path)
    tracker = Tracker(f"http://127.0.0.1:{closed_port()}", tmp_path)
    for event in events:
        started = time.monotonic()
        tracker.write(event)
        assert time.monotonic() - started < 0.5
    started = time.monotonic()
    owed = tracker.close()
    assert time.monotonic() - started < 10
    assert owed is not None
    assert owed.startswith(f"{len(events)} events did not reach MLflow (")
    assert "refused" in owed
    assert owed.endswith(f"deliver them with: raytickets sync {tmp_path}")


def test_events_wait_for_a_store_that_comes_back(
    uri: str, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = iter([ConnectionError("gone"), ConnectionError("gone")])
    create_run = MlflowClient.create_run

    def flaky(self: MlflowClient, *args: Any, **kwargs: Any) -> Run:
        run = create_run(self, *args, **kwargs)
        for error in calls:  # The run was created, but the answer was lost.
            raise error
        return run

    monkeypatch.setattr(MlflowClient, "create_run", flaky)
    assert track(uri, tmp_path, sweep_events(tmp_path)[:6]) is None
    assert set(runs_of(client, tmp_path)) == {"sweep", LOW, HIGH}


def test_a_ticket_retrained_after_the_end_shows_its_latest_figures(
    uri: str, client: MlflowClient, tmp_path: Path
):
    events = [*sweep_events(tmp_path), *retraining("aaaa", 1_000_000, 0.91)]
    assert track(uri, tmp_path, events) is None
    runs = runs_of(client, tmp_path)
    assert runs["sweep"].info.status == runs["aaaa"].info.status == "FINISHED"
    assert runs["aaaa"].data.metrics["test_accuracy"] == 0.91


def test_a_trajectory_that_is_run_again_doubles_nothing(
    uri: str, client: MlflowClient, tmp_path: Path
):
    events = sweep_events(tmp_path)
    failed = ended(HIGH, "failed", 0)
    again = [event for event in events if event.get("trajectory") == HIGH]
    end: Event = {"event": "end", "state": "done", "reason": ""}
    assert track(uri, tmp_path, [events[0], failed, *again, *again, end]) is None
    runs = runs_of(client, tmp_path)
    assert set(runs) == {"sweep", HIGH, "cccc"}
    assert history(client, runs[HIGH], "loss") == [(e, 4 / e) for e in range(1, 6)]
    assert len(history(client, runs["cccc"], "proof_accuracy")) == 1
    assert runs[HIGH].data.metrics["epochs"] == 3
    assert len(table(client, runs["sweep"])) == 1


def test_a_comparison_is_tracked_and_its_tickets_are_found_by_their_address(
    client: MlflowClient, uri: str, tmp_path: Path
):
    found_by = {("dense", 0.0): [0.98], ("early_bird", 0.3): [0.97], ("random", 0.3): [0.96]}
    events = made_up_comparison.finished(accuracy=found_by)
    assert track(uri, tmp_path, events) is None
    experiment = client.get_experiment_by_name("raytickets/digits")
    assert experiment is not None
    address = tickets_address(uri, "digits", "comparison", "duel")
    query = parse_qs(urlsplit(address.replace("/#/", "/")).query)
    found = client.search_runs(
        [experiment.experiment_id],
        query["searchFilter"][0],
        order_by=[query["orderByKey"][0] + " DESC"],
    )
    shown = {run.data.params["method"]: run.data.metrics["test_accuracy"] for run in found}
    assert list(shown.items()) == [("dense", 0.98), ("early_bird", 0.97), ("random", 0.96)]
    one = f"tags.`raytickets.run` = '{made_up_comparison.source('early_bird', 0)}'"
    (source,) = client.search_runs([experiment.experiment_id], one)
    (top,) = client.search_runs([experiment.experiment_id], "tags.`raytickets.kind` = 'comparison'")
    assert source.data.tags["mlflow.parentRunId"] == top.info.run_id
    assert (top.info.run_name, top.info.status) == ("duel", "FINISHED")
    path = client.download_artifacts(top.info.run_id, "comparison.json")
    content = json.loads(Path(path).read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    assert [row["n"] for row in rows if row["method"] == "dense"] == [1]


def test_a_mean_that_falls_with_more_seeds_is_the_one_that_is_shown(
    client: MlflowClient, uri: str, tmp_path: Path
):
    events = made_up_comparison.finished(accuracy={("dense", 0.0): [0.98, 0.96]})
    events[0] = events[0] | {"name": "again"}
    first = next(i for i, event in enumerate(events) if event["event"] == "retrained")
    for end in (first + 1, len(events)):
        assert track(uri, tmp_path, events[:end]) is None
    experiment = client.get_experiment_by_name("raytickets/digits")
    assert experiment is not None
    kind = "tags.`raytickets.kind` = 'comparison' and tags.`raytickets.comparison` = 'again'"
    (top,) = client.search_runs([experiment.experiment_id], kind)
    assert top.data.metrics["dense_test_accuracy"] == pytest.approx(0.97)
