"""What a comparison says it found follows from its events, and claims no more than they bear."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_comparison import ACCURACY, METHODS, OPENING, RATIOS, ended, finished, ticket

from raytickets.comparison import claims, paired_test, report, runs, table


def row(events, method, ratio):
    (found,) = [r for r in table(events) if (r["method"], r["prune_ratio"]) == (method, ratio)]
    return found


def claim(events, ratio, against):
    (found,) = [c for c in claims(events) if (c["prune_ratio"], c["against"]) == (ratio, against)]
    return found


def test_the_table_has_dense_once_and_every_other_method_at_every_ratio():
    lines = [(row["method"], row["prune_ratio"]) for row in table(finished())]
    others = [method for method in METHODS if method != "dense"]
    assert lines == [("dense", 0.0), *((method, r) for r in RATIOS for method in others)]


def test_accuracy_is_the_mean_over_seeds_with_the_deviation_of_the_sample():
    found = row(finished(), "dense", 0.0)
    assert found["n"] == 3
    assert found["test_accuracy"] == pytest.approx(0.98)
    assert found["test_accuracy_std"] == pytest.approx(0.01)


def test_seeds_that_did_not_draw_are_counted_and_left_out_of_the_means():
    found = row(finished(), "early_bird", 0.5)
    assert (found["n"], found["not_drawn"]) == (2, 1)
    assert found["test_accuracy"] == pytest.approx(0.965)
    assert row(finished(), "random", 0.5)["not_drawn"] == 1
    assert row(finished(), "progressive", 0.5)["not_drawn"] == 0


def test_sizes_are_relative_to_the_dense_network_and_the_draw_to_the_training():
    found = row(finished(), "early_bird", 0.5)
    assert (found["relative_macs"], found["relative_params"]) == (0.5, 0.5)
    assert found["relative_latency"] == 0.75
    assert found["draw_share"] == pytest.approx(6 / 30)
    assert row(finished(), "progressive", 0.5)["draw_share"] is None


def test_cost_is_search_and_retraining_relative_to_the_others_of_the_same_seed_and_ratio():
    found = row(finished(), "early_bird", 0.5)
    assert found["total_macs"] == (240 + 450) * 10**9
    assert found["total_seconds"] == pytest.approx(69)
    assert found["macs_to_dense"] == pytest.approx(690 / 900)
    assert found["macs_to_progressive"] == pytest.approx(690 / 1350)
    assert found["seconds_to_dense"] == pytest.approx(690 / 900)
    dense = row(finished(), "dense", 0.0)
    assert (dense["macs_to_dense"], dense["macs_to_progressive"]) == (1.0, None)


def test_a_relative_cost_is_the_mean_of_each_seeds_own():
    events = finished()
    dear = next(e for e in events if e["event"] == "retrained" and e["run"].startswith("000"))
    dear["ledger"]["forward_macs"] += 900 * 10**9
    found = row(events, "early_bird", 0.3)
    assert found["macs_to_dense"] == pytest.approx((870 / 1800 + 870 / 900 + 870 / 900) / 3)


def test_energy_that_is_not_known_is_unavailable_and_never_0():
    found = row(finished(), "early_bird", 0.5)
    assert (found["total_joules"], found["joules_to_dense"]) == (None, None)
    assert found["energy"] == "unavailable"


def test_energy_is_added_up_and_a_search_of_no_work_takes_none():
    events = finished(joules=True)
    assert row(events, "dense", 0.0)["total_joules"] == 3000
    found = row(events, "early_bird", 0.5)
    assert (found["total_joules"], found["joules_to_dense"]) == (4000, pytest.approx(4 / 3))
    assert found["joules_to_progressive"] == 1
    assert found["energy"] == "measured (a counter)"


def test_energy_is_unavailable_where_one_part_of_it_is():
    events = finished(joules=True)
    for event in events:
        if event["event"] == "ticket" and event["method"] == "early_bird":
            event["search"] |= {"joules": None, "energy": "unavailable (no permission)"}
    found = row(events, "early_bird", 0.5)
    assert found["total_joules"] is None
    assert found["energy"] == "unavailable (no permission)"


def test_a_source_that_failed_and_ran_again_counts_once():
    events = finished()
    failed = ended("early_bird", 0, {"0.3": "failed", "0.5": "failed"}, "failed")
    again = [failed | {"reason": "no space left"}, *events[1:]]
    before, after = report([events[0], *again]), report(events)
    assert before["table"] == after["table"]
    assert before["failures"] == []


def test_a_source_that_failed_is_told_of_and_not_counted_as_not_drawn():
    failed = ended("early_bird", 0, {"0.3": "failed", "0.5": "failed"}, "failed")
    found = report([OPENING, failed | {"reason": "no space left"}])
    assert found["failures"] == ["early_bird-penalty0.0001-seed0: no space left"]
    assert {row["not_drawn"] for row in found["table"]} == {0}


def test_a_failure_is_told_of_once():
    failed = ended("early_bird", 0, {}, "failed") | {"reason": "no space left"}
    reason = "early_bird-penalty0.0001-seed0: no space left; ticket 1234: worker died"
    end = {"event": "end", "state": "failed", "reason": reason}
    assert report([OPENING, failed, end])["failures"] == [reason]


def test_a_source_that_diverged_is_told_of_beside_what_failed():
    lost = [
        ended("early_bird", 0, {}, "diverged") | {"reason": "the loss was nan"},
        ended("early_bird", 1, {}, "failed") | {"reason": "no space left"},
    ]
    name = "early_bird-penalty0.0001-seed0: the loss was nan"
    failed = "early_bird-penalty0.0001-seed1: no space left"
    assert report([OPENING, lost[0]])["failures"] == [name]
    assert report([OPENING, *lost])["failures"] == [failed, name]
    end = {"event": "end", "state": "failed", "reason": failed}
    assert report([OPENING, *lost, end])["failures"] == [failed, name]


def test_retraining_a_ticket_by_hand_changes_nothing():
    events = finished()
    by_hand = next(e for e in events if e["event"] == "retrained") | {"test_accuracy": 0.5}
    del by_hand["ledger"]
    assert table([*events, by_hand]) == table(events)


@given(st.integers(1, 40))
def test_a_report_of_any_part_of_a_comparison_is_plain_json(count):
    found = report(finished()[:count])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_report_before_anything_was_retrained_leaves_open_what_is_not_known():
    found = report([OPENING, ticket("dense", 0.0, 0)])
    assert found["state"] == "unfinished"
    assert found["runs"] == []
    assert {row["test_accuracy"] for row in found["table"]} == {None}
    assert {claim["verdict"] for claim in found["claims"]} == {"cannot tell"}


def test_a_run_says_which_ticket_it_was():
    (found,) = [r for r in runs(finished()) if (r["method"], r["seed"]) == ("dense", 1)]
    assert found["ticket"] == "0010000000000000"
    assert found["test_accuracy"] == ACCURACY["dense", 0.0][1]


def test_a_clear_difference_is_a_win_in_plain_words():
    found = claim(finished(), 0.3, "random")
    assert found["verdict"] == "beats"
    assert found["sentence"] == (
        "Prune ratio 0.3: early_bird is 2.33 points above random"
        " (95 % interval 0.90 to 3.77 over 3 seeds, p = 0.02): early_bird beats random."
    )


def test_the_interval_is_students():
    """By hand: differences 2, 3, 2 have mean 7/3 and deviation 0.577; t(0.975, 2) is 4.3027."""
    found = paired_test([2, 3, 2])
    assert found.mean == pytest.approx(7 / 3)
    assert found.low == pytest.approx(7 / 3 - 4.3027 * math.sqrt(1 / 3) / math.sqrt(3), abs=1e-4)
    assert found.high == pytest.approx(7 / 3 + 4.3027 * math.sqrt(1 / 3) / math.sqrt(3), abs=1e-4)


def test_a_loss_is_told_as_plainly_as_a_win():
    swapped = ACCURACY | {
        ("early_bird", 0.3): ACCURACY["random", 0.3],
        ("random", 0.3): ACCURACY["early_bird", 0.3],
    }
    found = claim(finished(accuracy=swapped), 0.3, "random")
    assert found["verdict"] == "is beaten"
    assert "2.33 points below random" in found["sentence"]
    assert found["sentence"].endswith(": random beats early_bird.")


def test_a_difference_within_the_spread_is_too_close_to_tell():
    found = claim(finished(), 0.5, "random")
    assert found["verdict"] == "too close to tell"
    assert found["sentence"] == (
        "Prune ratio 0.5: early_bird is 0.25 points above random"
        " (95 % interval -9.28 to 9.78 over 2 of 3 seeds, p = 0.8): too close to tell."
    )


def test_one_seed_cannot_tell():
    one = ACCURACY | {("random", 0.3): (0.9, None, None)}
    found = claim(finished(accuracy=one), 0.3, "random")
    assert (found["verdict"], found["p"]) == ("cannot tell", None)
    assert found["sentence"] == (
        "Prune ratio 0.3: early_bird is 7.50 points above random (1 of 3 seeds):"
        " one seed cannot tell."
    )


def test_equal_accuracies_are_too_close_to_tell():
    found = claim(finished(), 0.3, "progressive")
    assert (found["verdict"], found["mean"], found["p"]) == ("too close to tell", 0, None)
    assert found["sentence"] == (
        "Prune ratio 0.3: early_bird and progressive are equal in each of 3 seeds:"
        " too close to tell."
    )


def test_differences_without_spread_claim_no_certainty():
    """The three differences are equal, but not in their last bits."""
    equal = ACCURACY | {("random", 0.3): (0.965, 0.975, 0.975)}
    found = claim(finished(accuracy=equal), 0.3, "random")
    assert (found["verdict"], found["low"], found["high"], found["p"]) == (
        "cannot tell",
        *[None] * 3,
    )
    assert "1.00 points above random in each of 3 seeds" in found["sentence"]
    assert found["sentence"].endswith("how sure that is cannot be told.")


def test_where_no_seed_has_both_there_is_nothing_to_compare():
    none = ACCURACY | {("random", 0.3): ()}
    found = claim(finished(accuracy=none), 0.3, "random")
    assert (found["n"], found["mean"], found["verdict"]) == (0, None, "cannot tell")
    assert "no seed has both early_bird and random" in found["sentence"]


def test_methods_that_were_not_compared_are_not_claimed_about():
    without = OPENING | {"methods": ["dense", "early_bird"]}
    assert {c["against"] for c in claims([without, *finished()[1:]])} == {"dense"}
    assert claims([OPENING | {"methods": ["dense"]}, *finished()[1:]]) == []


@given(st.lists(st.integers(0, 400), min_size=1, max_size=6), st.integers(0, 400))
def test_a_win_needs_spread_and_an_interval_without_0(counts, other):
    """For any accuracies on 400 images: no crash, no NaN, no win from one value alone."""
    found = paired_test([100 * (count - other) / 400 for count in counts])
    if len(set(counts)) == 1:
        assert found.p is found.low is found.high is None
    else:
        assert 0 <= found.p <= 1
        assert found.low <= found.mean <= found.high
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
