"""What a comparison's journal makes of runs; what a sweep's does is in test_tracking.py."""

import dataclasses
from pathlib import Path

import made_up_comparison as made_up
import made_up_sweep
import pytest
from matplotlib.figure import Figure

from raytickets import study
from raytickets.config import Data, InputError, Network, Optuna, Range, SearchSpace
from raytickets.journal import Event
from raytickets.runs import Run, Runs

FINISHED = made_up.finished(joules=True)
EARLY_BIRD = made_up.ticket_id("early_bird", 0.3, 0)
DENSE = made_up.ticket_id("dense", 0.0, 0)


def runs_of(events: list[Event], folder: Path, found: dict[str, Run] | None = None) -> Runs:
    runs = Runs(folder, events[0], found or {})
    for event in events:
        runs.add(event)
    runs.summarise()
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return runs_of(FINISHED, tmp_path_factory.mktemp("duel")).all


def last(run: Run) -> dict[str, float]:
    return {name: value for name, value, _, _ in run.metrics}


def test_sources_are_below_the_comparison_and_tickets_below_their_source(runs: dict[str, Run]):
    assert (runs["comparison"].kind, runs["comparison"].parent) == ("comparison", "")
    source = runs[made_up.source("early_bird", 0)]
    assert (source.kind, source.parent) == ("trajectory", "comparison")
    assert source.params["method"] == "early_bird"
    for method in ("early_bird", "random"):  # One search gives both.
        ticket = runs[made_up.ticket_id(method, 0.3, 0)]
        assert (ticket.kind, ticket.parent) == ("ticket", made_up.source("early_bird", 0))
        assert ticket.name == f"{method}-0.3-seed0"
    assert (runs[DENSE].kind, runs[DENSE].name) == ("ticket", "dense-seed0")
    assert {run.wanted for run in runs.values()} == {"FINISHED"}
    keys = list(runs)
    assert all(keys.index(run.parent) < keys.index(key) for key, run in runs.items() if run.parent)


def test_a_methods_ticket_has_the_params_of_a_sweeps(runs: dict[str, Run]):
    assert runs[EARLY_BIRD].params == {
        "method": "early_bird",
        "penalty": 1e-4,
        "prune_ratio": 0.3,
        "learning_rate": 0.1,
        "seed": 0,
        "stop_rule": "corrected",
        "network": "cifar_vgg",
    }
    assert runs[DENSE].params["method"] == "dense"


def test_a_ticket_shows_what_search_and_training_cost(runs: dict[str, Run]):
    metrics = last(runs[EARLY_BIRD])
    expected = {
        "test_accuracy": 0.975,
        "macs": 1_400_000,
        "params": 210_000,
        "latency_ms": 1.7,
        "relative_latency": 0.85,
        "draw_epoch": 6.0,
        "search_macs": 240e9,
        "search_forward_macs": 80e9,
        "search_backward_macs": 160e9,
        "search_samples": 240,
        "search_seconds": 24,
        "search_joules": 1000,
        "train_macs": 630e9,
        "train_forward_macs": 210e9,
        "train_joules": 3000,
        "total_joules": 4000,
    }
    assert {name: metrics[name] for name in expected} == expected
    assert runs[EARLY_BIRD].tags["raytickets.energy"] == "measured (a counter)"


def test_a_search_of_no_work_does_not_hide_the_energy_of_the_training(runs: dict[str, Run]):
    metrics = last(runs[DENSE])
    assert metrics["total_joules"] == metrics["train_joules"] == 3000
    assert "draw_epoch" not in metrics
    assert runs[DENSE].tags["raytickets.energy"] == "measured (a counter)"


def test_energy_that_is_not_known_is_no_metric(tmp_path: Path):
    ticket = runs_of(made_up.finished(), tmp_path).all[EARLY_BIRD]
    assert not [name for name in last(ticket) if "joules" in name]
    assert ticket.tags["raytickets.energy"] == "unavailable"


def test_a_comparison_shows_its_table_its_plot_and_its_sentences(runs: dict[str, Run]):
    run = runs["comparison"]
    assert set(run.files) == {"space.json", "comparison.json", "accuracy_against_macs.png"}
    table = run.files["comparison.json"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert (rows[0]["method"], rows[0]["test_accuracy"], rows[0]["n"]) == ("dense", 0.98, 3)
    assert len(rows) == 1 + 2 * 3
    metrics = last(run)
    assert metrics["dense_test_accuracy"] == pytest.approx(0.98)
    assert metrics["random_0.5_test_accuracy"] == pytest.approx(0.9625)
    assert metrics["early_bird_0.3_cost_to_dense"] == pytest.approx(870 / 900)
    note = run.tags["mlflow.note.content"]
    assert "- Prune ratio 0.3: early_bird is 2.33 points above random" in note
    assert note.endswith("sort them by `test_accuracy`.\n")


def test_a_comparison_that_has_only_begun_has_a_table_already(tmp_path: Path):
    for end in (1, 2, 4):
        run = runs_of(FINISHED[:end], tmp_path).all["comparison"]
        assert len(run.files["comparison.json"]["data"]) == 7
        assert run.wanted == "RUNNING"


def test_the_space_in_a_run_is_the_space_that_ran(runs: dict[str, Run]):
    for run in runs.values():
        assert SearchSpace.from_dict(run.files["space.json"]) == made_up.COMPARED
    assert runs[EARLY_BIRD].tags["raytickets.fingerprint"] == made_up.COMPARED.fingerprint


PROPOSED = dataclasses.replace(
    made_up_sweep.SPACE,
    penalties=(1e-4,),
    optuna=Optuna(trajectories=2, ranges={"training.learning_rate": Range(0.01, 0.5)}),
)


def proposed() -> list[Event]:
    """A sweep of one trajectory, whose learning rate Optuna chose."""
    key, changes = "trial0-seed0", {"training.learning_rate": 0.3}
    id = made_up_sweep.MIDDLE
    return [
        made_up_sweep.OPENING | {"space": PROPOSED.as_dict()},
        made_up_sweep.check(key, 1.0, {"0.3": 0.1, "0.5": 0.3}),
        made_up_sweep.ticket(key, id, 0.3, 900_000, 0.95, epoch=1.0),
        made_up_sweep.trajectory(key, "not converged", 10, {"0.3": "drawn"}) | {"changes": changes},
        {"event": "winners", "tickets": [id]},
    ]


def test_what_optuna_changed_is_in_the_space_of_its_runs(tmp_path: Path):
    runs = runs_of(proposed(), tmp_path).all
    for key in ("trial0-seed0", made_up_sweep.MIDDLE):
        space = SearchSpace.from_dict(runs[key].files["space.json"])
        assert space.training.learning_rate == 0.3
        assert runs[key].tags["raytickets.fingerprint"] == space.fingerprint
    assert runs["trial0-seed0"].params["training.learning_rate"] == 0.3
    assert SearchSpace.from_dict(runs["sweep"].files["space.json"]) == PROPOSED


def test_optunas_own_figures_are_one_page_that_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from plotly.graph_objects import Figure as Plotly
    from plotly.graph_objects import Scatter

    def figures(space: SearchSpace, sweep: Path) -> dict[str, Plotly]:
        assert (space, sweep) == (PROPOSED, tmp_path)
        return {name: Plotly(Scatter(x=[1], y=[2], name=name)) for name in ("history", "weights")}

    monkeypatch.setattr(study, "figures", figures)
    page = runs_of(proposed(), tmp_path).all["sweep"].files["optuna.html"]
    assert page.count("plotly-graph-div") == 2
    assert "<script src=" not in page


def test_a_trajectory_shows_its_distances_and_so_does_each_ticket_up_to_its_draw(tmp_path: Path):
    source, rows = made_up.source("early_bird", 0), [[0.0, 0.5], [0.5, 0.0]]
    matrix = {"epochs": [5.0, 6.0], "ratios": {"0.3": rows, "0.5": rows}}
    events = [
        made_up.OPENING,
        *(
            made_up.check("early_bird", 0, epoch, {"0.3": 0.5 - epoch / 20, "0.5": 0.9})
            for epoch in (5.0, 6.0, 7.0)
        ),
        made_up.ticket("early_bird", 0.3, 0),
        made_up.ended("early_bird", 0, {"0.3": "drawn", "0.5": "not converged"})
        | {"distances_matrix": matrix},
    ]
    runs = runs_of(events, tmp_path).all
    assert set(runs[source].files) == {
        "space.json",
        "mask_distance.png",
        "mask_distance_matrix.png",
    }
    figure = runs[EARLY_BIRD].files["mask_distance.png"]
    assert isinstance(figure, Figure)
    curve = next(line for line in figure.axes[0].lines if "0.3" in str(line.get_label()))
    assert list(curve.get_xdata()) == [5, 6]


def test_what_has_ended_in_mlflow_keeps_its_files(tmp_path: Path):
    source = made_up.source("early_bird", 0)
    found = {
        key: Run(kind, key, "", id=key, status="FINISHED", wanted="FINISHED")
        for key, kind in ((source, "trajectory"), (EARLY_BIRD, "ticket"))
    }
    runs = runs_of(FINISHED, tmp_path, found).all
    assert runs[source].files == runs[EARLY_BIRD].files == {}
    assert last(runs[EARLY_BIRD])["test_accuracy"] == 0.975


def test_a_retraining_shows_its_recipe_also_where_it_was_not_the_sweeps(tmp_path: Path):
    sweeps = made_up_sweep.FINISHED
    winner = next(e["run"] for e in sweeps if e["event"] == "retrained" and e["run"] != "dense")
    recipe = {**made_up_sweep.SPACE.as_dict()["retraining"], "weights": "reinit"}
    again = next(e for e in sweeps if e["event"] == "retrained" and e["run"] == winner)
    runs = runs_of([*sweeps, again | {"recipe": recipe}], tmp_path).all
    assert runs[winner].files["retraining.json"] == recipe
    assert runs["dense"].files["retraining.json"] == again["recipe"]


@pytest.mark.parametrize("late", [False, True])
def test_retraining_by_another_recipe_leaves_the_sweeps_figures_alone(tmp_path: Path, late: bool):
    sweeps = made_up_sweep.FINISHED
    place = len(sweeps) if late else len(made_up_sweep.SEARCHED)
    recipe = {**made_up_sweep.SPACE.as_dict()["retraining"], "epochs": 1}
    by_hand = made_up_sweep.retrained(made_up_sweep.LARGE, 1_000_000, 10, 0.5) | {"recipe": recipe}
    own = runs_of(sweeps, tmp_path)
    both = runs_of([*sweeps[:place], by_hand, *sweeps[place:]], tmp_path)
    assert last(both.all["sweep"]) == last(own.all["sweep"])
    assert both.all["sweep"].files["tickets.json"] == own.all["sweep"].files["tickets.json"]


def test_a_winner_that_was_drawn_anew_is_not_shown_among_the_retrained(tmp_path: Path):
    events = made_up_sweep.FINISHED
    anew = made_up_sweep.ticket(made_up_sweep.HIGH, "4" * 16, 0.5, 350_000, 0.9, epoch=10.0)
    runs = runs_of([*events, anew], tmp_path)
    shown = runs.all["sweep"].files["tickets.json"]
    place = shown["columns"].index("ticket")
    assert made_up_sweep.SMALL not in [row[place] for row in shown["data"]]
    assert made_up_sweep.SMALL not in [event["run"] for event in runs.candidates()]


def test_a_study_out_of_reach_costs_its_figures_alone(tmp_path: Path, monkeypatch, caplog):
    def figures(*_):
        raise InputError("optuna.storage", "postgresql://host/name", "cannot be used (no route)")

    monkeypatch.setattr("raytickets.study.figures", figures)
    runs = runs_of(proposed(), tmp_path).all
    assert "optuna.html" not in runs["sweep"].files
    assert "tickets.json" in runs["sweep"].files
    (line,) = caplog.messages
    assert line.startswith("Optuna's figures are left out: optuna.storage: ")


def test_retries_are_counted_and_their_reasons_shown(tmp_path: Path):
    low, id = made_up_sweep.LOW, made_up_sweep.LARGE
    reasons = ["its worker was killed", "it ran out of memory"]
    retries = [
        {"event": "retry", "trajectory": low, "attempt": attempt, "reason": reason}
        for attempt, reason in enumerate(reasons, 1)
    ]
    events = [
        made_up_sweep.OPENING,
        *retries,
        made_up_sweep.ticket(low, id, 0.3, 10, 0.9),
        {"event": "retry", "run": id, "attempt": 1, "reason": "rank 1 was lost"},
        {"event": "retry", "run": "dense", "attempt": 1, "reason": "rank 0 was lost"},
    ]
    runs = runs_of(events, tmp_path).all
    for key, lines in ((low, reasons), (id, ["rank 1 was lost"]), ("dense", ["rank 0 was lost"])):
        assert last(runs[key])["retries"] == len(lines)
        assert runs[key].tags["raytickets.retry_reasons"] == "\n".join(lines)
        assert runs[key].wanted == "RUNNING"


@pytest.mark.parametrize("ended", [False, True])
def test_what_begins_anew_is_shown_after_what_it_gave_up(tmp_path: Path, ended: bool):
    low, run = made_up_sweep.LOW, "dense"
    first, second = (made_up_sweep.check(low, n, {"0.3": 0.5}) for n in (1.0, 2.0))
    end = made_up_sweep.trajectory(low, "drawn", 10, {"0.3": "drawn"})
    anew = {"event": "retry", "attempt": 1, "reason": "other versions", "anew": True}
    epoch = made_up_sweep.epoch(run, 1)
    events = [made_up_sweep.OPENING, first, second, *[end] * ended]
    events += [anew | {"trajectory": low}, first, epoch, anew | {"run": run}, epoch]
    runs = runs_of(events, tmp_path).all
    shown = {(n, step) for name, n, step, _ in runs[low].metrics if name == "epoch"}
    assert shown == {(1.0, 2), (2.0, 4), (1.0, 6)}
    assert [place for name, _, _, place in runs[run].metrics if name == "loss"] == [0, 1]


def test_a_ticket_whose_proof_was_tried_again_has_ended(tmp_path: Path):
    retry = {"event": "retry", "run": made_up_sweep.SMALL, "attempt": 1, "reason": "lost"}
    events = list(made_up_sweep.SEARCHED)
    proved = next(place for place, event in enumerate(events) if event["event"] == "proof")
    run = runs_of([*events[:proved], retry], tmp_path).all[made_up_sweep.SMALL]
    assert run.wanted == "RUNNING"
    run = runs_of([*events[:proved], retry, *events[proved:]], tmp_path).all[made_up_sweep.SMALL]
    assert run.wanted == "FINISHED"


def test_what_had_no_end_when_the_sweep_ended_is_interrupted(tmp_path: Path):
    end: Event = {"event": "end", "state": "interrupted", "reason": "SIGTERM"}
    cut = [event for event in made_up_sweep.SEARCHED if event["event"] != "trajectory"][:7]
    runs = runs_of([*cut, end], tmp_path).all
    assert runs["sweep"].wanted == "KILLED"
    assert "**Interrupted**: SIGTERM" in runs["sweep"].tags["mlflow.note.content"]
    for key in (made_up_sweep.LOW, made_up_sweep.HIGH):
        assert runs[key].wanted == "KILLED"
        assert runs[key].tags["raytickets.state"] == "interrupted"
    runs = runs_of([*cut, end, *made_up_sweep.FINISHED[len(cut) :]], tmp_path).all
    assert {run.wanted for run in runs.values()} == {"FINISHED"}
    assert runs[made_up_sweep.LOW].tags["raytickets.state"] == "not converged"


def test_the_points_follow_from_the_journal_however_it_is_sent(tmp_path: Path):
    events = made_up_sweep.FINISHED
    at_once = runs_of(events, tmp_path).all
    runs = Runs(tmp_path, events[0], {})
    for event in events:
        runs.add(event)
        if event["event"] == "winners":
            runs.summarise()
    for key, run in runs.all.items():
        assert run.metrics == at_once[key].metrics
        assert len({metric[:3] for metric in run.metrics}) == len(run.metrics)


def test_a_retraining_by_hand_that_stops_is_killed_until_it_is_done(tmp_path: Path):
    epoch = made_up_sweep.epoch(made_up_sweep.LARGE, 1)
    stopped = {"event": "stopped", "run": made_up_sweep.LARGE, "reason": "interrupted"}
    again = made_up_sweep.retrained(made_up_sweep.LARGE, 10, 10, 0.9)
    events = [*made_up_sweep.FINISHED, epoch, stopped, epoch, again]
    for count, status in ((-3, "RUNNING"), (-2, "KILLED"), (None, "FINISHED")):
        runs = runs_of(events[:count], tmp_path).all
        assert runs[made_up_sweep.LARGE].wanted == status


def test_no_password_of_a_url_reaches_mlflow(tmp_path: Path):
    kept = "postgresql://me:${PASSWORD}@host/study"
    space = dataclasses.replace(
        PROPOSED,
        data=Data(source="folder", path="https://me:hidden@host/images?token=hidden"),
        network=Network(
            "mine:net", {"source": "s3://key:hid/den@bucket", "n": ["ftp://a:hidden@b?PWD=hidden"]}
        ),
        optuna=dataclasses.replace(PROPOSED.optuna, storage=kept),
    )
    opening = made_up_sweep.OPENING | {"space": space.as_dict()}
    runs = runs_of([opening, *proposed()[1:-1]], tmp_path).all
    for run in runs.values():
        told = str([run.params, run.tags, run.files.get("space.json")])
        assert "hid" not in told
    assert runs["sweep"].params["optuna.storage"] == kept
    assert runs["sweep"].params["network.options.source"] == "s3://key:***@bucket"
