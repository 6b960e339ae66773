"""What a person sees holds the figures that matter and fits the terminal."""

import dataclasses
import io
import re

import pytest
from made_up_sweep import (
    FINISHED,
    HIGH,
    LARGE,
    LOW,
    MIDDLE,
    OPENING,
    SEARCHED,
    SMALL,
    SPACE,
    check,
    proof,
    retrained,
    ticket,
    trajectory,
    write,
)
from rich.console import Console

from raytickets.config import Optuna, Range
from raytickets.console import Progress, history_table, report_table, ticket_table
from raytickets.history import history
from raytickets.sweep import Sweep
from raytickets.ticket import Ticket


def printed(content, width=80):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(content)
    return screen(console)


def screen(console):
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(text):
    """The words of each line by the first of them."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return {line[0]: line[1:] for line in lines}


@pytest.fixture
def report(tmp_path):
    """`report(events)` is the report of a sweep with this journal."""
    return lambda events: Sweep(write(tmp_path / "first", events)).report()


def test_a_report_shows_each_winner_against_the_dense_network(report):
    text = printed(report_table(report(FINISHED)))
    assert text.startswith("first: done")
    found = rows(text)
    assert found["dense"] == ["99.00%", "2M", "100%", "300k", "100%", "100%"]
    shown = ["0.0001", "0.3", "8", "98.50%", "1M", "50%", "100k", "33%", "72%"]
    assert found[LARGE] == shown
    assert found[SMALL][-3:] == ["35k", "12%", "40%"]


def test_a_report_says_what_its_columns_mean_and_what_was_not_drawn(report):
    text = " ".join(printed(report_table(report(FINISHED))).split())
    assert "accuracy on the test images" in text
    assert "retraining and an equal share of the search" in text
    assert "Trajectories: 2. Tickets: 3." in text
    assert "Tickets proved again with more MACs: 2 in rung 2." in text
    assert f"{LOW}: prune ratio 0.5 not converged" in text
    assert HIGH not in text


def test_a_report_says_what_sharing_and_proofs_saved(report):
    text = printed(report_table(report(FINISHED)))
    assert "counted MACs of training, % of the dense network's" in text
    assert "112%  this sweep: the search, and the retraining of all winners" in text
    assert "127%  with a trajectory for each prune ratio: sharing them saved 12%" in text
    assert "142%  with every ticket retrained in place of proofs: proofs saved 22%" in text


def test_a_report_admits_that_proofs_cost_more_than_they_saved(report):
    dear = [
        event | {"proof_macs": 10**12} if "proof_macs" in event else event for event in FINISHED
    ]
    text = printed(report_table(report(dear)))
    assert "598%  this sweep" in text
    assert "142%  with every ticket retrained in place of proofs: proofs cost 319% more" in text
    alone = {"sweep_cost": 1.0, "without_sharing": 1.0, "without_halving": 1.0}
    assert "sharing them saved 0%" in printed(report_table(report(FINISHED) | alone))


def test_a_report_says_why_a_trajectory_was_ended_early(report):
    behind = trajectory(
        LOW, "hopeless", 1, {"0.3": "drawn", "0.5": "hopeless"}, "others were better"
    )
    text = " ".join(printed(report_table(report([OPENING, behind]))).split())
    assert f"{LOW}: prune ratio 0.5 hopeless (others were better)" in text


def proposed(space):
    settings = Optuna(trajectories=3, ranges={"penalty": Range(1e-5, 1e-3)})
    return dataclasses.replace(space, optuna=settings)


def test_a_report_says_what_optuna_proposed_for_each_winner(report):
    changes = {"penalty": 0.00034567, "training.epochs": 12}
    events = [e | {"changes": changes} if e.get("state") == "drawn" else e for e in FINISHED]
    text = " ".join(printed(report_table(report(events))).split())
    assert f"{SMALL}: {HIGH}, penalty 0.000346, training.epochs 12" in text
    assert f"{LARGE}: {LOW}" not in text


def test_a_report_says_how_well_proofs_ranked_the_tickets(report):
    more = [*FINISHED, retrained(MIDDLE, 900_000, 450 * 10**9, 0.98)]
    text = " ".join(printed(report_table(report(more))).split())
    assert "final validation accuracy (Spearman): 0.50 over 3 tickets." in text


def test_a_report_has_no_correlation_of_two_tickets(report):
    assert "Spearman" not in printed(report_table(report(FINISHED)))


def test_trials_of_optuna_are_shown_by_their_number_and_values():
    ended = trajectory("trial7-seed0", "drawn", 10, {"0.3": "drawn", "0.5": "drawn"})
    ended |= {"changes": {"penalty": 0.00034567}}
    console = Console(width=80, file=io.StringIO(), color_system=None)
    with Progress(console, proposed(SPACE)) as progress:
        progress(check("trial7-seed0", 5.0, {"0.3": None, "0.5": None}))
        progress(ended)
    assert "trial7-seed0  drawn: penalty 0.000346" in screen(console)
    table = progress._tables()[0].renderables[0]
    assert (table.columns[0].header, *table.columns[0].cells) == ("trial", "7")


def test_a_report_of_an_unfinished_sweep_leaves_open_what_is_not_known(report):
    text = printed(report_table(report(SEARCHED)))
    assert text.startswith("first: unfinished")
    assert rows(text)["dense"] == ["-", "2M", "100%", "300k", "100%", "-"]
    assert "this sweep" not in text


def test_a_reason_is_printed_as_it_stands(report):
    reason = "[Errno 28] No space left [/dev/sda]"
    failed = trajectory(LOW, "failed", 0, {"0.3": "failed"}, reason)
    assert reason in printed(report_table(report([OPENING, failed])), width=200)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_figure_is_cut_off(report, width):
    many = dataclasses.replace(SPACE, prune_ratios=(0.3, 0.5, 0.7, 0.8), seeds=(0, 20261122))
    console = Console(width=width, height=40, file=io.StringIO(), force_terminal=True)
    with Progress(console, many) as progress:
        for event in FINISHED:
            if event["event"] == "check":
                event = event | {"distances": dict.fromkeys(("0.3", "0.5", "0.7", "0.8"), 0.5)}
            progress(event)
    for text in (screen(console), printed(report_table(report(FINISHED)), width)):
        assert "…" not in text
        assert max(map(len, re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", text).splitlines())) <= width
    assert "98.5% @8" in screen(console) or width < 100


def terminal():
    return Console(width=100, height=40, file=io.StringIO(), force_terminal=True, color_system=None)


def last_screen(events):
    """What a terminal shows after these: each update of a live display begins with `Search`."""
    console = terminal()
    with Progress(console, SPACE) as progress:
        for event in events:
            progress(event)
    return screen(console).rpartition("Search")[2]


def test_a_terminal_shows_distances_until_a_ticket_is_drawn():
    events = [
        check(LOW, 1.0, {"0.3": None, "0.5": None}),
        check(HIGH, 1.0, {"0.3": None, "0.5": None}),
        check(LOW, 8.0, {"0.3": 0.125, "0.5": 0.75}),
        ticket(LOW, LARGE, 0.3, 1_000_000, 0.98),
    ]
    found = rows(last_screen(events))
    assert found["0.0001"] == ["8/20", "93.8%", "98.0%", "@8", "0.75", "training"]
    assert found["0.001"] == ["1/20", "50.0%", "-", "-", "training"]


def test_within_an_epoch_a_terminal_keeps_the_last_accuracy():
    events = [check(LOW, 0.5, {"0.3": None, "0.5": None})]
    assert rows(last_screen(events))["0.0001"][:2] == ["0.5/20", "-"]
    events += [check(LOW, 1.0, {"0.3": None, "0.5": None})]
    events += [check(LOW, 4 / 3, {"0.3": 0.5, "0.5": 0.75})]
    assert rows(last_screen(events))["0.0001"][:3] == ["1.33/20", "50.0%", "0.50"]


def test_a_further_proof_takes_the_place_of_the_one_before():
    events = SEARCHED[:-3]
    assert "proved again" not in last_screen(events)
    proofs = [proof(LARGE, 2, 0.985), proof(SMALL, 2, 0.965), proof(LARGE, 3, 0.9875)]
    text = last_screen([*events, *proofs])
    found = rows(text)
    assert found["0.0001"][2:4] == ["98.8%", "@8"]
    assert found["0.001"][2:] == ["95.0%", "@7.5", "96.5%", "@10", "drawn"]
    assert "Tickets proved again with more MACs: 2 in rung 2, 1 in rung 3." in text


def test_a_trajectory_that_failed_and_runs_again_is_shown_as_training():
    failed = trajectory(LOW, "failed", 0, {"0.3": "failed"}, "worker died")
    assert rows(last_screen([failed]))["0.0001"][-1] == "failed"
    again = check(LOW, 1.0, {"0.3": None, "0.5": None})
    assert rows(last_screen([failed, again]))["0.0001"][-1] == "training"


def test_a_terminal_shows_how_trajectories_ended_and_each_retraining():
    found = rows(last_screen(FINISHED))
    assert found["0.0001"][-2:] == ["not", "converged"]
    assert found["0.001"] == ["10/20", "95.0%", "95.0%", "@7.5", "96.5%", "@10", "drawn"]
    assert found["dense"] == ["30/30", "0.250", "98.0%", "99.0%"]
    assert found[SMALL] == ["30/30", "0.250", "95.2%", "96.2%"]


def test_where_not_all_trajectories_fit_those_that_run_are_shown():
    ended = [
        trajectory(f"penalty0.0001-seed{seed}", "drawn", 1, {"0.3": "drawn"}) for seed in range(30)
    ]
    text = last_screen([*ended, check("penalty0.5-seed0", 1.0, {"0.3": None, "0.5": None})])
    assert "0.0001" not in text
    assert "0.5" in rows(text)
    assert "30 trajectories have ended." in text


def test_a_retraining_that_went_on_after_its_last_epoch_is_shown():
    """As when a worker dies between its last epoch and telling of the end."""
    console = terminal()
    with Progress(console, SPACE) as progress:
        progress(retrained("dense", 2_000_000, 1, 0.99))
    assert rows(screen(console))["dense"] == ["30/30", "98.0%", "99.0%"]


def test_without_a_terminal_each_event_is_one_line():
    console = Console(width=40, file=io.StringIO())
    with Progress(console, SPACE) as progress:
        for event in FINISHED:
            progress(event)
    assert screen(console).splitlines() == [
        f"{LOW}  epoch 1/20  validation 50.0%  mask distance 0.3: -  0.5: -",
        f"{HIGH}  epoch 1/20  validation 50.0%  mask distance 0.3: -  0.5: -",
        f"{HIGH}  epoch 7.5/20  mask distance 0.3: 0.10  0.5: 0.25",
        f"{HIGH}  drew ticket {MIDDLE} at prune ratio 0.3: proof 95.0%",
        f"{LOW}  epoch 8/20  validation 93.8%  mask distance 0.3: 0.12  0.5: 0.75",
        f"{LOW}  drew ticket {LARGE} at prune ratio 0.3: proof 98.0%",
        f"{HIGH}  epoch 10/20  validation 95.0%  mask distance 0.3: 0.10  0.5: 0.20",
        f"{HIGH}  drew ticket {SMALL} at prune ratio 0.5: proof 96.0%",
        f"{HIGH}  drawn",
        f"{LOW}  epoch 20/20  validation 97.5%  mask distance 0.3: 0.05  0.5: 0.50",
        f"{LOW}  not converged",
        f"ticket {SMALL}  proof in rung 2: 96.5%",
        f"ticket {LARGE}  proof in rung 2: 98.5%",
        "retraining dense  epoch 30/30  validation 97.0%",
        "retraining dense  test 99.0%",
        f"retraining {LARGE}  epoch 30/30  validation 97.0%",
        f"retraining {LARGE}  test 98.5%",
        f"retraining {SMALL}  epoch 30/30  validation 97.0%",
        f"retraining {SMALL}  test 96.2%",
    ]


MANIFEST = {
    "id": LARGE,
    "network": {"name": "cifar_vgg", "options": {"depth": 9, "activation": "[relu]"}},
    "space": {"name": "digits"},
    "penalty": 1e-4,
    "prune_ratio": 0.3,
    "learning_rate": 0.1,
    "seed": 7,
    "stop_rule": {
        "rule": "corrected",
        "window": 5,
        "threshold": 0.2,
        "checks_per_epoch": 3,
        "distances": [0.19, 0.125],
    },
    "draw": {"check": 25, "epoch": 25 / 3},
    "min_channels": {"least": 1, "acted_on": ["0", "3"]},
    "round_to": 8,
    "precision": "bfloat16",
    "macs": 1_000_000,
    "params": 100_000,
    "groups": [
        {"name": "0", "mask": "1100", "cut": "1000"},
        {"name": "3", "mask": "1111", "cut": "1111"},
    ],
}


def test_a_ticket_is_shown_with_how_it_was_found_and_what_it_keeps(tmp_path):
    text = printed(ticket_table(Ticket(tmp_path, MANIFEST)))
    found = rows(text)
    assert f"Ticket {LARGE}" in text
    assert "cifar_vgg depth=9 activation=[relu]" in text
    assert found["penalty"] == ["0.0001"]
    assert found["seed"] == ["7"]
    assert found["drawn"] == ["epoch", "8.33,", "check", "25"]
    assert found["precision"] == ["bfloat16"]
    assert found["rounded"] == ["to", "multiples", "of", "8"]
    assert found["distances"] == ["0.190,", "0.125"]
    assert found["floor"] == ["acted", "on", "0,", "3"]
    assert found["0"] == ["2", "4", "█" * 12]
    assert found["3"] == ["4", "4", "█" * 24]
    assert "retrained" not in text


def test_a_retrained_ticket_also_shows_what_it_was_retrained_to(tmp_path):
    done = {
        "from": SMALL,
        "epochs": 30,
        "num_workers": 2,
        "validation_accuracy": 0.9,
        "test_accuracy": 0.875,
    }
    found = rows(printed(ticket_table(Ticket(tmp_path, MANIFEST | {"retrained": done}))))
    assert found["test"] == ["87.50%"]
    assert found["validation"] == ["90.00%"]


def test_a_worker_that_was_lost_is_a_line_and_a_note():
    console = Console(width=80, file=io.StringIO(), color_system=None)
    lost = {"event": "retry", "trajectory": LOW, "attempt": 2, "reason": "the worker was killed"}
    for event in (*SEARCHED[:6], lost, lost | {"run": LARGE, "trajectory": None}):
        progress = Progress(console, SPACE)
        progress(event)
    lines = screen(console).splitlines()
    assert lines[-2] == f"{LOW}  runs again, attempt 2: the worker was killed"
    assert lines[-1] == f"retraining {LARGE}  runs again, attempt 2: the worker was killed"


def test_tickets_from_before_a_new_beginning_are_not_shown():
    drawn = [event for event in SEARCHED if event.get("trajectory") == LOW][:4]
    assert "ticket" in [event["event"] for event in drawn]
    anew = {"event": "retry", "trajectory": LOW, "attempt": 1, "reason": "other", "anew": True}
    progress = Progress(Console(width=120, file=io.StringIO(), force_terminal=True), SPACE)
    for event in drawn:
        progress(event)
    assert "% @" in printed(progress._search())
    progress(anew)
    assert "% @" not in printed(progress._search())


def test_a_report_says_what_was_cut_off_and_what_ran_again(report):
    lost = {"event": "retry", "trajectory": HIGH, "attempt": 1, "reason": "the worker was killed"}
    cut = {"event": "end", "state": "interrupted", "reason": ""}
    text = printed(report_table(report([*SEARCHED[:6], lost, cut])))
    assert text.startswith("first: interrupted")
    for line in (f"{LOW}: interrupted", f"{HIGH}: interrupted"):
        assert line in text
    assert f"Run again, or gone on from an older checkpoint: {HIGH} (1)." in text


def test_history_shows_the_best_of_every_budget_and_marks_what_fell(tmp_path):
    worse = [e | {"validation_accuracy": 0.9} if e.get("run") == LARGE else e for e in FINISHED]
    for name, day, events in (("a-0001", 1, FINISHED), ("a-0002", 2, worse)):
        started = f"2026-11-0{day}T02:00:00Z"
        write(tmp_path / name, [OPENING | {"name": name, "started": started}, *events[1:]])
    write(tmp_path / "a-0003", [OPENING | {"started": "2026-11-03T02:00:00Z"}])
    text = printed(history_table("digits", history(tmp_path, "digits")))
    found = rows(text)
    assert found["a-0001"] == ["done", "96.2%", "98.5%", "98.5%", "98.5%"]
    # Within 50 % of the MACs the larger ticket was better, and now it is the smaller one.
    assert found["a-0002"] == ["done", "96.2%", "+0.0", *["96.2%", "-2.2!"] * 3]
    assert found["a-0003"] == ["unfinished", *"----"]
