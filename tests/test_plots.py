import io
from typing import Any, get_args

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from raytickets.config import Method, StopRule
from raytickets.plots import (
    METHODS,
    accuracy_against_macs,
    distance_curve,
    distance_matrix,
    kept_channels,
    methods_against_macs,
)


def saved(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return buffer.getvalue()


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_distance_curve_marks_threshold_and_draws():
    distances = {"0.3": [None, 0.5, 0.15, 0.1], "0.7": [None, 0.9, 0.8, 0.7]}
    figure = distance_curve([1, 2, 3, 4], distances, {"0.3": 3}, StopRule())
    axes = figure.axes[0]
    assert axes.get_xlabel() == "epoch"
    assert axes.get_ylabel() == "mask distance (1 = chance)"
    lines = {str(line.get_label()): line for line in axes.lines}
    assert points(lines["prune ratio 0.3"]) == [(2, 0.5), (3, 0.15), (4, 0.1)]
    assert [y for _, y in points(lines["drawn below 0.2"])] == [0.2, 0.2]
    assert "prune ratio 0.7, not drawn" in lines
    stars = [points(line) for line in axes.lines if line.get_marker() == "*"]
    assert stars == [[(3, 0.15)], []]
    assert saved(figure).startswith(b"\x89PNG")


def test_distance_curve_has_a_point_for_every_check_within_an_epoch():
    epochs = [0.25, 0.5, 0.75, 1.0]
    stop_rule = StopRule(window=2, checks_per_epoch=4)
    figure = distance_curve(epochs, {"0.3": [None, 0.5, 0.2, 0.1]}, {"0.3": 0.75}, stop_rule)
    axes = figure.axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    assert points(lines["prune ratio 0.3"]) == [(0.5, 0.5), (0.75, 0.2), (1, 0.1)]
    assert [(0.75, 0.2)] in [points(line) for line in axes.lines if line.get_marker() == "*"]
    assert axes.get_xlim()[1] == pytest.approx(1, abs=0.05)
    assert saved(figure)


def test_distance_curve_of_the_paper_rule_and_before_the_window_fills():
    figure = distance_curve([1, 2], {"0.5": [None, None]}, {}, StopRule("paper"))
    assert figure.axes[0].get_ylabel() == "mask distance (share of channels)"
    assert "drawn below 0.1" in [line.get_label() for line in figure.axes[0].lines]
    assert saved(figure)


SETTLING = [[0, 0.9, 1.2], [0.9, 0, 0.1], [1.2, 0.1, 0]]


@pytest.mark.parametrize("ratios", [1, 2, 5])
def test_distance_matrix_has_a_square_for_every_ratio_with_its_draw(ratios: int):
    matrices = {f"{place / 10:g}": SETTLING for place in range(1, ratios + 1)}
    figure = distance_matrix([1, 2, 3], matrices, {"0.1": 3}, StopRule())
    panels = [axes for axes in figure.axes if axes.collections and axes.get_title(loc="left")]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles[0] == "prune ratio 0.1, drawn at epoch 3"
    assert titles[1:] == [f"prune ratio {ratio}, not drawn" for ratio in list(matrices)[1:]]
    colors = np.asarray(panels[0].collections[0].get_array()).reshape(3, 3)
    assert colors.tolist() == SETTLING
    across, down = panels[0].lines
    assert (points(across)[0][0], points(down)[0][1]) == (3, 3)
    top, bottom = panels[0].get_ylim()[::-1]
    assert top < bottom
    assert "mask distance (1 = chance)" in [axes.get_ylabel() for axes in figure.axes]
    assert saved(figure).startswith(b"\x89PNG")


def test_distance_matrix_colours_chance_alike_in_every_figure():
    for highest in (0.3, 2.5):
        figure = distance_matrix([1, 2], {"0.5": [[0, highest], [highest, 0]]}, {}, StopRule())
        assert figure.axes[0].collections[0].get_clim() == (0, 1)
    figure = distance_matrix([1, 2], {"0.5": [[0, 0.3], [0.3, 0]]}, {}, StopRule("paper"))
    assert figure.axes[0].collections[0].get_clim() == (0, 0.3)


@pytest.mark.parametrize("groups", [1, 60])
def test_kept_channels_shows_every_group(groups: int):
    kept = {f"layer{index}.bn" + "x" * 60: (index % 8 + 1, 16) for index in range(groups)}
    figure = kept_channels(kept)
    assert len(figure.axes[0].patches) == 2 * groups
    assert texts(figure)[0] == "1 of 16"
    assert max(len(label.get_text()) for label in figure.axes[0].get_yticklabels()) <= 40
    assert saved(figure)


def ticket(key: str, ratio: float, macs: int, accuracy: float, rung: int = 1) -> dict[str, Any]:
    found = {"ticket": key, "penalty": 1e-3, "prune_ratio": ratio, "macs": macs}
    return found | {"proof_accuracy": accuracy, "proof_rung": rung}


TICKETS = [
    ticket("a", 0.3, 490_000, 0.90),
    ticket("b", 0.5, 250_000, 0.88),
    ticket("c", 0.5, 260_000, 0.80),
]
FRONT = [TICKETS[1], TICKETS[0]]


def markers(axes: Axes) -> dict[str, tuple[list[tuple[float, float]], bool]]:
    """The scattered points by their label, and whether they are filled."""
    return {
        str(dots.get_label()): (
            [(float(x), float(y)) for x, y in np.asarray(dots.get_offsets())],
            len(np.asarray(dots.get_facecolor())) > 0,
        )
        for dots in axes.collections
    }


def test_accuracy_against_macs_before_retraining():
    figure = accuracy_against_macs(TICKETS, FRONT, {"macs": 1_000_000}, {})
    (axes,) = figure.axes
    assert axes.get_ylabel() == "validation accuracy"
    assert "multiply-accumulates" in axes.get_xlabel()
    drawn = [(490_000, 0.90), (250_000, 0.88), (260_000, 0.80)]
    assert markers(axes) == {"ticket": (drawn, True)}
    front, dense = axes.lines
    assert front.get_label() == "Pareto front"
    assert [x for x, _ in points(front)] == [250_000, 490_000]
    assert [x for x, _ in points(dense)] == [1_000_000, 1_000_000]
    named = ["ratio 0.5, penalty 0.001", "ratio 0.3, penalty 0.001", "dense network"]
    assert texts(figure) == named
    assert saved(figure)


def test_accuracy_against_macs_tells_the_rungs_that_tickets_reached_apart():
    tickets = [
        ticket("a", 0.3, 490_000, 0.93, rung=3),
        ticket("b", 0.5, 250_000, 0.88, rung=2),
        ticket("c", 0.7, 100_000, 0.70),
        ticket("d", 0.7, 110_000, 0.69),
    ]
    figure = accuracy_against_macs(tickets, [tickets[0]], {"macs": 1_000_000}, {})
    (axes,) = figure.axes
    assert markers(axes) == {
        "ticket that reached rung 1": ([(100_000, 0.70), (110_000, 0.69)], False),
        "ticket that reached rung 2": ([(250_000, 0.88)], False),
        "ticket that reached rung 3": ([(490_000, 0.93)], True),
    }
    shades = [float(np.asarray(dots.get_edgecolor())[0, 0]) for dots in axes.collections]
    assert shades == sorted(set(shades), reverse=True)
    legend = axes.get_legend()
    assert legend is not None
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [*markers(axes), "Pareto front of rung 3"]
    assert saved(figure)


def test_accuracy_against_macs_shows_tickets_that_are_larger_than_the_dense_network():
    tickets = [ticket("a", 0.3, 2_000_000, 0.93)]
    figure = accuracy_against_macs(tickets, tickets, {"macs": 1_000_000}, {})
    assert figure.axes[0].get_xlim() == (0, 2_200_000)


def test_accuracy_against_macs_after_retraining():
    retrained = {
        "a": {"macs": 490_000, "test_accuracy": 0.95},
        "dense": {"macs": 1_000_000, "test_accuracy": 0.96},
    }
    figure = accuracy_against_macs(TICKETS, FRONT, {"macs": 1_000_000}, retrained)
    assert [axes.get_ylabel() for axes in figure.axes] == ["validation accuracy", "test accuracy"]
    winners = figure.axes[1]
    assert [text.get_text() for text in winners.texts] == [
        "ratio 0.3, penalty 0.001",
        "dense network",
    ]
    assert points(winners.lines[0]) == [(490_000, 0.95)]
    assert saved(figure)


def compared(method: str, ratio: float, accuracies: list[float], macs: int) -> list[dict[str, Any]]:
    return [
        {"method": method, "prune_ratio": ratio, "seed": seed, "macs": macs, "test_accuracy": value}
        for seed, value in enumerate(accuracies)
    ]


def test_methods_against_macs_shows_means_spread_and_front():
    runs = [
        *compared("dense", 0.0, [0.9, 0.92], 1_000_000),
        *compared("early_bird", 0.5, [0.9, 0.91], 300_000),
        *compared("early_bird", 0.3, [0.92, 0.94], 500_000),
        *compared("random", 0.3, [0.8], 500_000),
    ]
    figure = methods_against_macs(runs)
    (axes,) = figure.axes
    shown = {str(bars.get_label()): bars for bars in axes.containers}
    assert list(shown) == ["dense", "early_bird", "random"]
    assert points(shown["early_bird"].lines[0]) == [
        (500_000, pytest.approx(0.93)),
        (300_000, pytest.approx(0.905)),
    ]
    ends = np.asarray(shown["early_bird"].lines[2][0].get_segments())[0][:, 1]
    assert ends == pytest.approx([0.93 - 0.02 / 2**0.5, 0.93 + 0.02 / 2**0.5])
    front = [line for line in axes.lines if "Pareto" in str(line.get_label())]
    assert [x for x, _ in points(front[0])] == [300_000, 500_000]
    assert texts(figure) == ["prune ratio 0.3", "prune ratio 0.5"]
    assert axes.get_title(loc="left").split("\n") == [
        "mean over 2 seeds, bars of one standard deviation",
        "points of a method from left to right: prune ratio 0.5, 0.3",
    ]
    assert saved(figure)


def test_every_method_looks_different():
    assert set(METHODS) == set(get_args(Method))
    assert len(set(METHODS.values())) == len({color for color, _ in METHODS.values()}) == 9
    assert len({marker for _, marker in METHODS.values()}) == 9
