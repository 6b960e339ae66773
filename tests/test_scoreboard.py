"""What a person sees of a comparison holds the figures that matter and fits the terminal."""

import io
import re

import pytest
from made_up_comparison import (
    METHODS,
    OPENING,
    check,
    ended,
    epoch,
    finished,
    retrained,
    source,
    ticket,
)
from rich.console import Console
from test_console import printed, rows, screen

from raytickets import comparison
from raytickets.paper import PUBLISHED
from raytickets.scoreboard import Scoreboard, comparison_table, paper_table


def report(events, interrupted=(), retries=()):
    """As `Sweep.report` has it."""
    return comparison.report(events) | {"interrupted": interrupted, "retries": dict(retries)}


def shown(events, width=80):
    """What a terminal shows after the last of these."""
    console = Console(
        width=width, height=60, file=io.StringIO(), force_terminal=True, color_system=None
    )
    with Scoreboard(console, OPENING) as scoreboard:
        for event in events[:-1]:
            scoreboard(event)
        before = len(screen(console))
        scoreboard(events[-1])
    return screen(console)[before:]


def test_the_table_shows_accuracy_size_and_cost_of_every_method():
    text = printed(comparison_table(report(finished())))
    assert text.startswith("duel: done, penalty 0.0001, 3 seeds, 30 epochs of retraining")
    results = text.partition("Time of all training")[0]
    of_half = rows(results.partition("prune ratio 0.5")[2])
    assert of_half["early_bird"] == ["2", "96.50±0.71", "50%", "50%", "75%", "20%", "77%", "51%"]
    assert of_half["progressive"][-2:] == ["150%", "100%"]
    assert rows(results)["dense"] == ["3", "98.00±1.00", *["100%"] * 3, "-", "100%", "-"]
    for method in METHODS:
        assert method in results


def test_every_column_and_what_is_missing_is_explained():
    text = " ".join(printed(comparison_table(report(finished()))).split())
    assert "accuracy on the test images, % (mean ± standard deviation over seeds)" in text
    assert "search and retraining, that this ticket alone takes" in text
    assert "early_bird, prune ratio 0.5: 1 of 3 seeds did not draw a ticket." in text
    assert "Each of these 6 sentences is a paired t test of its own" in text


def test_the_claims_are_under_the_question_that_they_answer():
    text = " ".join(printed(comparison_table(report(finished()))).split())
    _, _, answers = text.partition("Does an early-bird ticket beat random?")
    assert answers.startswith(" Prune ratio 0.3: early_bird is 2.33 points above random")
    assert "early_bird beats random. Prune ratio 0.5:" in answers


def test_energy_has_its_source_or_is_unavailable():
    without = printed(comparison_table(report(finished())))
    assert "Energy: unavailable." in without
    assert " J" not in without
    text = printed(comparison_table(report(finished(joules=True))))
    assert "Energy: measured (a counter)." in text
    assert "of trials that share one" in " ".join(text.split())
    assert "of trials that share one" not in " ".join(without.split())
    spending = text.partition("Time and energy of all training")[2]
    of_half = rows(spending.partition("prune ratio 0.5")[2])
    assert of_half["early_bird"] == ["69", "77%", "51%", "4k", "133%", "100%"]


def test_a_report_of_an_unfinished_comparison_says_what_is_owed():
    text = printed(comparison_table(report([OPENING, ticket("dense", 0.0, 0)])))
    assert text.startswith("duel: unfinished")
    assert "dense, prune ratio 0: 3 of 3 seeds are not done." in text
    assert "Energy: not known yet." in text


def test_a_report_says_what_was_cut_off_and_what_ran_again():
    found = report(finished(), ["early_bird-seed2"], {"snip-seed0": 2})
    text = printed(comparison_table(found))
    assert "early_bird-seed2: interrupted" in text
    assert "Run again, or gone on from an older checkpoint: snip-seed0 (2)." in text


def test_a_worker_that_was_lost_is_told_of():
    lost = {"event": "retry", "trajectory": "snip-seed0", "attempt": 1, "reason": "killed"}
    said = "snip-seed0  runs again, attempt 1: killed"
    assert said in shown([*finished(), lost])


def test_failures_are_printed_as_they_stand():
    failed = ended("early_bird", 0, {}, "failed") | {"reason": "no space left [/dev/sda]"}
    text = printed(comparison_table(report([OPENING, failed])), width=200)
    assert "Failed: early_bird-penalty0.0001-seed0: no space left [/dev/sda]" in text


@pytest.mark.parametrize("width", [80, 100])
def test_no_figure_is_cut_off(width):
    events = finished(joules=True)
    for text in (
        shown([*events, epoch("early_bird", 0.5, 0, 3)], width),
        printed(comparison_table(report(events)), width),
        printed(paper_table(PUBLISHED), width),
    ):
        assert "…" not in text
        assert max(map(len, re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", text).splitlines())) <= width


def test_a_terminal_shows_distances_until_a_ticket_is_drawn():
    events = [
        check("early_bird", 0, 5.0, {"0.3": 0.5, "0.5": None}),
        check("progressive", 0, 1.0, {"0.3": None, "0.5": None}),
        check("iterative", 0, 7.0, {}),
        ticket("early_bird", 0.3, 0),
        check("early_bird", 0, 6.0, {"0.3": 0.125, "0.5": 0.75}),
    ]
    text = shown(events)
    assert rows(text)[source("early_bird", 0)] == ["6", "50.0%", "@6", "0.75"]
    assert rows(text)[source("progressive", 0)] == ["1", "50.0%", "-", "-"]
    assert rows(text)[source("iterative", 0)] == ["7", "50.0%", "-", "-"]
    assert "0 of 9 sources of tickets have ended." in text


def test_sources_that_ended_make_room_and_those_that_failed_say_why():
    failed = ended("progressive", 0, {}, "failed") | {"reason": "out of memory"}
    events = [check("early_bird", 0, 5.0, {}), ended("early_bird", 0, {}), failed]
    text = shown(events)
    assert "2 of 9 sources of tickets have ended." in text
    assert "progressive-penalty0.0001-seed0 failed: out of memory" in text
    again = shown([*events, check("progressive", 0, 1.0, {"0.3": None})])
    assert "out of memory" not in again


def test_a_terminal_shows_what_is_retrained_and_the_standings():
    events = [
        ticket("early_bird", 0.3, 0),
        ticket("early_bird", 0.3, 1),
        ticket("dense", 0.0, 0),
        epoch("early_bird", 0.3, 0, 30),
        retrained("early_bird", 0.3, 0, 0.975),
        retrained("early_bird", 0.3, 1, 0.985),
        epoch("dense", 0.0, 0, 7),
    ]
    text = shown(events)
    running, _, standings = text.partition("retrained")
    assert rows(running)["dense"] == ["0", "0", "7/30", "0.250", "97.0%"]
    assert rows(standings)["early_bird"] == ["98.0%", "(2)"]
    assert "2 of the 3 tickets found so far are retrained." in " ".join(text.split())


def test_without_a_terminal_each_event_is_one_line():
    console = Console(width=40, file=io.StringIO())
    events = [
        OPENING,
        check("early_bird", 0, 5.0, {"0.3": 0.5, "0.5": None}),
        ticket("early_bird", 0.3, 0),
        ended("early_bird", 0, {}, "not converged"),
        epoch("early_bird", 0.3, 0, 30),
        retrained("early_bird", 0.3, 0, 0.975),
        ticket("dense", 0.0, 1),
        retrained("dense", 0.0, 1, 0.98),
    ]
    with Scoreboard(console, OPENING) as scoreboard:
        for event in events:
            scoreboard(event)
    name = source("early_bird", 0)
    assert screen(console).splitlines() == [
        f"{name}  epoch 5  validation 50.0%  mask distance 0.3: 0.50  0.5: -",
        f"{name}  found early_bird at prune ratio 0.3, seed 0",
        f"{name}  not converged",
        "retraining early_bird at prune ratio 0.3, seed 0  epoch 30/30  validation 97.0%",
        "retraining early_bird at prune ratio 0.3, seed 0  test 97.5%",
        f"{source('dense', 1)}  found dense, seed 1",
        "retraining dense, seed 1  test 98.0%",
    ]


def test_the_papers_numbers_say_where_they_are_from_and_how_sure_they_are():
    text = " ".join(printed(paper_table(PUBLISHED)).split())
    assert "arXiv 1909.11957" in text
    assert "VGG16 on CIFAR-100: Table 2" in text
    assert "Read off a figure: accuracies are within 0.2 points." in text
    assert "ours" not in text
