"""How Optuna's proposals pass through Ray Tune: asked for once, told of once."""

import dataclasses

import pytest
from made_up_sweep import OPENING, SPACE, check, ticket, trajectory, write
from optuna.trial import TrialState
from ray.tune.search import Searcher

from raytickets import study, tuner
from raytickets.config import Halving, Optuna, Range
from raytickets.journal import Event, Journal
from raytickets.sweep import Sweep, select
from raytickets.ticket import DamagedTicket

RANGES = {"penalty": Range(1e-5, 1e-2, log=True), "training.epochs": Range(8, 20)}
PROPOSED = dataclasses.replace(SPACE, optuna=Optuna(trajectories=3, ranges=RANGES, startup=2))
PARETO = dataclasses.replace(
    PROPOSED, optuna=dataclasses.replace(PROPOSED.optuna, objective="pareto")
)
BEGUN = OPENING | {"space": PROPOSED.as_dict()}
MACS = OPENING["dense"]["macs"]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "load_ticket", lambda _: None)
    return Sweep(write(tmp_path / "first", [BEGUN]))


def begin(sweep: Sweep, space=PROPOSED):
    journal = Journal(sweep.path)
    work = tuner._Proposed(space, sweep, journal.append)
    journal.close()
    return work


def results(id: str, state: str, *tickets: Event) -> list[dict]:
    """What a trial reports: a check, each ticket, and how it ended."""
    ended = trajectory(id, state, 10, {"0.3": state, "0.5": state}) | {"changes": {}}
    events = [check(id, 1.0, {"0.3": None, "0.5": None}), *tickets, ended]
    return [{"events": [event]} for event in events]


def finish(work, sweep: Sweep, trial_id: str, reports: list[dict], error: bool = False) -> None:
    """As Tune passes results on: all but the last to one method, the last to another."""
    journal = Journal(sweep.path)
    for report in reports:
        for event in report["events"]:
            journal.append(event)
    journal.close()
    for report in reports[:-1]:
        work.on_trial_result(trial_id, report)
    work.on_trial_complete(trial_id, None if error else reports[-1], error)


def drawn(point: dict, accuracy=0.75) -> list[dict]:
    id = f"trial{point['number']}-seed{point['seed']}"
    return results(id, "drawn", ticket(id, f"{point['number']}" * 16, 0.3, MACS // 2, accuracy))


def told(sweep: Sweep, space=PROPOSED) -> list:
    name = study.study_name(space, OPENING["data"]["fingerprint"])
    trials = study.open_study(space, study.open_storage(space, sweep.path), name).trials
    return [trial.values or trial.state for trial in trials]


def test_as_many_trajectories_as_asked_for_then_provers(sweep):
    work = begin(sweep)
    work.provers = 2
    assert work.trajectories == 3
    points = [work.suggest(trial)["point"] for trial in "abc"]
    assert [point["number"] for point in points] == [0, 1, 2]
    assert work.suggest("d") == {"prover": 1}
    assert work.suggest("e") == {"prover": 0}
    assert work.suggest("f") == Searcher.FINISHED
    work.on_trial_result("d", {"events": []})
    work.on_trial_complete("d", {"events": []})


def test_optuna_is_told_once_at_the_end_of_a_trajectory(sweep):
    work = begin(sweep)
    point = work.suggest("a")["point"]
    reports = drawn(point)
    work.on_trial_result("a", reports[0])
    assert told(sweep) == [TrialState.RUNNING]
    finish(work, sweep, "a", reports[1:])
    assert told(sweep) == [[0.75 * 0.5]]


def test_two_objectives_are_told_together(sweep):
    work = begin(sweep, PARETO)
    finish(work, sweep, "a", drawn(work.suggest("a")["point"]))
    work.suggest("b")
    finish(work, sweep, "b", results("trial1-seed0", "not converged"))
    assert told(sweep, PARETO) == [[0.75, 0.5], TrialState.FAIL]


@pytest.mark.parametrize("space", [PROPOSED, PARETO])
def test_what_diverged_raised_or_vanished_is_told_as_failed(sweep, space):
    work = begin(sweep, space)
    for trial in "abc":
        work.suggest(trial)
    finish(work, sweep, "a", results("trial0-seed0", "diverged"))
    finish(work, sweep, "b", results("trial1-seed0", "failed")[:1], error=True)
    work.on_trial_complete("c")
    assert told(sweep, space) == [TrialState.FAIL] * 3


def test_a_trajectory_that_halving_ends_is_told_with_what_it_drew(sweep):
    work = begin(sweep)
    finish(work, sweep, "a", drawn(work.suggest("a")["point"])[:-1])
    assert told(sweep) == [[0.75 * 0.5]]


def test_nothing_is_left_running_when_a_search_is_broken_off(sweep):
    work = begin(sweep)
    work.suggest("a")
    work.close()
    assert told(sweep) == [TrialState.FAIL]


def test_a_sweep_cut_off_goes_on_and_replaces_what_had_not_ended(sweep):
    """Of three trajectories one ended, one was training and one had only been proposed."""
    work = begin(sweep)
    points = [work.suggest(trial)["point"] for trial in "abc"]
    finish(work, sweep, "a", drawn(points[0]))
    journal = Journal(sweep.path)
    journal.append(check("trial1-seed0", 2.0, {"0.3": None, "0.5": None}))
    journal.close()

    again = begin(sweep)
    assert told(sweep) == [[0.375], TrialState.FAIL, TrialState.FAIL]
    assert again.trajectories == 2
    assert [again.suggest(trial)["point"]["number"] for trial in "de"] == [3, 4]
    cut = select(sweep.events(), "trajectory")[1]
    assert (cut["trajectory"], cut["state"], cut["reason"]) == (
        *("trial1-seed0", "failed", "it was cut off"),
    )
    assert cut["train_macs"] == 2 * 10 * 10**9
    assert cut["changes"] == points[1]["changes"]


def test_a_sweep_that_ended_proposes_nothing_more(sweep):
    work = begin(sweep)
    for trial in "abc":
        finish(work, sweep, trial, drawn(work.suggest(trial)["point"]))
    assert begin(sweep).trajectories == 0
    assert Sweep(sweep.path).failures() == []


def test_what_failed_is_replaced_and_then_no_failure_of_the_sweep(sweep):
    work = begin(sweep)
    for trial in "ab":
        finish(work, sweep, trial, drawn(work.suggest(trial)["point"]))
    work.suggest("c")
    finish(work, sweep, "c", results("trial2-seed0", "failed"))
    assert [event["trajectory"] for event in sweep.failures()] == ["trial2-seed0"]
    again = begin(sweep)
    assert again.trajectories == 1
    finish(again, sweep, "d", drawn(again.suggest("d")["point"]))
    assert sweep.failures() == []


def test_one_whose_tickets_were_damaged_runs_again_at_the_same_point(sweep, monkeypatch):
    work = begin(sweep)
    for trial in "abc":
        finish(work, sweep, trial, drawn(work.suggest(trial)["point"]))

    def load(path):
        if path.name == "1" * 16:
            raise DamagedTicket(path, "it is gone")

    monkeypatch.setattr(tuner, "load_ticket", load)
    again = begin(sweep)
    assert again.trajectories == 1
    assert again.suggest("d")["point"]["number"] == 1
    before = told(sweep)
    again.on_trial_result("d", {"events": []})
    again.on_trial_complete("d", {"events": []})
    assert told(sweep) == before


def test_with_one_slot_the_same_seed_proposes_the_same_trajectories(tmp_path):
    """Accuracies are told as they would be; each proposal follows from those before it."""

    def run(name):
        sweep = Sweep(write(tmp_path / name, [OPENING]))
        many = dataclasses.replace(PROPOSED.optuna, trajectories=5)
        work = begin(sweep, dataclasses.replace(PROPOSED, optuna=many))
        points = []
        for trial in "abcde":
            points.append(work.suggest(trial)["point"])
            finish(work, sweep, trial, drawn(points[-1], 1 - points[-1]["penalty"]))
        return points

    assert run("one") == run("two")


def test_halving_reaches_to_the_longest_training_that_may_be_proposed():
    halved = dataclasses.replace(PROPOSED, halving=Halving(grace=2))
    assert tuner._scheduler(halved)._max_t == 20
    chosen = dataclasses.replace(PROPOSED.optuna, ranges={**RANGES, "training.epochs": (8, 30)})
    assert tuner._scheduler(dataclasses.replace(halved, optuna=chosen))._max_t == 30
    assert tuner._scheduler(dataclasses.replace(SPACE, halving=Halving()))._max_t == 20
