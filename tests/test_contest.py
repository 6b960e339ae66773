"""A comparison on Ray: sources, then retraining on the same workers; cut off and gone on with."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
from made_up_comparison import COMPARED, OPENING, ended, finished, ticket, ticket_id
from made_up_space import FRAGILE
from made_up_sweep import write

from raytickets import compare
from raytickets.comparison import claims, runs
from raytickets.config import Comparison, Data, Network, Retraining, SearchSpace
from raytickets.config import Training as Recipe
from raytickets.contest import _Contest, _left
from raytickets.driver import SweepFailed
from raytickets.methods import Source, sources
from raytickets.sweep import Sweep, select
from raytickets.ticket import WEIGHTS

METHODS = ("dense", "early_bird", "progressive", "lottery_ticket", "snip", "random")
SPACE = SearchSpace(
    name="tiny",
    network=Network("cifar_vgg", {"depth": 9, "width": 0.125}),
    data=Data("digits", limit=256),
    penalties=(1e-3, 1e-2),
    prune_ratios=(0.3,),
    training=Recipe(epochs=20, learning_rate=0.05, batch_size=32),
    round_to=1,
    retraining=Retraining(epochs=2, batch_size=32),
    comparison=Comparison(methods=METHODS, penalty=1e-2, prune_ratios=(0.5,), seeds=(0, 1)),
)


EARLY, DENSE = Source("early_bird", 1e-4, 0), Source("dense", 0.0, 0)


@pytest.fixture
def lay(tmp_path, monkeypatch):
    """`lay(left, waiting)` is the work of a comparison with these sources and tickets left."""

    def make(left, waiting=()):
        monkeypatch.setattr("raytickets.contest._left", lambda *_: (left, list(waiting)))
        told = []
        work = _Contest(SPACE, Sweep(write(tmp_path / "duel", [OPENING])), told.append)
        return SimpleNamespace(work=work, told=told)

    return make


def configs(work):
    jobs = []
    while work.ready:
        jobs.append(work.next().config)
    return jobs


def retraining(method, ratio, seed):
    return {"ticket": f"tickets/{ticket_id(method, ratio, seed)}"}


def test_sources_come_first_and_then_every_ticket_once_it_is_found(lay):
    laid = lay([DENSE, EARLY], [ticket("early_bird", 0.5, 1)])
    assert configs(laid.work) == [
        *({"source": vars(DENSE)}, {"source": vars(EARLY)}, retraining("early_bird", 0.5, 1)),
    ]
    laid.work.tell(ticket("early_bird", 0.3, 0))
    laid.work.tell(ticket("early_bird", 0.3, 0))  # as what goes on tells it again
    assert configs(laid.work) == [retraining("early_bird", 0.3, 0)]
    assert [event["event"] for event in laid.told] == ["ticket"] * 2


def test_nothing_is_left_once_all_sources_and_retrainings_have_ended(lay):
    laid = lay([EARLY])
    found = ticket("early_bird", 0.3, 0)
    laid.work.tell(found)
    laid.work.tell(ended("early_bird", 0, {"0.3": "drawn"}))
    assert laid.work.left == {found["ticket"]}
    laid.work.tell({"event": "retrained", "run": found["ticket"], "ledger": {}})
    assert laid.work.left == set()


def test_a_source_that_fails_is_told_of_with_what_it_found_which_is_retrained(lay):
    laid = lay([EARLY])
    source = laid.work.next()
    laid.work.tell(ticket("early_bird", 0.3, 0))
    laid.work.fail(source, "ValueError: late")
    event = laid.told[-1]
    assert (event["event"], event["trajectory"]) == ("trajectory", EARLY.id)
    assert (event["state"], event["reason"]) == ("failed", "ValueError: late")
    assert event["ratios"] == {"0.3": "drawn", "0.5": "failed"}
    assert configs(laid.work) == [retraining("early_bird", 0.3, 0)]


def test_a_retraining_that_fails_is_named_and_not_left(lay):
    laid = lay([], [ticket("early_bird", 0.3, 0)])
    laid.work.fail(laid.work.next(), "RuntimeError: CUDA out of memory")
    id = ticket_id("early_bird", 0.3, 0)
    assert laid.work.failed == {id: "RuntimeError: CUDA out of memory"}
    assert laid.work.left == set()


def test_a_retrained_ticket_that_is_lost_is_retrained_again(tmp_path, monkeypatch):
    sweep = Sweep(write(tmp_path / "duel", finished()))
    monkeypatch.setattr("raytickets.contest.is_whole", lambda _: True)
    assert _left(COMPARED, sweep)[1] == []
    lost = ticket_id("random", 0.3, 1)
    monkeypatch.setattr(
        "raytickets.contest.is_whole", lambda path: path != sweep.path / "retrained" / lost
    )
    assert [event["ticket"] for event in _left(COMPARED, sweep)[1]] == [lost]


@pytest.fixture(scope="module")
def compared(ray_instance, place, store):  # noqa: ARG001
    return compare(SPACE, name="duel", storage=place, tracking_uri=store)


def retrained(events):
    return sorted(event["run"] for event in select(events, "retrained"))


@pytest.mark.slow
def test_every_method_is_retrained_once_at_every_seed(compared):
    events = compared.events()
    found = {(run["method"], run["seed"]) for run in runs(events)}
    assert found == {(method, seed) for method in METHODS for seed in (0, 1)}
    assert retrained(events) == sorted(event["ticket"] for event in select(events, "ticket"))
    assert {event["trajectory"] for event in select(events, "trajectory")} == {
        source.id for source in sources(SPACE)
    }


@pytest.mark.slow
def test_the_report_is_whole_and_says_who_won(compared):
    report = compared.report()
    assert (report["kind"], report["state"], report["failures"]) == ("comparison", "done", [])
    assert {row["n"] for row in report["table"]} == {2}
    assert report["table"][0]["macs_to_dense"] == 1
    assert all(row["relative_latency"] > 0 for row in report["table"])
    assert [claim["n"] for claim in report["claims"]] == [2, 2, 2]


@pytest.mark.slow
def test_a_comparison_that_is_done_goes_on_with_nothing(compared, place, store):
    before = compared.events()
    again = compare(SPACE, name="duel", storage=place, tracking_uri=store)
    assert [event["event"] for event in again.events()[len(before) :]] == ["end"]


@pytest.mark.slow
def test_a_comparison_cut_off_goes_on_where_it_was(compared, place, store):
    """The journal up to a kill after the third retraining, in a folder of its own."""
    cut = place / "cut"
    shutil.copytree(compared.path, cut)
    lines = (cut / "journal.jsonl").read_text().splitlines(keepends=True)
    kinds = [json.loads(line)["event"] for line in lines]
    end = [place for place, kind in enumerate(kinds) if kind == "retrained"][2] + 1
    (cut / "journal.jsonl").write_text("".join(lines[:end]) + lines[end][:20])
    before = Sweep(cut).events()
    again = compare(SPACE, name="cut", storage=place, tracking_uri=store)
    new = again.events()[len(before) :]
    ended = {event["trajectory"] for event in select(before, "trajectory")}
    assert ended.isdisjoint(event["trajectory"] for event in select(new, "trajectory"))
    assert set(retrained(before)).isdisjoint(retrained(new))
    assert retrained(again.events()) == retrained(compared.events())
    assert claims(again.events()) == claims(compared.events())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_what_fails_is_named_and_done_when_the_comparison_goes_on(place, store):
    """One ticket is damaged as soon as it is found, so that it cannot be retrained."""
    damaged = []

    def damage(event):
        if event["event"] == "ticket" and event["method"] == "progressive" and not damaged:
            damaged.append(event["ticket"])
            (place / "broken" / event["path"] / WEIGHTS).unlink()

    asked = dataclasses.replace(SPACE.comparison, methods=("dense", "progressive"), seeds=(0, 1))
    space = dataclasses.replace(SPACE, comparison=asked)
    with pytest.raises(SweepFailed, match=r"ticket \w+: .*DamagedTicket") as failure:
        compare(space, name="broken", storage=place, tracking_uri=store, observer=damage)
    assert damaged[0] in str(failure.value)
    broken = Sweep(place / "broken")
    assert len(retrained(broken.events())) == 3
    (reason,) = broken.report()["failures"]
    assert reason in str(failure.value)
    again = compare(space, name="broken", storage=place, tracking_uri=store)
    assert again.report()["state"] == "done"
    assert sorted({*retrained(again.events())}) == retrained(again.events())
    assert len(retrained(again.events())) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_a_source_that_fails_is_named_and_the_others_finish(place, store, tmp_path):
    """The network breaks once it is trained in earnest; a dense ticket needs no training."""
    (tmp_path / "fragile.py").write_text(FRAGILE)
    asked = dataclasses.replace(SPACE.comparison, methods=("dense", "early_bird"), seeds=(0,))
    space = dataclasses.replace(
        SPACE, comparison=asked, network=Network(f"{tmp_path}/fragile.py:network")
    )
    space = space.with_retraining(epochs=1, learning_rate=1e-4)
    with pytest.raises(SweepFailed, match=r"early_bird-penalty0\.01-seed0.*the wheels came off"):
        compare(space, name="fragile", storage=place, tracking_uri=store)
    report = Sweep(place / "fragile").report()
    assert report["state"] == "failed"
    assert [run["method"] for run in report["runs"]] == ["dense"]
