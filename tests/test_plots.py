import io

import pytest
from matplotlib.figure import Figure

from raytickets.config import StopRule
from raytickets.plots import accuracy_against_macs, distance_curve, kept_channels, pareto_front


def saved(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return buffer.getvalue()


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_distance_curve_marks_threshold_and_draws():
    distances = {"0.3": [None, 0.5, 0.15, 0.1], "0.7": [None, 0.9, 0.8, 0.7]}
    figure = distance_curve([1, 2, 3, 4], distances, {"0.3": 3}, StopRule())
    axes = figure.axes[0]
    assert axes.get_xlabel() == "epoch"
    assert axes.get_ylabel() == "mask distance (1 = chance)"
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(lines["prune ratio 0.3"].get_xdata()) == [2, 3, 4]
    assert list(lines["drawn below 0.2"].get_ydata()) == [0.2, 0.2]
    assert "prune ratio 0.7, not drawn" in lines
    stars = [line for line in axes.lines if line.get_marker() == "*" and len(line.get_xdata())]
    assert [(s.get_xdata()[0], s.get_ydata()[0]) for s in stars] == [(3, 0.15)]
    assert saved(figure).startswith(b"\x89PNG")


def test_distance_curve_of_the_paper_rule_and_before_the_window_fills():
    figure = distance_curve([1, 2], {"0.5": [None, None]}, {}, StopRule("paper"))
    assert figure.axes[0].get_ylabel() == "mask distance (share of channels)"
    assert "drawn below 0.1" in [line.get_label() for line in figure.axes[0].lines]
    assert saved(figure)


@pytest.mark.parametrize("groups", [1, 60])
def test_kept_channels_shows_every_group(groups: int):
    kept = {f"layer{index}.bn" + "x" * 60: (index % 8 + 1, 16) for index in range(groups)}
    figure = kept_channels(kept)
    assert len(figure.axes[0].patches) == 2 * groups
    assert texts(figure)[0] == "1 of 16"
    assert max(len(label.get_text()) for label in figure.axes[0].get_yticklabels()) <= 40
    assert saved(figure)


def ticket(key: str, ratio: float, macs: int, accuracy: float) -> dict:
    return {"ticket": key, "prune_ratio": ratio, "macs": macs, "proof_accuracy": accuracy}


TICKETS = [
    ticket("a", 0.3, 490_000, 0.90),
    ticket("b", 0.5, 250_000, 0.88),
    ticket("c", 0.5, 260_000, 0.80),
]


def test_accuracy_against_macs_before_retraining():
    figure = accuracy_against_macs(TICKETS, {"macs": 1_000_000}, {})
    (axes,) = figure.axes
    assert axes.get_ylabel() == "validation accuracy"
    assert "multiply-accumulates" in axes.get_xlabel()
    front = next(line for line in axes.lines if line.get_label() == "Pareto front")
    assert list(front.get_xdata()) == [250_000, 490_000]
    dense = next(line for line in axes.lines if line.get_label() == "dense network")
    assert list(dense.get_xdata()) == [1_000_000, 1_000_000]
    assert sorted(texts(figure)) == ["ratio 0.3", "ratio 0.5"]
    assert saved(figure)


def test_accuracy_against_macs_after_retraining():
    retrained = {
        "a": {"macs": 490_000, "test_accuracy": 0.95},
        "dense": {"macs": 1_000_000, "test_accuracy": 0.96},
    }
    figure = accuracy_against_macs(TICKETS, {"macs": 1_000_000}, retrained)
    assert [axes.get_ylabel() for axes in figure.axes] == ["validation accuracy", "test accuracy"]
    assert texts(figure)[-2:] == ["ratio 0.3", "dense network"]
    assert saved(figure)


def test_pareto_front():
    assert pareto_front([(3, 0.9), (1, 0.5), (2, 0.4), (1, 0.6), (4, 0.9)]) == [(1, 0.6), (3, 0.9)]
    assert pareto_front([]) == []
