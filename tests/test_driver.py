"""A whole sweep on Ray: searched, drawn, retrained, recorded; cut off and gone on with."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import made_up_sweep
import optuna
import pytest
import torch
from made_up_space import FRAGILE
from mlflow import MlflowClient

from raytickets import driver, load_ticket, search, tracking
from raytickets.config import (
    Data,
    Halving,
    InputError,
    Network,
    Optuna,
    Proof,
    Range,
    Resources,
    Retraining,
    SearchSpace,
    StopRule,
)
from raytickets.config import Training as Recipe
from raytickets.data import load_data
from raytickets.driver import SweepFailed, retrain_ticket
from raytickets.halving import hypervolume
from raytickets.room import Room
from raytickets.study import FILE, study_name
from raytickets.sweep import Sweep, select
from raytickets.ticket import WEIGHTS, package_versions
from raytickets.trajectory import Point, grid, prepare, run_trajectory

SPACE = SearchSpace(
    name="tiny",
    network=Network("cifar_vgg", {"depth": 9, "width": 0.125}),
    data=Data("digits", limit=256),
    penalties=(1e-3, 1e-2),
    prune_ratios=(0.3, 0.6),
    training=Recipe(epochs=20, learning_rate=0.05, batch_size=32),
    proof=Proof(budget=0.5, batch_size=32),
    round_to=1,
    retraining=Retraining(epochs=2, batch_size=32),
    winners=1,
)


@pytest.fixture(scope="module")
def heard():
    return []


@pytest.fixture(scope="module")
def sweep(ray_instance, place, store, heard):  # noqa: ARG001
    return search(SPACE, name="first", storage=place, tracking_uri=store, observer=heard.append)


def ids(sweep):
    return sorted({event["ticket"] for event in select(sweep.events(), "ticket")})


def test_every_trajectory_ends_and_every_ticket_is_whole(sweep):
    ends = select(sweep.events(), "trajectory")
    assert {end["trajectory"]: end["state"] for end in ends} == {
        "penalty0.001-seed0": "drawn",
        "penalty0.01-seed0": "drawn",
    }
    tickets = select(sweep.events(), "ticket")
    assert len(tickets) == 4
    for event in tickets:
        assert load_ticket(sweep.path / event["path"]).id == event["ticket"]


def test_the_observer_hears_what_the_journal_holds(sweep, heard):
    assert heard == sweep.events()


def test_the_better_half_of_the_tickets_is_proved_again_and_wins(sweep):
    events = sweep.events()
    proofs = select(events, "proof")
    assert [proof["rung"] for proof in proofs] == [2, 2]
    assert {proof["ticket"] for proof in proofs} < set(ids(sweep))
    (winners,) = select(events, "winners")
    best = max(proofs, key=lambda proof: proof["proof_accuracy"])
    winner = next(proof for proof in proofs if proof["ticket"] in winners["tickets"])
    assert winner["proof_accuracy"] == best["proof_accuracy"]


def test_winner_and_dense_reference_are_retrained_alike(sweep):
    report = sweep.report()
    assert report["state"] == "done"
    (winner,) = report["winners"]
    done = {event["run"]: event for event in select(sweep.events(), "retrained")}
    assert set(done) == {"dense", winner["run"]}
    for event in done.values():
        assert event["epochs"] == 2
        assert 0 <= event["test_accuracy"] <= 1
    assert done["dense"]["train_macs"] / done["dense"]["macs"] == pytest.approx(
        done[winner["run"]]["train_macs"] / done[winner["run"]]["macs"]
    )


def test_a_retrained_ticket_is_a_ticket_with_the_same_mask(sweep):
    (winner,) = sweep.report()["winners"]
    (event,) = [e for e in select(sweep.events(), "retrained") if e["run"] == winner["run"]]
    before = load_ticket(sweep.path / "tickets" / winner["run"])
    after = load_ticket(sweep.path / event["path"])
    assert torch.equal(before.mask, after.mask)
    assert after.manifest["retrained"]["test_accuracy"] == event["test_accuracy"]
    weights = [ticket.network().state_dict() for ticket in (before, after)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.usefixtures("sweep")
def test_mlflow_holds_sweep_trajectories_and_tickets(store):
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("raytickets/tiny")
    runs = client.search_runs([experiment.experiment_id])
    kinds = [run.data.tags["raytickets.kind"] for run in runs]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "sweep": 1,
        "trajectory": 2,
        "ticket": 4,
        "dense": 1,
    }


@pytest.mark.usefixtures("sweep")
def test_tickets_are_found_again_from_what_mlflow_has_of_their_trajectory(store, tmp_path):
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("raytickets/tiny")
    runs = client.search_runs([experiment.experiment_id], "tags.`raytickets.kind` != 'sweep'")
    trajectory = next(run for run in runs if run.data.tags["raytickets.kind"] == "trajectory")
    assert json.loads(trajectory.data.tags["raytickets.versions"]) == package_versions()
    path = client.download_artifacts(trajectory.info.run_id, "space.json", str(tmp_path))
    space = SearchSpace.from_dict(json.loads(Path(path).read_text()))
    penalty, seed = (trajectory.data.params[name] for name in ("penalty", "seed"))
    point = Point(float(penalty), int(seed))
    steps = run_trajectory(prepare(space, load_data(space.data), tmp_path / "again"), point)
    found = {
        event["ticket"]: (event["macs"], event["proof_accuracy"])
        for events in steps
        for event in select(events, "ticket")
    }
    assert len(found) == 2
    for run in runs:
        if run.data.tags.get("mlflow.parentRunId") == trajectory.info.run_id:
            first, *_ = client.get_metric_history(run.info.run_id, "proof_accuracy")
            told = (run.data.metrics["macs"], first.value)
            assert found.pop(run.data.tags["raytickets.run"]) == told
    assert not found


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_warm_workers_draw_the_tickets_that_fresh_ones_do(place, store, tmp_path):
    """Two workers take four trajectories, and nothing leaks from one to the next."""
    space = dataclasses.replace(SPACE, name="warm", penalties=(1e-3, 3e-3, 1e-2, 3e-2))
    sweep = search(space, name="warm", storage=place, tracking_uri=store)
    fresh = [
        event["ticket"]
        for point in grid(space)
        for events in run_trajectory(prepare(space, load_data(space.data), tmp_path), point)
        for event in select(events, "ticket")
    ]
    assert ids(sweep) == sorted(fresh)


def test_a_sweep_that_is_done_goes_on_with_nothing(sweep, place, store):
    before = sweep.events()
    again = search(SPACE, name="first", storage=place, tracking_uri=store)
    new = again.events()[len(before) :]
    assert [event["event"] for event in new] == ["end"]


@pytest.mark.slow
def test_a_sweep_cut_off_goes_on_where_it_was(sweep, place, store):
    """The journal up to a kill after the first trajectory, in a folder of its own."""
    cut = place / "cut"
    shutil.copytree(sweep.path, cut)
    lines = (cut / "journal.jsonl").read_text().splitlines(keepends=True)
    ended = next(i for i, line in enumerate(lines) if json.loads(line)["event"] == "trajectory")
    first = json.loads(lines[ended])["trajectory"]
    (cut / "journal.jsonl").write_text("".join(lines[: ended + 1]) + lines[ended + 1][:20])
    heard = []
    again = search(SPACE, name="cut", storage=place, tracking_uri=store, observer=heard.append)
    new = heard[ended + 1 :]
    assert {event["trajectory"] for event in select(new, "check")} == (
        {point["trajectory"] for point in select(sweep.events(), "trajectory")} - {first}
    )
    assert ids(again) == ids(sweep)
    assert again.report()["winners"] == sweep.report()["winners"]


@pytest.mark.usefixtures("ray_instance")
def test_a_failure_is_told_beside_what_mlflow_is_owed(store, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no space left")

    monkeypatch.setattr(driver, "run_search", fail)
    close, owed = tracking.Tracker.close, "2 events did not reach MLflow"
    monkeypatch.setattr(tracking.Tracker, "close", lambda *given: close(*given) or owed)
    said = "a stage failed: no space left; 2 events did not reach MLflow"
    with pytest.raises(SweepFailed, match=said):
        search(SPACE, name="both", storage=tmp_path, tracking_uri=store)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_halving_ends_a_trajectory_that_falls_behind(place, store):
    """One after the other: the second has a penalty under which nothing is learned."""
    space = dataclasses.replace(
        SPACE,
        name="halved",
        penalties=(1e-3, 10.0),
        training=dataclasses.replace(SPACE.training, epochs=6),
        resources=Resources(cpus_per_trial=2),
        stop_rule=StopRule(threshold=1e-9),
        halving=Halving(grace=2),
    )
    sweep = search(space, name="halved", storage=place, tracking_uri=store)
    first, second = select(sweep.events(), "trajectory")
    assert (first["state"], second["state"]) == ("not converged", "hopeless")
    assert (first["epochs"], second["epochs"]) == (6, 2)
    assert second["ratios"] == {"0.3": "hopeless", "0.6": "hopeless"}
    assert second["train_macs"] == first["train_macs"] / 3


PROPOSED = dataclasses.replace(
    SPACE,
    name="proposed",
    penalties=(1e-3,),
    proof=Proof(budget=0.5, rungs=1, batch_size=32),
    resources=Resources(cpus_per_trial=2),  # one after the other
    optuna=Optuna(
        trajectories=3,
        startup=1,
        ranges={
            "penalty": Range(1e-3, 1e-2, log=True),
            "training.learning_rate": Range(0.02, 0.06),
            "network.options.width": (0.125, 0.15),
        },
    ),
)


@pytest.fixture(scope="module")
def proposals(ray_instance, place, store):  # noqa: ARG001
    return search(PROPOSED, name="proposals", storage=place, tracking_uri=store)


def told(sweep):
    """What the study was told, by the number of the trial."""
    name = study_name(PROPOSED, sweep.opening()["data"]["fingerprint"])
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{sweep.path / FILE}")
    return [trial.values or trial.state.name for trial in study.trials]


def changes(sweep):
    return {e["trajectory"]: e["changes"] for e in select(sweep.events(), "trajectory")}


@pytest.mark.slow
def test_optuna_proposes_trajectories_and_hears_of_their_tickets(proposals):
    assert list(changes(proposals)) == ["trial0-seed0", "trial1-seed0", "trial2-seed0"]
    tickets = select(proposals.events(), "ticket")
    dense = proposals.opening()["dense"]["macs"]
    for number, values in enumerate(told(proposals)):
        mine = [t for t in tickets if t["trajectory"] == f"trial{number}-seed0"]
        shares = [ticket["macs"] / dense for ticket in mine]
        assert values == [hypervolume([t["proof_accuracy"] for t in mine], shares)]
    for ticket in tickets:
        manifest = load_ticket(proposals.path / ticket["path"]).manifest
        proposed = changes(proposals)[ticket["trajectory"]]
        assert manifest["penalty"] == proposed["penalty"]
        assert manifest["learning_rate"] == proposed["training.learning_rate"]
        assert manifest["network"]["options"]["width"] == proposed["network.options.width"]


@pytest.mark.slow
def test_one_trial_at_a_time_proposes_the_same_again(proposals, place, store):
    again = search(PROPOSED, name="again", storage=place, tracking_uri=store)
    assert changes(again) == changes(proposals)
    assert ids(again) == ids(proposals)


@pytest.mark.slow
def test_a_sweep_of_optuna_that_was_cut_off_replaces_what_had_not_ended(proposals, place, store):
    """Its driver was killed while the second trajectory trained, before its first checkpoint."""
    cut = place / "cut-proposals"
    shutil.copytree(proposals.path, cut)
    shutil.rmtree(cut / "checkpoints")
    events = [json.loads(line) for line in (cut / "journal.jsonl").read_text().splitlines()]
    begun = next(n for n, e in enumerate(events) if e.get("trajectory") == "trial1-seed0") + 1
    (cut / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events[:begun]))
    with sqlite3.connect(cut / FILE) as database:
        database.execute("DELETE FROM trials WHERE number = 2")
        database.execute("UPDATE trials SET state = 'RUNNING' WHERE number = 1")
        database.execute("DELETE FROM trial_values WHERE trial_id NOT IN (SELECT 1)")
    again = search(PROPOSED, name=cut.name, storage=place, tracking_uri=store)
    states = {e["trajectory"]: e["state"] for e in select(again.events(), "trajectory")}
    assert states["trial1-seed0"] == "failed"
    assert len([state for state in states.values() if state != "failed"]) == 3
    assert told(again)[0] == told(proposals)[0]
    assert told(again)[1] == "FAIL"
    assert all(isinstance(values, list) for values in told(again)[2:])
    assert again.report()["state"] == "done"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_halving_ends_trajectories_that_optuna_proposed(place, store):
    """The second of this seed has a penalty under which nothing is learned."""
    settings = Optuna(
        trajectories=2,
        sampler="random",
        seed=3,
        objective="pareto",
        ranges={"penalty": (1e-3, 10.0), "training.epochs": Range(5, 6)},
    )
    space = dataclasses.replace(
        PROPOSED,
        name="halved-proposals",
        stop_rule=StopRule(threshold=1e-9),
        halving=Halving(grace=2),
        optuna=settings,
    )
    sweep = search(space, name="halved-proposals", storage=place, tracking_uri=store)
    ends = select(sweep.events(), "trajectory")
    assert [end["changes"]["penalty"] for end in ends] == [1e-3, 10.0]
    assert [end["state"] for end in ends] == ["not converged", "hopeless"]
    database = f"sqlite:///{sweep.path / FILE}"
    (name,) = optuna.get_all_study_names(database)
    trials = optuna.load_study(study_name=name, storage=database).trials
    assert {trial.state.name for trial in trials} == {"FAIL"}  # None drew a ticket.


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_a_trajectory_that_fails_is_named_and_the_others_finish(place, store, tmp_path):
    (tmp_path / "fragile.py").write_text(FRAGILE)
    network = Network(f"{tmp_path}/fragile.py:network")
    space = dataclasses.replace(SPACE, name="fragile", network=network, penalties=(1e-3,))
    with pytest.raises(SweepFailed, match=r"penalty0\.001-seed0.*the wheels came off"):
        search(space, name="fragile", storage=place, tracking_uri=store)
    report = Sweep(place / "fragile").report()
    assert report["state"] == "failed"
    assert report["trajectories"][0]["state"] == "failed"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_a_proof_that_fails_fails_the_sweep_which_can_go_on(place, store):
    """Tickets are damaged as soon as they are drawn, and drawn again when the sweep goes on."""

    def damage(event):
        if event["event"] == "ticket":
            (place / "damaged" / event["path"] / WEIGHTS).unlink()

    with pytest.raises(SweepFailed, match=r"a proof failed: .*DamagedTicket"):
        search(SPACE, name="damaged", storage=place, tracking_uri=store, observer=damage)
    assert search(SPACE, name="damaged", storage=place, tracking_uri=store).report()["winners"]


@pytest.mark.slow
def test_one_ticket_can_be_retrained_again(sweep, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ticket = ids(sweep)[0]
    path = sweep.path / "tickets" / ticket
    done = retrain_ticket(path, epochs=1, weights="reinit")
    # It is told of where the sweep was recorded, from whatever folder.
    assert not (tmp_path / "mlflow.db").exists()
    assert tracking.recorded_uri(sweep.path) == store
    assert (done["run"], done["epochs"]) == (ticket, 1)
    assert load_ticket(sweep.path / done["path"]).manifest["retrained"]["from"] == ticket


def test_a_store_that_is_refused_is_to_cost_a_cluster_nothing(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def connected(*_):
        pytest.fail("the cluster was asked first")
        yield

    monkeypatch.setattr(driver, "connected", connected)
    monkeypatch.setattr(driver.ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        cluster = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(InputError, match=r"^tracking_uri: "):
            search(SPACE, name="x", storage=tmp_path, tracking_uri="sqlite://", address=cluster)


@pytest.fixture
def handlers():
    """Signals are handled as before when the test ends."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_hangup_interrupts_unless_it_is_ignored(monkeypatch):
    timer = SimpleNamespace(start=lambda: None)
    monkeypatch.setattr(driver.threading, "Timer", lambda *_: timer)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with driver.interruptible(""):
        os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, lambda *_: None)
    with pytest.raises(KeyboardInterrupt), driver.interruptible(""):
        os.kill(os.getpid(), signal.SIGHUP)


def test_a_ticket_is_not_retrained_with_images_other_than_the_sweeps(sweep, monkeypatch):
    monkeypatch.setattr(driver, "load_data", lambda data: load_data(Data(data.source, limit=128)))
    with pytest.raises(InputError, match=r"^data\.path: .* not those that the sweep began with"):
        retrain_ticket(sweep.path / "tickets" / ids(sweep)[0])


def test_a_sweep_that_goes_on_with_retraining_alone_says_that_it_runs(tmp_path, monkeypatch):
    cut = {"event": "end", "state": "interrupted", "reason": ""}
    made = Sweep(made_up_sweep.write(tmp_path / "cut", [*made_up_sweep.SEARCHED, cut]))
    monkeypatch.setattr(driver, "retrain", lambda *_, **__: None)
    monkeypatch.setattr(driver, "workers_now", lambda _: 1)
    told = []
    room = Room(cpus=1, gpus=0.0, slots=1, most=1, workers=1)
    driver._retrain_winners(made_up_sweep.SPACE, made, None, room, told.append)
    assert told == [made_up_sweep.SEARCHED[-1]]
