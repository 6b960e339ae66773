"""Which tickets are proved again, and which ones win, follows from the journal alone."""

import dataclasses
import itertools
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given
from made_up_sweep import FINISHED, HIGH, LARGE, LOW, SEARCHED, SMALL, SPACE, proof, ticket

from raytickets.config import Proof, SearchSpace
from raytickets.halving import (
    choose_winners,
    front,
    hypervolume,
    next_proofs,
    pareto_front,
    proved,
)
from raytickets.journal import Event


def space(rungs: int, winners: int) -> SearchSpace:
    return dataclasses.replace(SPACE, proof=Proof(rungs=rungs), winners=winners)


def drawn(*points: tuple[float, int]) -> list[Event]:
    """A search that drew tickets of these proof accuracies and MACs; their ids are a, b, ..."""
    return [
        ticket(LOW, chr(ord("a") + place), (place + 1) / 100, macs, accuracy)
        for place, (accuracy, macs) in enumerate(points)
    ]


def ids(tickets: list[Event]) -> list[str]:
    return [ticket["ticket"] for ticket in tickets]


def asked(rungs: int, winners: int, events: list[Event]) -> tuple[int, list[str]]:
    rung, tickets = next_proofs(space(rungs, winners), events)
    return rung, ids(tickets)


def test_the_better_half_is_proved_again():
    events = drawn((0.9, 4), (0.8, 3), (0.7, 4), (0.6, 4))
    assert asked(2, 1, events) == (2, ["a", "b"])


def test_half_of_an_odd_number_is_rounded_up():
    events = drawn((0.9, 1), (0.8, 1), (0.7, 1))
    assert asked(2, 1, events) == (2, ["a", "b"])


def test_a_small_ticket_is_not_dropped_for_a_more_accurate_one_that_another_beats():
    events = drawn((0.95, 100), (0.90, 110), (0.5, 10), (0.4, 20))
    assert asked(2, 1, events) == (2, ["a", "c"])


def test_where_the_pareto_front_exceeds_the_half_its_most_accurate_tickets_go_on():
    events = drawn((0.6, 1), (0.7, 2), (0.8, 3), (0.9, 4))
    assert asked(2, 1, events) == (2, ["c", "d"])


def test_as_many_go_on_as_can_win():
    events = drawn((0.6, 1), (0.7, 2), (0.8, 3), (0.9, 4))
    assert asked(2, 3, events) == (2, ["b", "c", "d"])


@pytest.mark.parametrize("winners", [3, 4])
def test_where_every_ticket_can_win_none_is_proved_again(winners):
    assert asked(5, winners, drawn((0.6, 1), (0.7, 2), (0.8, 3)))[1] == []


def test_with_one_rung_none_is_proved_again():
    assert asked(1, 1, drawn((0.6, 1), (0.7, 2), (0.8, 3)))[1] == []


def test_a_sweep_without_tickets_proves_nothing_and_has_no_winners():
    assert asked(3, 1, [])[1] == []
    assert choose_winners(space(3, 1), []) == []


def test_a_rung_is_judged_by_its_own_proofs():
    events = drawn((0.9, 2), (0.8, 2), (0.7, 2), (0.6, 2))
    events += [proof("a", 2, 0.91), proof("b", 2, 0.97)]
    assert asked(3, 1, events) == (3, ["b"])


def test_what_a_sweep_that_was_cut_off_had_proved_is_not_proved_again():
    events = [*drawn((0.9, 1), (0.8, 1), (0.7, 1), (0.6, 1)), proof("b", 2, 0.9)]
    assert asked(2, 1, events) == (2, ["a"])
    assert asked(2, 1, [*events, proof("a", 2, 0.8)])[1] == []


def test_a_trajectory_that_runs_again_leaves_the_proofs_of_its_tickets():
    again = [*FINISHED, *(event for event in SEARCHED if event.get("trajectory") == LOW)]
    assert proved(again) == proved(FINISHED)
    assert choose_winners(SPACE, again) == choose_winners(SPACE, FINISHED)
    assert next_proofs(SPACE, again)[1] == []


def test_of_tickets_drawn_again_the_newest_count():
    """As where a damaged one was drawn again on another kind of processor."""
    events = [*drawn((0.9, 1), (0.8, 1)), proof("a", 2, 0.95)]
    again = ticket(LOW, "z", 0.01, 1, 0.7)
    assert ids(proved([*events, again])) == ["b", "z"]
    assert asked(2, 1, [*events, again]) == (2, ["b"])
    assert proved([*events, again, proof("z", 2, 0.9)])[1]["proof_rung"] == 2


def test_of_a_trajectory_that_began_anew_no_ticket_of_before_counts():
    anew = {"event": "retry", "trajectory": LOW, "attempt": 1, "reason": "", "anew": True}
    other = ticket(HIGH, "o", 0.01, 1, 0.7)
    events = [*drawn((0.9, 1), (0.8, 1)), other, anew]
    assert ids(proved(events)) == ["o"]
    again = ticket(LOW, "a", 0.01, 1, 0.9)
    assert ids(proved([*events, again])) == ["a", "o"]
    assert ids(proved([*events[:-1], anew | {"anew": False}])) == ["a", "b", "o"]


def test_proofs_are_summed_up():
    events = [*drawn((0.9, 1), (0.8, 1)), proof("a", 2, 0.92), proof("a", 3, 0.91)]
    first, second = proved(events)
    one = second["proof_macs"]
    assert (first["proof_rung"], first["proof_accuracy"]) == (3, 0.91)
    assert first["proof_macs"] == (1 + 2 + 4) * one
    assert (second["proof_rung"], second["proof_accuracy"]) == (1, 0.8)


def test_winners_are_the_most_accurate_of_the_last_rungs_front():
    assert ids(choose_winners(SPACE, SEARCHED)) == [LARGE, SMALL]
    assert ids(choose_winners(space(2, 1), SEARCHED)) == [LARGE]


def test_a_ticket_that_was_dropped_does_not_win_though_later_proofs_are_worse():
    events = drawn((0.9, 1), (0.8, 1), (0.7, 1))
    events += [proof("a", 2, 0.6), proof("b", 2, 0.65)]
    assert ids(choose_winners(space(2, 1), events)) == ["b"]


def test_the_front_is_that_of_the_last_rung_cheapest_first():
    events = drawn((0.99, 1), (0.9, 5), (0.8, 3), (0.7, 4))
    events += [proof(id, 2, accuracy) for id, accuracy in (("b", 0.9), ("c", 0.8), ("d", 0.7))]
    assert ids(front(proved(events))) == ["c", "b"]


points = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 20)), max_size=12)


@given(points)
def test_the_front_holds_what_nothing_beats(found):
    accuracies, costs = [p[0] for p in found], [p[1] for p in found]
    front = pareto_front(accuracies, costs)
    for place in range(len(found)):
        beaten = any(
            accuracies[o] >= accuracies[place]
            and costs[o] <= costs[place]
            and (accuracies[o], costs[o]) != (accuracies[place], costs[place])
            for o in range(len(found))
        )
        twin = any(found[o] == found[place] for o in front)
        assert twin == (not beaten)
    assert [costs[p] for p in front] == sorted({costs[p] for p in front})


@pytest.mark.parametrize(
    ("points", "area"),
    [
        ([], 0),
        ([(1.0, 0.0)], 1),
        ([(0.8, 0.25)], 0.8 * 0.75),
        ([(0.8, 0.5), (0.5, 0.25)], 0.5 * 0.25 + 0.8 * 0.5),
        ([(0.8, 0.5), (0.5, 0.5), (0.7, 0.6)], 0.8 * 0.5),
        ([(0.9, 1.0), (0.9, 1.5)], 0),
    ],
)
def test_hypervolume_is_the_area_below_the_front(points, area):
    assert hypervolume([a for a, _ in points], [s for _, s in points]) == pytest.approx(area)


shares = st.lists(st.tuples(st.floats(0, 1), st.floats(0.001, 1.5)), max_size=12)


def volume(points: list[tuple[float, float]]) -> float:
    return hypervolume([accuracy for accuracy, _ in points], [share for _, share in points])


@given(shares, st.tuples(st.floats(0, 1), st.floats(0.001, 1.5)))
def test_a_further_ticket_never_lowers_the_hypervolume(points, one):
    assert volume([*points, one]) >= volume(points) - 1e-12


@given(shares, st.randoms(use_true_random=False))
def test_the_order_of_tickets_makes_no_difference_to_the_hypervolume(points, shuffler):
    shuffled = [*points]
    shuffler.shuffle(shuffled)
    assert volume(shuffled) == volume(points)


@given(shares.filter(bool))
def test_hypervolume_is_between_that_of_each_ticket_and_that_of_all_as_one(points):
    ideal = (max(accuracy for accuracy, _ in points), min(share for _, share in points))
    assert 0 <= volume(points) <= volume([ideal]) + 1e-12
    assert volume(points) >= max(volume([point]) for point in points) - 1e-12


@given(shares)
def test_only_the_front_has_a_hypervolume(points):
    places = pareto_front([accuracy for accuracy, _ in points], [share for _, share in points])
    assert volume([points[place] for place in places]) == pytest.approx(volume(points), abs=1e-12)


accuracies = st.sampled_from([0.5, 0.6, 0.7, 0.8, 0.9])  # few, so that there are ties
tickets = st.lists(st.tuples(accuracies, st.integers(1, 6)), max_size=20).map(
    lambda points: drawn(*points)
)
rungs, most, seeds = st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000)


def accuracy(id: str, rung: int, seed: int) -> float:
    """What a proof of this ticket would come to."""
    return random.Random(f"{id} {rung} {seed}").choice([0.5, 0.6, 0.7, 0.8, 0.9])


def halved(space: SearchSpace, events: list[Event], seed: int) -> list[list[Event]]:
    """The proofs of each round, until no more are asked for."""
    rounds: list[list[Event]] = []
    while True:
        rung, waiting = next_proofs(space, [*events, *(e for some in rounds for e in some)])
        if not waiting:
            return rounds
        assert len(rounds) < 10, "halving does not end"
        rounds.append([proof(id, rung, accuracy(id, rung, seed)) for id in ids(waiting)])


@given(tickets, rungs, most, seeds)
def test_halving_ends_after_a_round_for_each_further_rung_at_most(events, rungs, winners, seed):
    rounds = halved(space(rungs, winners), events, seed)
    assert [{e["rung"] for e in some} for some in rounds] == [{r + 2} for r in range(len(rounds))]
    assert len(rounds) <= rungs - 1


@given(tickets, rungs, most, seeds)
def test_each_rung_has_half_of_those_before_and_no_fewer_than_can_win(events, rungs, winners, seed):
    before = ids(events)
    for some in halved(space(rungs, winners), events, seed):
        now = ids(some)
        assert set(now) <= set(before)
        assert len(now) == max((len(before) + 1) // 2, winners)
        before = now


@given(tickets, most)
def test_no_ticket_goes_on_in_place_of_one_of_an_earlier_pareto_front(events, winners):
    kept = set(ids(next_proofs(space(2, winners), events)[1]))
    left = events if kept else []
    while left:
        places = pareto_front([e["proof_accuracy"] for e in left], [e["macs"] for e in left])
        layer = {left[place]["ticket"] for place in places}
        left = [event for event in left if event["ticket"] not in layer]
        assert layer <= kept or not kept & set(ids(left))


@given(tickets, rungs, most, seeds, st.randoms(use_true_random=False))
def test_the_order_of_events_makes_no_difference(events, rungs, winners, seed, shuffler):
    space_ = space(rungs, winners)
    whole = [*events, *(event for some in halved(space_, events, seed) for event in some)]
    shuffled = [*whole]
    shuffler.shuffle(shuffled)
    assert proved(shuffled) == proved(whole)
    assert choose_winners(space_, shuffled) == choose_winners(space_, whole)
    part = events + whole[len(events) : (len(events) + len(whole)) // 2]
    shuffled = [*part]
    shuffler.shuffle(shuffled)
    assert next_proofs(space_, shuffled) == next_proofs(space_, part)


@given(tickets, rungs, most, seeds, st.randoms(use_true_random=False))
def test_a_sweep_that_is_cut_off_comes_to_the_same_winners(events, rungs, winners, seed, shuffler):
    space_ = space(rungs, winners)
    rounds = halved(space_, events, seed)
    whole = [*events, *(event for some in rounds for event in some)]
    # Some rounds were over; of the next one, a few proofs had come in, in any order.
    over = shuffler.randint(0, len(rounds))
    cut = [*events, *(event for some in rounds[:over] for event in some)]
    cut += [event for some in rounds[over : over + 1] for event in some if shuffler.random() < 0.5]
    rest = [event for some in halved(space_, cut, seed) for event in some]
    assert len(cut) + len(rest) == len(whole)
    assert choose_winners(space_, [*cut, *rest]) == choose_winners(space_, whole)


@given(tickets, rungs, most, seeds)
def test_winners_came_to_the_last_rung_and_none_beats_another(events, rungs, winners, seed):
    space_ = space(rungs, winners)
    rounds = halved(space_, events, seed)
    chosen = choose_winners(space_, [*events, *(event for some in rounds for event in some)])
    assert len(chosen) <= winners
    assert bool(chosen) == bool(events)
    assert all(winner["proof_rung"] == len(rounds) + 1 for winner in chosen)
    for one, other in itertools.pairwise(chosen):
        assert one["proof_accuracy"] > other["proof_accuracy"]
        assert one["macs"] > other["macs"]
