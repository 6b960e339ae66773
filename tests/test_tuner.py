"""What a search hands out and hears of: the grid, Optuna's proposals, proofs, lost workers."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
from made_up_sweep import OPENING, SPACE, check, ticket, trajectory, write
from optuna.trial import TrialState

import raytickets.driver  # which sets what Ray reads when it is imported
from raytickets import study, tuner
from raytickets.config import (
    Data,
    Halving,
    Network,
    Optuna,
    Range,
    Retraining,
    SearchSpace,
    StopRule,
)
from raytickets.config import Training as Recipe
from raytickets.journal import Event, Journal
from raytickets.plan import make_plan
from raytickets.room import Room
from raytickets.sweep import Sweep, select

RANGES = {"penalty": Range(1e-5, 1e-2, log=True), "training.epochs": Range(8, 20)}
PROPOSED = dataclasses.replace(SPACE, optuna=Optuna(trajectories=3, ranges=RANGES, startup=2))
PARETO = dataclasses.replace(
    PROPOSED, optuna=dataclasses.replace(PROPOSED.optuna, objective="pareto")
)
BEGUN = OPENING | {"space": PROPOSED.as_dict()}
MACS = OPENING["dense"]["macs"]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "is_whole", lambda _: True)
    return Sweep(write(tmp_path / "first", [BEGUN]))


def begin(sweep: Sweep, space=PROPOSED):
    return tuner._Proposed(space, sweep, teller(sweep))


def teller(sweep: Sweep):
    def tell(event: Event) -> None:
        journal = Journal(sweep.path)
        journal.append(event)
        journal.close()

    return tell


def propose(work) -> dict:
    return work.next().config["point"]


def results(id: str, state: str, *tickets: Event) -> list[Event]:
    """What a trial reports: a check, each ticket, and how it ended."""
    ended = trajectory(id, state, 10, {"0.3": state, "0.5": state}) | {"changes": {}}
    return [check(id, 1.0, {"0.3": None, "0.5": None}), *tickets, ended]


def finish(work, events: list[Event]) -> None:
    for event in events:
        work.tell(event)


def drawn(point: dict, accuracy=0.75) -> list[Event]:
    id = f"trial{point['number']}-seed{point['seed']}"
    return results(id, "drawn", ticket(id, f"{point['number']}" * 16, 0.3, MACS // 2, accuracy))


def told(sweep: Sweep, space=PROPOSED) -> list:
    name = study.study_name(space, OPENING["data"]["fingerprint"])
    trials = study.open_study(space, study.open_storage(space, sweep.path), name).trials
    return [trial.values or trial.state for trial in trials]


def test_as_many_trajectories_as_asked_for_then_proofs(sweep):
    space = dataclasses.replace(PROPOSED, winners=1)
    work = begin(sweep, space)
    assert work.left == 3
    points = [propose(work) for _ in range(3)]
    assert [point["number"] for point in points] == [0, 1, 2]
    for point in points:
        assert not work.ready
        finish(work, drawn(point))
    assert [work.next().config for _ in range(2)] == [
        {"proof": f"tickets/{number * 16}", "rung": 2} for number in "01"
    ]
    assert (work.ready, work.left) == (False, 2)


def test_optuna_is_told_once_at_the_end_of_a_trajectory(sweep):
    work = begin(sweep)
    events = drawn(propose(work))
    finish(work, events[:-1])
    assert told(sweep) == [TrialState.RUNNING]
    finish(work, events[-1:])
    assert told(sweep) == [[0.75 * 0.5]]


def test_events_that_a_trajectory_tells_again_count_once(sweep):
    work = begin(sweep)
    events = drawn(propose(work))
    finish(work, events[:-1])
    finish(work, events)
    finish(work, events)
    assert told(sweep) == [[0.75 * 0.5]]
    assert work.left == 2


def test_optuna_learns_nothing_of_tickets_from_before_a_new_beginning(sweep):
    work = begin(sweep)
    point = propose(work)
    *before, ending = drawn(point)
    anew = {"event": "retry", "trajectory": ending["trajectory"], "attempt": 1, "reason": "other"}
    finish(work, [*before, anew | {"anew": True}, before[0], ending])
    assert told(sweep) == [[0.0]]


def test_two_objectives_are_told_together(sweep):
    work = begin(sweep, PARETO)
    finish(work, drawn(propose(work)))
    work.next()
    finish(work, results("trial1-seed0", "not converged"))
    assert told(sweep, PARETO) == [[0.75, 0.5], TrialState.FAIL]


@pytest.mark.parametrize("space", [PROPOSED, PARETO])
def test_what_diverged_or_failed_is_told_as_failed(sweep, space):
    work = begin(sweep, space)
    _, second, _ = [work.next() for _ in range(3)]
    finish(work, results("trial0-seed0", "diverged"))
    finish(work, results("trial1-seed0", "failed")[:1])
    work.fail(second, "ValueError: no")
    assert told(sweep, space) == [TrialState.FAIL] * 2 + [TrialState.RUNNING]
    work.close()
    assert told(sweep, space) == [TrialState.FAIL] * 3


def test_a_trajectory_that_halving_ends_is_told_with_what_it_drew(sweep):
    work = begin(sweep)
    job, other = work.next(), work.next()
    for one in (job, other):
        (sweep.path / "checkpoints" / one.id / "deeper").mkdir(parents=True)
    finish(work, drawn(job.config["point"])[:-1])
    work.complete(job)
    assert told(sweep) == [[0.75 * 0.5], TrialState.RUNNING]
    (ended,) = select(sweep.events(), "trajectory")
    assert (ended["state"], ended["ratios"]) == ("hopeless", {"0.3": "drawn", "0.5": "hopeless"})
    # It is not gone on with.
    assert [path.name for path in (sweep.path / "checkpoints").iterdir()] == [other.id]


def test_of_what_was_broken_off_only_what_can_go_on_is_left_running(sweep):
    work = begin(sweep)
    kept = work.next().id
    work.next()
    (sweep.path / "checkpoints" / kept).mkdir(parents=True)
    work.close()
    assert told(sweep) == [TrialState.RUNNING, TrialState.FAIL]


def test_a_sweep_cut_off_goes_on_and_replaces_what_has_no_checkpoint(sweep):
    """Of three trajectories one ended, one was training and one had only been proposed."""
    work = begin(sweep)
    points = [propose(work) for _ in range(3)]
    finish(work, drawn(points[0]))
    finish(work, [check("trial1-seed0", 2.0, {"0.3": None, "0.5": None})])

    again = begin(sweep)
    assert told(sweep) == [[0.375], TrialState.FAIL, TrialState.FAIL]
    assert again.left == 2
    assert [propose(again)["number"] for _ in range(2)] == [3, 4]
    cut = select(sweep.events(), "trajectory")[1]
    assert (cut["trajectory"], cut["state"], cut["reason"]) == (
        *("trial1-seed0", "failed", "it was cut off"),
    )
    assert cut["train_macs"] == 2 * 10 * 10**9
    assert cut["changes"] == points[1]["changes"]


def test_a_trajectory_cut_off_goes_on_from_its_checkpoint_at_its_own_point(sweep):
    work = begin(sweep)
    points = [propose(work) for _ in range(3)]
    finish(work, drawn(points[0]))
    finish(work, drawn(points[1])[:1])
    (sweep.path / "checkpoints" / "trial1-seed0").mkdir(parents=True)

    again = begin(sweep)
    assert told(sweep) == [[0.375], TrialState.RUNNING, TrialState.FAIL]
    assert again.left == 2
    assert propose(again) == points[1]
    finish(again, drawn(points[1], 0.5))
    assert told(sweep) == [[0.375], [0.25], TrialState.FAIL]
    assert propose(again)["number"] == 3
    assert [e["state"] for e in select(sweep.events(), "trajectory")] == ["drawn", "drawn"]


def test_a_sweep_that_ended_proposes_nothing_more(sweep):
    space = dataclasses.replace(PROPOSED, winners=3)
    work = begin(sweep, space)
    for _ in range(3):
        finish(work, drawn(propose(work)))
    again = begin(sweep, space)
    assert (again.ready, again.left) == (False, 0)
    assert Sweep(sweep.path).failures() == []


def test_what_failed_is_replaced_and_then_no_failure_of_the_sweep(sweep):
    work = begin(sweep)
    for _ in range(2):
        finish(work, drawn(propose(work)))
    work.fail(work.next(), "ValueError: no")
    assert [event["trajectory"] for event in sweep.failures()] == ["trial2-seed0"]
    again = begin(sweep)
    assert again.left == 1
    finish(again, drawn(propose(again)))
    assert sweep.failures() == []


def test_one_whose_tickets_were_damaged_runs_again_at_the_same_point(sweep, monkeypatch):
    work = begin(sweep)
    for _ in range(3):
        finish(work, drawn(propose(work)))

    monkeypatch.setattr(tuner, "is_whole", lambda path: path.name != "1" * 16)
    again = begin(sweep)
    assert again.left == 1
    point = propose(again)
    assert point["number"] == 1
    before = told(sweep)
    finish(again, drawn(point))
    assert told(sweep) == before


def test_one_whose_damaged_ticket_was_drawn_again_has_ended(sweep, monkeypatch):
    """Another processor may draw another ticket; the damaged one is neither mended nor proved."""
    work = begin(sweep)
    for _ in range(3):
        finish(work, drawn(propose(work)))
    finish(work, [ticket("trial1-seed0", "a" * 16, 0.3, MACS // 2, 0.75)])
    monkeypatch.setattr(tuner, "is_whole", lambda path: path.name != "1" * 16)
    again = begin(sweep)
    assert again.left == 2
    paths = [again.next().config["proof"] for _ in range(2)]
    assert set(paths) <= {f"tickets/{id * 16}" for id in "02a"}


def test_with_one_slot_the_same_seed_proposes_the_same_trajectories(tmp_path):
    """Accuracies are told as they would be; each proposal follows from those before it."""

    def run(name):
        sweep = Sweep(write(tmp_path / name, [OPENING]))
        many = dataclasses.replace(PROPOSED.optuna, trajectories=5)
        work = begin(sweep, dataclasses.replace(PROPOSED, optuna=many))
        points = []
        for _ in range(5):
            points.append(propose(work))
            finish(work, drawn(points[-1], 1 - points[-1]["penalty"]))
        return points

    assert run("one") == run("two")


def test_a_proof_that_fails_ends_the_proofs_once_those_of_its_rung_have_ended(sweep):
    work = begin(sweep, dataclasses.replace(PROPOSED, winners=1))
    for _ in range(3):
        finish(work, drawn(propose(work)))
    first, second = work.next(), work.next()
    work.fail(first, "ValueError: no")
    proof = {"event": "proof", "rung": 2, "proof_accuracy": 0.9, "proof_macs": 1, "seconds": 1.0}
    finish(work, [proof | {"ticket": second.id}])
    assert (work.ready, work.left) == (False, 0)
    assert work.failed_proofs == ["a proof failed: ValueError: no"]


# Halving


def halved(**changes):
    return dataclasses.replace(PROPOSED, halving=Halving(grace=2), **changes)


def test_halving_reaches_to_the_longest_training_that_may_be_proposed(sweep):
    assert tuner._Halving(halved(), sweep)._max_t == 20
    chosen = dataclasses.replace(PROPOSED.optuna, ranges={**RANGES, "training.epochs": (8, 30)})
    assert tuner._Halving(halved(optuna=chosen), sweep)._max_t == 30
    fixed = dataclasses.replace(SPACE, halving=Halving())
    assert tuner._Halving(fixed, sweep)._max_t == 20


def trial(name: str, number: int):
    point = {"penalty": 0.1, "seed": 0, "number": number, "changes": {}}
    return SimpleNamespace(trial_id=name, config={"point": point})


def judge(halving, trial, epoch, accuracy) -> str:
    return halving.on_trial_result(None, trial, {"epoch": epoch, "accuracy": accuracy})


def test_a_trajectory_is_judged_once_whichever_trial_runs_it(sweep):
    """The first is behind the second, but had been alone when it was judged."""
    halving = tuner._Halving(halved(), sweep)
    for name, number in (("a", 0), ("b", 1)):
        halving.on_trial_add(None, trial(name, number))
    assert judge(halving, trial("a", 0), 2.0, 0.5) == "CONTINUE"
    assert judge(halving, trial("b", 1), 2.0, 0.9) == "CONTINUE"
    halving.on_trial_error(None, trial("a", 0))
    halving.on_trial_add(None, trial("c", 0))
    for epoch in (1.0, 2.0, 3.0):
        assert judge(halving, trial("c", 0), epoch, 0.5) == "CONTINUE"
    assert judge(halving, trial("b", 1), 4.0, 0.9) == "CONTINUE"
    assert judge(halving, trial("c", 0), 4.0, 0.6) == "STOP"


def test_a_sweep_that_goes_on_knows_how_accurate_trajectories_were_before(sweep):
    tell = teller(sweep)
    for number, accuracy in enumerate((0.5, 0.9)):
        judged = {"validation_accuracy": accuracy, "about_to_draw": False}
        tell(check(f"trial{number}-seed0", 2.0, {"0.3": None, "0.5": None}) | judged)
    halving = tuner._Halving(halved(), sweep)
    for name, number in (("a", 0), ("d", 3)):
        halving.on_trial_add(None, trial(name, number))
    assert judge(halving, trial("a", 0), 2.0, 0.5) == "CONTINUE"
    assert judge(halving, trial("d", 3), 2.0, 0.5) == "STOP"


def test_what_halving_had_stopped_is_stopped_again_at_the_same_epoch(sweep):
    tell = teller(sweep)
    for number, accuracy in ((0, 0.9), (1, 0.5)):
        judged = {"validation_accuracy": accuracy, "about_to_draw": False}
        tell(check(f"trial{number}-seed0", 2.0, {"0.3": None, "0.5": None}) | judged)
    halving = tuner._Halving(halved(), sweep)
    halving.on_trial_add(None, trial("b", 1))
    assert judge(halving, trial("b", 1), 1.0, 0.99) == "CONTINUE"
    assert judge(halving, trial("b", 1), 2.0, 0.5) == "STOP"
    assert judge(halving, trial("b", 1), 3.0, 0.99) == "STOP"


# On Ray

MORTAL = """
import os, pathlib, signal, torch
from raytickets.models import cifar_vgg

class Mortal(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.steps = inner, 0

    def forward(self, images):
        self.steps += self.training
        fault = pathlib.Path(__file__).with_name("fault")
        kind = fault.read_text() if self.training and fault.exists() else ""
        if kind and self.steps == (1 if kind == "always" else 20):
            if kind != "always":
                fault.unlink()
            if kind == "raises":
                raise ValueError("no such branch")
            if kind == "memory":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(images)

def network(num_classes, in_channels):
    inner = cifar_vgg(num_classes=num_classes, in_channels=in_channels, depth=9, width=0.125)
    return Mortal(inner)
"""


@pytest.fixture(scope="module")
def run(ray_instance, tmp_path_factory):  # noqa: ARG001
    """`run("once")` is a small sweep with this fault in the 20th step of a worker's training.

    `always` is in the first one, so that no checkpoint is ever written.
    """
    place = tmp_path_factory.mktemp("mortal")
    (place / "nets.py").write_text(MORTAL)
    space = SearchSpace(
        name="tiny",
        network=Network(f"{place}/nets.py:network"),
        data=Data("digits", limit=256),
        penalties=(1e-3, 1e-2),
        prune_ratios=(0.3, 0.5),
        training=Recipe(epochs=5, learning_rate=0.05, batch_size=32),
        stop_rule=StopRule(window=3, threshold=0.5),
        retraining=Retraining(epochs=1, batch_size=32),
        winners=1,
    )

    @functools.cache
    def search(fault: str) -> Sweep:
        plan = make_plan(space, name=fault or "undisturbed", storage=place)
        if fault:  # Only now: what checks the plan trains the network in this process.
            (place / "fault").write_text(fault)
        sweep = Sweep(plan.folder)
        tell = teller(sweep)
        tell(plan.opening)
        room = Room(cpus=1, gpus=0.0, slots=2, most=2, workers=2)
        tuner.run_search(space, sweep, raytickets.driver.ray.put(plan.dataset), room, tell)
        (place / "fault").unlink(missing_ok=True)
        return sweep

    return search


def found(sweep: Sweep) -> set[str]:
    return {event["ticket"] for event in select(sweep.events(), "ticket")}


def states(sweep: Sweep) -> list[tuple[str, str]]:
    return sorted((e["state"], e["reason"]) for e in select(sweep.events(), "trajectory"))


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing_but_time(run):
    whole, sweep = run(""), run("once")
    (retry,) = select(sweep.events(), "retry")
    assert retry["attempt"] == 1
    assert retry["reason"].startswith("its worker was lost: ")
    assert found(sweep) == found(whole)
    assert states(sweep) == states(whole) == [("drawn", "")] * 2
    proofs = [select(each.events(), "proof") for each in (whole, sweep)]
    assert len(proofs[0]) == len(proofs[1]) > 0
    assert not select(whole.events(), "retry")


@pytest.mark.slow
def test_a_worker_that_is_killed_each_time_fails_after_three_more(run):
    sweep = run("always")
    retries = select(sweep.events(), "retry")
    assert sorted(event["attempt"] for event in retries) == [1, 1, 2, 2, 3, 3]
    assert [state for state, _ in states(sweep)] == ["failed", "failed"]
    assert all(reason.startswith("its worker was lost: ") for _, reason in states(sweep))


@pytest.mark.slow
def test_what_a_trajectory_raises_fails_it_at_once(run):
    sweep = run("raises")
    assert not select(sweep.events(), "retry")
    assert states(sweep) == [("drawn", ""), ("failed", "ValueError: no such branch")]


@pytest.mark.slow
def test_a_trajectory_that_runs_out_of_memory_runs_again_after_the_other(run):
    sweep = run("memory")
    (retry,) = select(sweep.events(), "retry")
    assert retry["reason"] == "MemoryError"
    assert found(sweep) == found(run(""))
    ends = [event["trajectory"] for event in select(sweep.events(), "trajectory")]
    assert ends[-1] == retry["trajectory"]
