import json

import made_up_sweep as made
import pytest
from obstore.store import MemoryStore

from raytickets import storage as storages
from raytickets.history import history
from raytickets.journal import NAME


def sweep(storage, name, started, accuracies=(0.975, 0.9525), **changes):
    """A finished sweep whose LARGE (half the MACs) and SMALL (17.5 %) have these accuracies."""
    opening = made.OPENING | {"name": name, **changes}
    if started:
        opening["started"] = started
    events = [opening, *made.FINISHED[1:]]
    for ticket, accuracy in zip((made.LARGE, made.SMALL), accuracies, strict=True):
        place = next(i for i, e in enumerate(events) if e.get("run") == ticket and "macs" in e)
        events[place] = events[place] | {"validation_accuracy": accuracy}
    return made.write(storage / name, events)


@pytest.fixture
def storage(tmp_path):
    sweep(tmp_path, "b-first", "2026-11-20T03:00:00Z")
    sweep(tmp_path, "a-second", "2026-11-21T03:00:00Z", accuracies=(0.98, 0.92))
    return tmp_path


def test_sweeps_are_listed_in_order_with_the_best_ticket_of_every_budget(storage):
    first, second = history(storage, "digits")
    assert (first.sweep, first.state, first.tickets, first.changed) == ("b-first", "done", 3, ())
    assert first.started == "2026-11-20T03:00:00Z"
    found = [(best.budget, best.ticket, best.validation_accuracy) for best in first.best]
    assert found == [
        (0.25, made.SMALL, 0.9525),
        (0.5, made.LARGE, 0.975),
        (0.75, made.LARGE, 0.975),
        (1.0, made.LARGE, 0.975),
    ]
    assert (first.best[0].macs, first.best[0].test_accuracy) == (350_000, 0.9625)
    assert all((best.change, best.regression) == (None, False) for best in first.best)
    assert [round(best.change, 4) for best in second.best] == [-0.0325, 0.005, 0.005, 0.005]
    assert [best.regression for best in second.best] == [True, False, False, False]


def test_a_regression_is_a_fall_by_more_than_a_standard_error(storage):
    # At 0.94 and 200 images the standard error is 0.0168.
    sweep(storage, "third", "2026-11-22T03:00:00Z", accuracies=(0.964, 0.94))
    sweep(storage, "fourth", "2026-11-23T03:00:00Z", accuracies=(0.964, 0.924))
    third, fourth = history(storage, "digits")[2:]
    assert [best.regression for best in third.best] == [False, True, True, True]
    assert round(fourth.best[0].change, 4) == -0.016
    assert not fourth.best[0].regression


def test_what_differs_from_the_sweep_before_is_named(storage):
    space = made.SPACE.as_dict()
    space = space | {"training": space["training"] | {"epochs": 10}}
    data = made.OPENING["data"] | {"fingerprint": "e" * 64}
    sweep(storage, "third", "2026-11-22T03:00:00Z", space=space, data=data)
    assert history(storage, "digits")[2].changed == ("training.epochs", "data")


def test_a_sweep_without_retrained_tickets_is_passed_over_in_comparisons(storage):
    opening = made.OPENING | {"name": "cut-off", "started": "2026-11-20T12:00:00Z"}
    made.write(storage / "cut-off", [opening, *made.SEARCHED[1:5]])
    failed = {"event": "end", "state": "failed", "reason": "no room"}
    opening = opening | {"name": "failed", "started": "2026-11-20T13:00:00Z"}
    made.write(storage / "failed", [opening, failed])
    first, cut_off, failure, second = history(storage, "digits")
    assert (cut_off.state, cut_off.tickets, cut_off.best) == ("unfinished", 1, ())
    assert (failure.state, failure.reason) == ("failed", "no room")
    assert second.best[1].change == pytest.approx(
        second.best[1].validation_accuracy - first.best[1].validation_accuracy
    )


def test_what_is_no_sweep_of_the_space_is_skipped(storage):
    (storage / "notes.txt").write_text("")
    (storage / "folder").mkdir()
    sweep(storage, "other", "2026-11-22T03:00:00Z", space=made.SPACE.as_dict() | {"name": "other"})
    made.write(storage / "compared", [made.OPENING | {"event": "comparison", "name": "compared"}])
    (storage / "empty").mkdir()
    (storage / "empty" / NAME).touch()
    assert [row.sweep for row in history(storage, "digits")] == ["b-first", "a-second"]
    assert [row.sweep for row in history(storage, "other")] == ["other"]
    assert history(storage / "nothing", "digits") == []


def test_sweeps_of_before_the_time_was_kept_come_first_by_name(storage):
    sweep(storage, "older-2", None)
    sweep(storage, "older-1", None)
    assert [row.sweep for row in history(storage, "digits")][:2] == ["older-1", "older-2"]


def test_a_damaged_journal_is_told_and_the_others_are_read(storage):
    path = storage / "b-first" / NAME
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = json.dumps({"event": "check"}) + "x\n"
    path.write_text("".join(lines))
    second, damaged = history(storage, "digits")
    assert (second.sweep, second.best[0].change) == ("a-second", None)
    assert (damaged.sweep, damaged.state, damaged.best) == ("b-first", "damaged", ())
    assert "line 3" in damaged.reason


def test_sweeps_at_an_address_are_read_from_there(tmp_path, monkeypatch):
    store = MemoryStore()
    monkeypatch.setattr(storages, "_store", lambda *_: store)
    monkeypatch.setenv("RAYTICKETS_WORK", str(tmp_path / "one"))
    here = storages.local("s3://bucket/sweeps")
    storages.keep(sweep(here, "first", "2026-11-20T03:00:00Z"))
    monkeypatch.setenv("RAYTICKETS_WORK", str(tmp_path / "two"))
    (row,) = history(storages.local("s3://bucket/sweeps"), "digits")
    assert (row.sweep, row.best[0].ticket) == ("first", made.SMALL)
    # The sweep goes on elsewhere.
    storages.remove(here / "first" / NAME)
    storages.keep(sweep(here, "first", "2026-11-20T03:00:00Z", accuracies=(0.98, 0.96)))
    (row,) = history(storages.local("s3://bucket/sweeps"), "digits")
    assert row.best[0].validation_accuracy == 0.96
