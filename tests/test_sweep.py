"""The report of a sweep: what its journal says, and the arithmetic of what it cost."""

import json

import made_up_comparison
import pytest
from made_up_sweep import (
    FINISHED,
    GIGA,
    HIGH,
    LARGE,
    LOW,
    MIDDLE,
    OPENING,
    SEARCHED,
    SMALL,
    SPACE,
    check,
    epoch,
    retrained,
    ticket,
    trajectory,
    write,
)

from raytickets import comparison
from raytickets.config import InputError
from raytickets.sweep import Sweep, standing, ticket_folder

ROW = {
    *("run", "path", "penalty", "prune_ratio", "seed", "draw_epoch", "macs", "params"),
    *("proof_accuracy", "validation_accuracy", "test_accuracy", "train_macs", "relative_cost"),
}


CUT = {"event": "end", "state": "interrupted", "reason": ""}


@pytest.fixture
def sweep(tmp_path):
    """`sweep(events)` is a sweep with this journal."""
    return lambda events: Sweep(write(tmp_path / "first", events))


def test_a_sweep_may_be_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Sweep("~/sweeps/first").path == tmp_path / "sweeps/first"  # type: ignore[arg-type]


def test_the_journal_gives_the_space_back(sweep):
    found = sweep(FINISHED)
    assert found.name == "first"
    assert found.space() == SPACE
    assert found.opening() == OPENING
    assert found.events() == FINISHED


def test_a_winner_bears_its_retraining_and_an_equal_share_of_the_search(sweep):
    report = sweep(FINISHED).report()
    # Trajectories of 100 and 200, three proofs of 20 and two of 40, against 1000 for the dense
    # network.
    assert report["search_macs"] == 440 * GIGA
    large, small = report["winners"]
    assert large["relative_cost"] == (500 + 440 / 2) / 1000
    assert small["relative_cost"] == (175 + 440 / 2) / 1000
    assert report["dense"]["relative_cost"] == 1
    assert report["sweep_cost"] == (440 + 500 + 175) / 1000


def test_without_sharing_each_prune_ratio_would_have_a_trajectory_to_its_own_draw(sweep):
    report = sweep(FINISHED).report()
    # One drew at epochs 7.5 and 10, the other at 8 and, of 20 epochs, never; an epoch costs 10.
    assert report["without_sharing"] == (75 + 100 + 80 + 200 + 140 + 500 + 175) / 1000


def test_of_two_trajectories_at_one_point_each_pays_for_the_same_tickets(sweep):
    """As Optuna may propose them."""
    twin = [
        event | {"trajectory": "trial9-seed0"}
        for event in SEARCHED
        if event.get("trajectory") == HIGH
    ]
    assert len([event for event in twin if event["event"] == "ticket"]) == 2
    report = sweep([OPENING, *twin, *FINISHED[1:]]).report()
    # The twin's trajectory takes 100 and its two proofs 20 each; alone it would take 75 and 100.
    assert report["search_macs"] == (440 + 100 + 40) * GIGA
    assert report["sweep_cost"] == (580 + 500 + 175) / 1000
    assert report["without_sharing"] == (455 + 175 + 180 + 500 + 175) / 1000


def test_one_prune_ratio_has_nothing_to_share(sweep):
    alone = [
        OPENING,
        check(LOW, 7.5, {"0.3": 0.1}),
        ticket(LOW, LARGE, 0.3, 1_000_000, 0.98, epoch=7.5),
        trajectory(LOW, "drawn", 75 * GIGA, {"0.3": "drawn"}),
        {"event": "winners", "tickets": [LARGE]},
        *FINISHED[-7:-2],
    ]
    report = sweep(alone).report()
    assert report["without_sharing"] == report["sweep_cost"]


def test_without_halving_every_ticket_would_be_retrained_and_none_proved(sweep):
    report = sweep(FINISHED).report()
    # Tickets of 1M, 900k and 350k MACs, against 2M for the dense network.
    assert report["without_halving"] == (300 + (0.5 + 0.45 + 0.175) * 1000) / 1000


def test_a_ticket_tells_of_its_last_rung_and_of_what_all_its_proofs_cost(sweep):
    tickets = {ticket["ticket"]: ticket for ticket in sweep(FINISHED).report()["tickets"]}
    found = {
        id: (ticket["proof_rung"], ticket["proof_accuracy"], ticket["proof_macs"])
        for id, ticket in tickets.items()
    }
    assert found == {
        LARGE: (2, 0.985, (20 + 40) * GIGA),
        MIDDLE: (1, 0.95, 20 * GIGA),
        SMALL: (2, 0.965, (20 + 40) * GIGA),
    }


def test_proofs_are_compared_with_what_retraining_came_to(sweep):
    assert sweep(FINISHED).report()["proof_correlation"] == {"spearman": None, "n": 2}


@pytest.mark.parametrize(
    ("accuracy", "correlation"), [(0.95, 1.0), (0.98, 0.5), (0.99, -0.5), (0.9625, 0.866)]
)
def test_the_correlation_is_over_winners_and_tickets_retrained_by_hand(
    sweep, accuracy, correlation
):
    """The proofs rank MIDDLE last of three."""
    later = [*FINISHED, retrained(MIDDLE, 900_000, 450 * GIGA, accuracy)]
    found = sweep(later).report()["proof_correlation"]
    assert found == {"spearman": pytest.approx(correlation, abs=1e-3), "n": 3}


def test_a_correlation_that_is_not_defined_is_null(sweep):
    same = [e | {"validation_accuracy": 0.9} if e["event"] == "retrained" else e for e in FINISHED]
    same += [retrained(MIDDLE, 900_000, 450 * GIGA, 0.91)]
    assert sweep(same).report()["proof_correlation"] == {"spearman": None, "n": 3}


def test_failures_are_the_trajectories_that_failed_last(sweep):
    failed = trajectory(HIGH, "failed", 0, {"0.3": "failed", "0.5": "failed"}, "worker died")
    assert sweep([OPENING, failed]).failures() == [failed]


def test_a_trajectory_that_ran_again_is_no_failure(sweep):
    failed = trajectory(HIGH, "failed", 0, {"0.3": "failed", "0.5": "failed"}, "worker died")
    assert sweep([OPENING, failed, *FINISHED[1:]]).failures() == []


def test_rows_are_of_the_dense_network_and_of_the_winners_in_order(sweep):
    report = sweep(FINISHED).report()
    assert [row["run"] for row in report["winners"]] == [LARGE, SMALL]
    assert all(set(row) == ROW for row in [report["dense"], *report["winners"]])
    assert report["winners"][1] == {
        "run": SMALL,
        "path": f"retrained/{SMALL}",
        "penalty": 1e-3,
        "prune_ratio": 0.5,
        "seed": 0,
        "draw_epoch": 10.0,
        "macs": 350_000,
        "params": 35_000,
        "proof_accuracy": 0.965,
        "validation_accuracy": 0.9525,
        "test_accuracy": 0.9625,
        "train_macs": 175 * GIGA,
        "relative_cost": 0.395,
    }
    assert report["dense"]["macs"] == 2_000_000
    assert report["dense"]["path"] is None


def test_a_report_names_every_ticket_and_trajectory_and_is_plain_json(sweep):
    report = sweep(FINISHED).report()
    assert report["space"] == "digits"
    assert len(report["tickets"]) == 3
    assert [end["trajectory"] for end in report["trajectories"]] == [HIGH, LOW]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([OPENING], "unfinished"),
        (SEARCHED, "unfinished"),
        (FINISHED, "done"),
        ([*SEARCHED, {"event": "end", "state": "failed", "reason": "lost"}], "failed"),
        ([*SEARCHED, {"event": "end", "state": "failed", "reason": ""}, FINISHED[-1]], "done"),
        ([*SEARCHED[:5], CUT], "interrupted"),
        ([*SEARCHED[:5], CUT, *SEARCHED[5:]], "unfinished"),
        ([*FINISHED, epoch(MIDDLE, 1) | {"identity": ""}], "done"),  # by hand
        ([*FINISHED, retrained(MIDDLE, 900_000, 1, 0.9)], "done"),
        ([*SEARCHED, CUT, {"event": "winners", "tickets": [LARGE]}], "unfinished"),
    ],
)
def test_the_state_is_how_the_sweep_last_ended(sweep, events, state):
    assert sweep(events).report()["state"] == state


def test_what_is_not_known_yet_is_null(sweep):
    report = sweep(SEARCHED).report()
    for cost in ("sweep_cost", "without_sharing", "without_halving"):
        assert report[cost] is None
    for row in [report["dense"], *report["winners"]]:
        assert row["test_accuracy"] is None
        assert row["train_macs"] is None
        assert row["relative_cost"] is None
    assert report["winners"][0]["proof_accuracy"] == 0.985


def test_a_sweep_that_only_began_has_no_winners(sweep):
    report = sweep([OPENING]).report()
    assert report["winners"] == report["tickets"] == report["trajectories"] == []
    assert report["search_macs"] == 0


def test_what_was_done_again_counts_as_it_was_done_last(sweep):
    failed = trajectory(HIGH, "failed", 0, {"0.3": "failed", "0.5": "failed"}, "worker died")
    report = sweep([OPENING, failed, *FINISHED[1:]]).report()
    assert report["search_macs"] == 440 * GIGA
    assert [end["state"] for end in report["trajectories"]] == ["drawn", "not converged"]


def test_a_winner_that_was_drawn_anew_is_none_until_they_are_chosen_again(sweep):
    anew = ticket(HIGH, "4" * 16, 0.5, 350_000, 0.9, epoch=10.0)
    report = sweep([*FINISHED, anew]).report()
    assert [row["run"] for row in report["winners"]] == [LARGE]
    assert SMALL not in {row["ticket"] for row in report["tickets"]}


@pytest.mark.parametrize("place", [len(SEARCHED), len(FINISHED)])
def test_retraining_by_another_recipe_leaves_the_report_alone(sweep, place):
    """Before the sweep retrains its winners, and after."""
    recipe = OPENING["space"]["retraining"] | {"epochs": 60}
    longer = retrained(SMALL, 350_000, 350 * GIGA, 0.97) | {"recipe": recipe}
    first = epoch(SMALL, 60) | {"identity": "60 epochs"}
    events = [*FINISHED[:place], first, longer, *FINISHED[place:]]
    assert sweep(events).report() == sweep(FINISHED).report()


@pytest.mark.parametrize(
    ("journal", "said"),
    [
        (None, "must be the folder of a sweep"),
        ("", "its journal is empty"),
        ('{"event": "sweep"\n', "its journal is damaged"),
    ],
)
def test_a_folder_that_is_no_sweep_is_refused(tmp_path, journal, said):
    if journal is not None:
        (tmp_path / "journal.jsonl").write_text(journal)
    with pytest.raises(InputError, match=rf"^sweep: '{tmp_path}' is not allowed: {said}"):
        Sweep(tmp_path).report()


def test_a_comparisons_folder_has_its_own_report(tmp_path):
    compared = Sweep(write(tmp_path / "duel", made_up_comparison.finished()))
    found = comparison.report(compared.events())
    assert compared.report() == found | {"interrupted": [], "retries": {}}
    assert compared.space() == made_up_comparison.COMPARED
    assert compared.failures() == []


def test_a_comparison_that_goes_on_with_retraining_alone_is_unfinished(tmp_path):
    retraining = made_up_comparison.epoch("early_bird", 0.3, 0, 1)
    events = [made_up_comparison.OPENING, CUT, retraining]
    assert Sweep(write(tmp_path / "duel", events[:2])).report()["state"] == "interrupted"
    assert Sweep(write(tmp_path / "on", events)).report()["state"] == "unfinished"


def test_what_had_not_ended_when_its_sweep_did_is_interrupted(sweep):
    assert sweep(SEARCHED[:10]).report()["interrupted"] == []  # It still runs.
    assert sweep([*SEARCHED[:10], CUT]).report()["interrupted"] == [LOW]
    assert (
        sweep([*SEARCHED[:10], CUT, *SEARCHED[10:], *FINISHED[-1:]]).report()["interrupted"] == []
    )


def test_retries_are_counted_by_what_ran_again(sweep):
    lost = {"event": "retry", "attempt": 1, "reason": "the worker died"}
    again = [{"trajectory": LOW}, {"trajectory": LOW}, {"run": LARGE}]
    found = sweep([*SEARCHED, *(lost | who for who in again)]).report()["retries"]
    assert found == {LOW: 2, LARGE: 1}


def test_a_sweep_that_goes_on_says_what_is_done_and_what_is_not():
    assert standing([OPENING]) == ""
    assert standing(SEARCHED[:10]) == (
        "found here: 1 trajectories ended, 3 tickets, 0 networks retrained;"
        f" to go on: {LOW} was at epoch 8"
    )
    failed = trajectory(HIGH, "failed", 0, {"0.3": "failed", "0.5": "failed"}, "worker died")
    assert standing([*SEARCHED[:9], failed]).endswith(f"{LOW} was at epoch 8; {HIGH} failed")
    assert standing(FINISHED) == (
        "found here: 2 trajectories ended, 3 tickets, 3 networks retrained"
    )
    many = [check(f"trial{number}-seed0", 2.0, {}) for number in range(8)]
    assert standing([OPENING, *many]).endswith("trial4-seed0 was at epoch 2; 3 more")


def test_a_sweep_at_an_address_is_read_from_its_local_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYTICKETS_WORK", str(tmp_path))
    found = Sweep("s3://bucket/sweeps/first")
    assert found.path == tmp_path / "raytickets/remote/s3/bucket/sweeps/first"
    found.path.parent.mkdir(parents=True)
    write(tmp_path / "plain", [OPENING]).rename(found.path)
    assert found.opening() == OPENING
    with pytest.raises(InputError, match="must be a folder, or one of s3://"):
        Sweep("ftp://bucket/sweeps/first")


@pytest.mark.parametrize(
    "place",
    ["../x", "/etc", "tickets/..", f"tickets/{'1' * 16}/..", f"tickets/{'1' * 16}\n", 3, None],
)
def test_an_event_cannot_name_a_place_outside_the_sweep(tmp_path, place):
    with pytest.raises(InputError, match=r"journal: .* must name the place of a ticket"):
        ticket_folder(tmp_path, place)
    assert ticket_folder(tmp_path, f"retrained/{'1' * 16}").parent.parent == tmp_path
