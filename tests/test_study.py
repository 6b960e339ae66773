"""What Optuna proposes, what it is told, and where it keeps it."""

import dataclasses
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import optuna
import pytest
from made_up_sweep import OPENING, SPACE, check, ticket, trajectory, write
from obstore.store import MemoryStore
from optuna.trial import TrialState

from raytickets import driver, storage, study
from raytickets.config import Data, InputError, Network, Optuna, Range, Resources, Training
from raytickets.halving import hypervolume
from raytickets.lease import Holder, Lease, Lost
from raytickets.plan import Plan
from raytickets.trajectory import Point

RANGES = {
    "penalty": Range(1e-5, 1e-2, log=True),
    "training.epochs": Range(8, 20),
    "network.options.width": (0.125, 0.25),
}
SETTINGS = Optuna(trajectories=5, ranges=RANGES, startup=3)
DATA = OPENING["data"]["fingerprint"]
DENSE = OPENING["dense"]["macs"]


def space(**settings):
    return dataclasses.replace(SPACE, optuna=dataclasses.replace(SETTINGS, **settings))


def opened(space, sweep):
    return study.open_study(space, study.open_storage(space, sweep), study.study_name(space, DATA))


def asked(space, sweep, count):
    """So many points, each told as better the higher its penalty."""
    opened_study = opened(space, sweep)
    points = []
    for _ in range(count):
        points.append(study.ask(opened_study, space))
        score = points[-1].penalty
        opened_study.tell(points[-1].number, [score, score][: len(opened_study.directions)])
    return points


def states(opened_study):
    return [trial.state for trial in opened_study.trials]


# What is proposed


def test_points_lie_in_the_ranges_and_whole_numbers_stay_whole(tmp_path):
    for point in asked(space(), tmp_path, 8):
        assert 1e-5 <= point.penalty <= 1e-2
        assert point.changes["penalty"] == point.penalty
        assert isinstance(point.changes["training.epochs"], int)
        assert 8 <= point.changes["training.epochs"] <= 20
        assert point.changes["network.options.width"] in (0.125, 0.25)
        assert space().with_changes(point.changes).penalties == (point.penalty,)


def test_without_a_range_for_it_the_penalty_is_that_of_the_space(tmp_path):
    ranges = {"training.learning_rate": Range(0.01, 0.1)}
    settings = dataclasses.replace(SETTINGS, ranges=ranges)
    fixed = dataclasses.replace(SPACE, penalties=(3e-4,), optuna=settings)
    (point,) = [study.propose(fixed, opened(fixed, tmp_path).ask())]
    assert point.penalty == 3e-4
    assert list(point.changes) == ["training.learning_rate"]


def test_the_seeds_take_turns(tmp_path):
    points = asked(dataclasses.replace(space(), seeds=(7, 9)), tmp_path, 4)
    assert [point.seed for point in points] == [7, 9, 7, 9]
    assert points[3].id == "trial3-seed9"


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("objective", ["hypervolume", "pareto"])
def test_the_same_seed_proposes_the_same_points(tmp_path, sampler, objective):
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    for folder in (one, two, other):
        folder.mkdir()
    points = asked(space(sampler=sampler, objective=objective), one, 5)
    assert points == asked(space(sampler=sampler, objective=objective), two, 5)
    assert points[:1] != asked(space(sampler=sampler, objective=objective, seed=1), other, 1)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_one_that_goes_on_does_not_propose_the_same_again(tmp_path, sampler):
    first = asked(space(sampler=sampler), tmp_path, 3)
    second = asked(space(sampler=sampler), tmp_path, 3)
    assert [point.number for point in second] == [3, 4, 5]
    assert {point.penalty for point in first}.isdisjoint(point.penalty for point in second)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_one_that_was_cut_off_proposes_what_it_would_have(tmp_path, sampler):
    def drawn(folder, *counts):
        points = []
        for count in counts:
            again = opened(space(sampler=sampler, startup=2), folder)
            for _ in range(count):
                points.append(study.ask(again, space(sampler=sampler, startup=2)))
                again.tell(points[-1].number, points[-1].penalty)
        return points

    folders = [tmp_path / name for name in ("whole", "cut")]
    for folder in folders:
        folder.mkdir()
    assert drawn(folders[0], 6) == drawn(folders[1], 1, 3, 2)


@pytest.mark.parametrize(("sampler", "least", "most"), [("tpe", 9, 20), ("random", 0, 5)])
def test_tpe_learns_from_what_it_is_told_and_random_search_does_not(sampler, least, most):
    """The objective rises with the penalty, a sixth of whose range lies above 3e-3."""
    learner = space(sampler=sampler)
    sampler = study.sampler(learner, trials=0)
    in_memory = optuna.create_study(direction="maximize", sampler=sampler)
    penalties = []
    for _ in range(24):
        trial = in_memory.ask()
        penalties.append(study.propose(learner, trial).penalty)
        in_memory.tell(trial, penalties[-1])
    assert least <= sum(penalty > 3e-3 for penalty in penalties[4:]) <= most


# What it is told

TICKETS = [
    ticket("trial0-seed0", "a", 0.3, DENSE // 2, 0.75),
    ticket("trial0-seed0", "b", 0.5, DENSE // 4, 0.5),
]


def ended(state, number=0):
    return trajectory(f"trial{number}-seed0", state, 10, {}) | {"changes": {}}


def test_hypervolume_is_that_of_all_tickets():
    events = [*TICKETS, *TICKETS, ended("drawn")]  # as if a trajectory had run again
    assert study.outcome(space(), DENSE, events) == [hypervolume([0.75, 0.5], [0.5, 0.25])]


def test_without_a_ticket_hypervolume_is_0_and_pareto_a_failure():
    assert study.outcome(space(), DENSE, [ended("not converged")]) == [0]
    assert study.outcome(space(objective="pareto"), DENSE, [ended("not converged")]) is None


def test_pareto_takes_the_ticket_with_the_largest_hypervolume_of_its_own():
    chosen = study.outcome(space(objective="pareto"), DENSE, [*TICKETS, ended("drawn")])
    assert chosen == [0.75, 0.5]
    smaller = [TICKETS[0], TICKETS[1] | {"macs": DENSE // 8, "proof_accuracy": 0.5}]
    assert study.outcome(space(objective="pareto"), DENSE, smaller) == [0.5, 0.125]


@pytest.mark.parametrize("objective", ["hypervolume", "pareto"])
@pytest.mark.parametrize("state", ["diverged", "failed"])
def test_what_diverged_or_failed_is_a_failure_whatever_it_drew(objective, state):
    events = [*TICKETS, ended(state)]
    assert study.outcome(space(objective=objective), DENSE, events) is None


def test_what_seems_to_run_is_settled_from_the_journal(tmp_path):
    """Three trials ran when the driver died: one had ended, one was cut off, one never began."""
    before = opened(space(), tmp_path)
    points = [study.propose(space(), before.ask()) for _ in range(3)]
    begun = check("trial1-seed0", 1.0, {"0.3": None, "0.5": None})
    events = [OPENING, *TICKETS, ended("drawn"), begun]
    again = opened(space(), tmp_path)
    study.settle(again, space(), events, tmp_path / "checkpoints")
    assert states(again) == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]
    assert again.trials[0].values == study.outcome(space(), DENSE, TICKETS)
    assert study.going_on(again, space(), events, tmp_path / "checkpoints") == []
    assert study.cut_off(again, space(), events, []) == [points[1]]


def test_what_has_a_checkpoint_and_has_not_ended_keeps_running(tmp_path):
    before = opened(space(), tmp_path)
    points = [study.ask(before, space()) for _ in range(3)]
    for point in points[:2]:
        (tmp_path / "checkpoints" / point.id).mkdir(parents=True)
    begun = check(points[1].id, 1.0, {"0.3": None, "0.5": None})
    events = [OPENING, *TICKETS, ended("drawn"), begun]
    again = opened(space(), tmp_path)
    study.settle(again, space(), events, tmp_path / "checkpoints")
    assert states(again) == [TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAIL]
    going_on = study.going_on(again, space(), events, tmp_path / "checkpoints")
    assert going_on == [points[1]]
    assert study.cut_off(again, space(), events, going_on) == []


@pytest.mark.parametrize("told", [0, 1])
def test_what_the_study_saw_end_and_the_journal_did_not_goes_on_from_its_checkpoint(tmp_path, told):
    """Of a driver whose machine was lost the journal's last seconds are missing."""
    (point,) = asked(space(), tmp_path, 1)
    (tmp_path / "checkpoints" / point.id).mkdir(parents=True)
    events = [OPENING, check(point.id, 1.0, {"0.3": None, "0.5": None})][: 1 + told]
    again = opened(space(), tmp_path)
    study.settle(again, space(), events, tmp_path / "checkpoints")
    assert states(again) == [TrialState.COMPLETE]
    going_on = study.going_on(again, space(), events, tmp_path / "checkpoints")
    assert going_on == [point]
    assert study.cut_off(again, space(), events, going_on) == []
    events.append(ended("drawn"))
    assert study.going_on(again, space(), events, tmp_path / "checkpoints") == []


def test_only_the_trials_of_these_numbers_are_settled(tmp_path):
    shared = opened(space(), tmp_path)
    for _ in range(2):
        shared.ask()
    study.settle(shared, space(), [OPENING], tmp_path / "checkpoints", {1})
    assert states(shared) == [TrialState.RUNNING, TrialState.FAIL]


def test_a_point_comes_back_from_the_event_of_its_end():
    changes = {"penalty": 1e-3, "training.epochs": 9}
    event = ended("drawn", 12) | {"penalty": 1e-3, "changes": changes}
    assert study.point(event) == Point(1e-3, 0, 12, changes)
    assert study.point(event).id == event["trajectory"]


# Where it is kept


def test_without_a_database_it_is_a_file_in_the_folder_of_the_sweep(tmp_path):
    asked(space(), tmp_path, 1)
    assert (tmp_path / study.FILE).is_file()
    url = f"sqlite:///{tmp_path / study.FILE}"
    assert optuna.get_all_study_names(url) == [study.study_name(space(), DATA)]


@pytest.mark.parametrize(
    "changed",
    [
        {"optuna": dataclasses.replace(SETTINGS, trajectories=9, sampler="random", startup=1)},
        {"optuna": dataclasses.replace(SETTINGS, seed=3, storage="sqlite:///elsewhere.db")},
        {"winners": 9, "resources": Resources(cpus_per_trial=2)},
        {"data": Data(loading="memory")},
    ],
)
def test_the_same_space_goes_on_with_its_study(changed):
    assert study.study_name(dataclasses.replace(space(), **changed), DATA) == (
        study.study_name(space(), DATA)
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"optuna": dataclasses.replace(SETTINGS, objective="pareto")},
        {"optuna": dataclasses.replace(SETTINGS, ranges={"penalty": Range(1e-5, 1e-3)})},
        {"network": Network("cifar_vgg", {"depth": 9, "width": 0.25})},
        {"training": Training(epochs=21)},
        {"prune_ratios": (0.3,)},
        {"data": Data(flip=True)},
        {"name": "other"},
    ],
)
def test_another_space_has_a_study_of_its_own(changed):
    assert study.study_name(dataclasses.replace(space(), **changed), DATA) != (
        study.study_name(space(), DATA)
    )


def test_other_images_have_a_study_of_their_own():
    assert study.study_name(space(), DATA) != study.study_name(space(), "0" * 64)
    assert study.study_name(space(), DATA).startswith("raytickets/digits-")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:////nowhere/at/all.db", "unable to open database file"),
        ("nothing://host/name", "Can't load plugin"),
        ("sqlite:///${STUDY_PASSWORD}.db", "STUDY_PASSWORD is not set"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused(tmp_path, url, said):
    with pytest.raises(InputError, match=rf"^optuna\.storage: .*{said}"):
        study.open_storage(space(storage=url), tmp_path)


def test_no_password_is_in_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_PASSWORD", "open sesame/@")
    url = "postgresql://me:${STUDY_PASSWORD}@127.0.0.1:1/name"
    with pytest.raises(InputError) as refused:
        study.open_storage(space(storage=url), tmp_path)
    assert "sesame" not in str(refused.value)
    assert "\n" not in str(refused.value)
    # Neither if it is the other variable that there is not.
    with pytest.raises(InputError, match="NO_SUCH_HOST is not set") as refused:
        study.open_storage(space(storage=url.replace("127.0.0.1", "${NO_SUCH_HOST}")), tmp_path)
    assert "sesame" not in str(refused.value)


def test_a_sweep_whose_study_is_gone_is_refused(tmp_path):
    begun = [OPENING, check("trial0-seed0", 1.0, {"0.3": None, "0.5": None})]
    study.check_study(space(), tmp_path, DATA, [OPENING])
    with pytest.raises(InputError, match=r"^optuna\.storage: None .* choose a new name"):
        study.check_study(space(), tmp_path, DATA, begun)
    asked(space(), tmp_path, 1)
    study.check_study(space(), tmp_path, DATA, begun)


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Two machines' copies of a sweep at one address."""
    store = MemoryStore()
    monkeypatch.setattr(storage, "_store", lambda *_: store)
    folders = [tmp_path / name / "raytickets/remote/s3/b/first" for name in ("one", "two")]
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


def drive(folder, before, count, upload=True):
    """So many more trials at an address whose journal tells of these ones before."""
    begun = [check(point.id, 1.0, {"0.3": None, "0.5": None}) for point in before]
    study.check_study(space(), folder, DATA, [OPENING, *begun])
    points = asked(space(), folder, count)
    if upload:
        storage.keep_database(folder / study.FILE)
    return before + points


def test_machines_in_turns_go_on_with_all_trials_of_each_other(copies):
    one, two = copies
    points = []
    for folder in (one, two, one, two):
        points = drive(folder, points, 2)
    assert [point.number for point in points] == [0, 1, 2, 3, 4, 5, 6, 7]
    (uploaded, _) = storage.read(one / study.FILE)
    assert (two / study.FILE).read_bytes() == uploaded
    found = opened(space(), two).trials
    assert [study.propose(space(), trial) for trial in found] == points
    assert len({point.penalty for point in points}) == 8


def test_trials_that_a_killed_driver_did_not_upload_are_gone_on_with(copies):
    one, two = copies
    points = drive(one, drive(two, drive(one, [], 2), 2), 2)
    points = drive(one, points, 1, upload=False)
    assert drive(one, points, 1)[-1].number == 7
    assert drive(two, points, 1)[-1].number == 8


def test_a_trial_is_there_before_the_journal_tells_of_it_and_its_outcome_afterwards(copies):
    one, two = copies
    begun, there = check("trial0-seed0", 1.0, {"0.3": None, "0.5": None}), []

    def tell(event):
        copy = storage.fetch_database(two / study.FILE)
        there.append(states(opened(space(), two)) if copy.exists() else None)
        if event["event"] == "trajectory":
            opened(space(), one).tell(0, 0.5)

    holder = Holder("host", 1, "2026-01-01T00:00:00+00:00")
    plan = Plan(space(), one, None, OPENING)
    told = driver._with_study(plan, Lease(holder, 1), tell)
    told(OPENING)
    opened(space(), one).ask()
    told(begun)
    told(ended("drawn"))
    assert there == [None, [TrialState.RUNNING], [TrialState.RUNNING]]
    storage.fetch_database(two / study.FILE)
    assert states(opened(space(), two)) == [TrialState.COMPLETE]


def test_under_a_lost_lease_no_study_is_uploaded(copies):
    one, _ = copies

    def lost():
        raise Lost("first", "another process has taken it")

    lease = Lease(Holder("host", 1, "2026-01-01T00:00:00+00:00"), 1, lost)
    told = driver._with_study(Plan(space(), one, None, OPENING), lease, pytest.fail)
    opened(space(), one).ask()
    with pytest.raises(Lost):
        told(check("trial0-seed0", 1.0, {"0.3": None, "0.5": None}))
    assert storage.read(one / study.FILE) is None


@pytest.fixture
def postgresql():
    """The address of a server of the test's own, which must not run as root."""
    pytest.importorskip("psycopg")
    if not shutil.which("pg_ctl"):
        pytest.skip("no PostgreSQL")
    user = "nobody" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    if user:
        shutil.chown(folder, user)

    def run(*command):
        subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    (folder / "password").write_text("a b@c/d")
    run("initdb", "-D", folder / "data", "-A", "scram-sha-256", "-U", "me", "--pwfile", "password")
    options = f"-c listen_addresses=127.0.0.1 -p 54329 -k {folder}"
    run("pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log", "-o", options, "start")
    yield "postgresql://me:${STUDY_PASSWORD}@127.0.0.1:54329/postgres"
    run("pg_ctl", "-D", folder / "data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.mark.slow
def test_on_postgresql_the_next_sweep_goes_on_with_the_study(postgresql, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_PASSWORD", "a b@c/d")
    shared = space(storage=postgresql)
    asked(shared, tmp_path / "monday", 4)
    assert [point.number for point in asked(shared, tmp_path / "tuesday", 2)] == [4, 5]
    monkeypatch.setenv("STUDY_PASSWORD", "wrong")
    with pytest.raises(InputError, match="password authentication failed") as refused:
        study.open_storage(shared, tmp_path)
    assert "wrong" not in str(refused.value)


# What is drawn


def test_there_are_no_figures_without_a_study_or_with_less_than_two_trials(tmp_path):
    folder = write(tmp_path / "sweep", [OPENING])
    assert study.figures(SPACE, folder) == {}
    assert study.figures(space(), folder) == {}
    asked(space(), folder, 1)
    assert study.figures(space(), folder) == {}


@pytest.mark.parametrize(
    ("objective", "names"),
    [
        ("hypervolume", {"optimization_history", "param_importances"}),
        (
            "pareto",
            {
                "pareto_front",
                *("optimization_history_accuracy", "optimization_history_macs"),
                *("param_importances_accuracy", "param_importances_macs"),
            },
        ),
    ],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_the_figures_are_optunas_own(tmp_path, objective, names):
    folder = write(tmp_path / "sweep", [OPENING])
    asked(space(objective=objective), folder, 6)
    figures = study.figures(space(objective=objective), folder)
    assert set(figures) == names
    for figure in figures.values():
        assert figure.data


@pytest.mark.filterwarnings("ignore:Target and region quantiles")
def test_trials_that_all_came_to_the_same_have_figures_too(tmp_path):
    folder = write(tmp_path / "sweep", [OPENING])
    shared = opened(space(), folder)
    for _ in range(3):
        trial = shared.ask()
        study.propose(space(), trial)
        shared.tell(trial, 0.0)
    assert study.figures(space(), folder)
