"""Figures of a sweep, from plain numbers; the only module that draws."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from raytickets.config import StopRule

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
COLORS = (BLUE, "#E69F00", GREEN, "#CC79A7", "#56B4E9", ORANGE, "#000000", "#8C6D31")
DISTANCE = {"corrected": "mask distance (1 = chance)", "paper": "mask distance (share of channels)"}


def distance_curve(
    epochs: Sequence[float],
    distances: Mapping[str, Sequence[float | None]],
    draws: Mapping[str, float],
    stop_rule: StopRule,
) -> Figure:
    """Mask distance over the epochs: one line per prune ratio, each draw marked.

    `distances` holds one value per epoch, None while the window fills; `draws` the epoch at
    which a ratio was drawn, for those that were.
    """
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    limit = stop_rule.limit
    label = f"drawn below {limit:g}"
    axes.axhline(limit, color=GREY, linestyle="--", label=label)
    for index, (ratio, values) in enumerate(distances.items()):
        points = [(e, v) for e, v in zip(epochs, values, strict=True) if v is not None]
        color = COLORS[index % len(COLORS)]
        label = f"prune ratio {ratio}" + ("" if ratio in draws else ", not drawn")
        x, y = [e for e, _ in points], [v for _, v in points]
        axes.plot(x, y, color=color, marker=".", label=label)
        drawn = [point for point in points if point[0] == draws.get(ratio)]
        for epoch, value in drawn:
            axes.plot(epoch, value, color=color, marker="*", markersize=16, linestyle="none")
    if draws:
        axes.plot([], [], color="black", marker="*", markersize=11, linestyle="none", label="draw")
    axes.set_xlabel("epoch")
    axes.set_ylabel(DISTANCE[stop_rule.rule])
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title("How much the mask still changes", loc="left")
    return figure


def kept_channels(kept: Mapping[str, Sequence[int]]) -> Figure:
    """Bars of how much of each channel group's width is kept; `kept` maps it to [kept, of]."""
    figure = _figure(7, 1.4 + 0.28 * len(kept))
    axes = figure.add_subplot()
    rows = range(len(kept))
    shares = [count / of for count, of in kept.values()]
    axes.barh(rows, [1.0] * len(kept), color="#E5E5E5")
    axes.barh(rows, shares, color=BLUE)
    for row, (count, of) in enumerate(kept.values()):
        axes.text(1.01, row, f"{count} of {of}", va="center", fontsize=8)
    names = [name if len(name) <= 40 else f"{name[:39]}…" for name in kept]
    axes.set_yticks(rows, names, fontsize=8)
    axes.set_ylabel("channel group")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("channels kept, of the dense network's")
    total = sum(count for count, _ in kept.values()), sum(of for _, of in kept.values())
    axes.set_title(f"{total[0]} of {total[1]} channels kept", loc="left")
    return figure


def accuracy_against_macs(
    tickets: Sequence[Mapping[str, Any]],
    dense: Mapping[str, Any],
    retrained: Mapping[str, Mapping[str, Any]],
) -> Figure:
    """What tickets keep of the accuracy for what share of the work.

    One panel for the proofs of all tickets, with their Pareto front; a second one, once anything
    is `retrained`, for the test accuracy of winners and of the dense network (`dense` among its
    keys). Takes `ticket` and `retrained` events and the dense network's `macs`.
    """
    figure = _figure(11 if retrained else 6, 4.5)
    panels = figure.subplots(1, 2 if retrained else 1, squeeze=False, sharex=True)[0]
    proofs = panels[0]
    proofs.set_title("Every ticket, after its proof (short fine-tune)", loc="left")
    proofs.set_ylabel("validation accuracy")
    points = [(ticket["macs"], ticket["proof_accuracy"]) for ticket in tickets]
    proofs.scatter(*zip(*points, strict=True), color=GREY, label="ticket") if points else None
    front = pareto_front(points)
    if front:
        x, y = zip(*front, strict=True)
        proofs.plot(x, y, color=BLUE, marker="o", label="Pareto front")
    for ticket in tickets:
        if (ticket["macs"], ticket["proof_accuracy"]) in front:
            _name(
                proofs, ticket["macs"], ticket["proof_accuracy"], f"ratio {ticket['prune_ratio']}"
            )
    if retrained:
        ratios = {ticket["ticket"]: ticket["prune_ratio"] for ticket in tickets}
        panels[1].set_title("Winners, after full retraining", loc="left")
        panels[1].set_ylabel("test accuracy")
        for run, event in retrained.items():
            is_dense = run == "dense"
            color, marker = (ORANGE, "D") if is_dense else (GREEN, "o")
            accuracy = event["test_accuracy"]
            panels[1].plot(event["macs"], accuracy, color=color, marker=marker, linestyle="none")
            text = "dense network" if is_dense else f"ratio {ratios.get(run, run)}"
            _name(panels[1], event["macs"], accuracy, text)
            if is_dense:
                panels[1].axhline(accuracy, color=ORANGE, linestyle=":", linewidth=1)
    for axes in panels:
        axes.axvline(
            dense["macs"], color=ORANGE, linestyle="--", linewidth=1, label="dense network"
        )
        axes.set_xlabel("multiply-accumulates for one image (MACs)")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlim(0, 1.12 * dense["macs"])
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        axes.margins(y=0.15)
        axes.grid(alpha=0.3)
    proofs.legend(frameon=False, loc="lower right")
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, accuracy) points that no cheaper or equally cheap one reaches, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _name(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
