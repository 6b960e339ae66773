"""Figures of a sweep, from plain numbers; the only module that draws."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from raytickets.config import StopRule
from raytickets.halving import pareto_front

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
COLORS = (BLUE, "#E69F00", GREEN, "#CC79A7", "#56B4E9", ORANGE, "#000000", "#8C6D31")
DISTANCE = {
    "corrected": "mask distance (1 = chance)",
    "paper": "mask distance (share of channels)",
    "epi": "mask distance (1 - EPI)",
}


def distance_curve(
    epochs: Sequence[float],
    distances: Mapping[str, Sequence[float | None]],
    draws: Mapping[str, float],
    stop_rule: StopRule,
) -> Figure:
    """Mask distance over the epochs: one line per prune ratio, each draw marked.

    `epochs` are those of the checks, as fractions; `distances` holds one value for each, None
    while the window fills; `draws` the epoch at which a ratio was drawn, for those that were.
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
    axes.set_xlim(0, 1.03 * max(epochs, default=1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title("How much the mask still changes", loc="left")
    return figure


def distance_matrix(
    epochs: Sequence[float],
    distances: Mapping[str, Sequence[Sequence[float]]],
    draws: Mapping[str, float],
    stop_rule: StopRule,
) -> Figure:
    """Distance between the masks of every two checks: one square for each prune ratio, the draw
    marked (You et al. 2020, figure 3).

    `epochs` are those of the checks, as fractions; `distances` maps a ratio to rows and columns in
    their order; `draws` gives the epoch at which a ratio was drawn, for those that were.
    """
    columns = 2 if len(distances) == 4 else min(len(distances), 3)
    rows = -(-len(distances) // columns)
    figure = _figure(3.0 * columns + 1.2, 3.0 * rows + 0.8)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    highest = 1.0 if stop_rule.rule == "corrected" else max(map(_highest, distances.values()))
    image = None
    for place, axes in enumerate(panels.flat):
        if place >= len(distances):
            axes.set_axis_off()
            continue
        ratio = list(distances)[place]
        values = np.array(distances[ratio])
        style: dict[str, Any] = {"cmap": "cividis", "vmin": 0, "vmax": highest or 1.0}
        image = axes.pcolormesh(epochs, epochs, values, shading="nearest", **style)
        drawn = draws.get(ratio)
        end = "not drawn" if drawn is None else f"drawn at epoch {drawn:g}"
        axes.set_title(f"prune ratio {ratio}, {end}", loc="left", fontsize=9)
        axes.set_aspect("equal")
        axes.tick_params(labelbottom=place + columns >= len(distances))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        if drawn is not None:
            axes.axvline(drawn, color="white", linewidth=1)
            axes.axhline(drawn, color="white", linewidth=1)
    panels[0, 0].invert_yaxis()  # All share it.
    if image is not None:
        extend = "max" if max(map(_highest, distances.values())) > highest else "neither"
        bar = figure.colorbar(image, ax=panels, shrink=0.85, extend=extend)
        bar.set_label(DISTANCE[stop_rule.rule])
    figure.supxlabel("epoch of one mask", fontsize=10)
    figure.supylabel("epoch of the other mask", fontsize=10)
    figure.suptitle("How much the masks of every two checks differ", x=0.01, ha="left")
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
    axes.margins(y=0.01)
    axes.set_xlabel("share of the dense network's channels that is kept")
    total, width = (sum(column) for column in zip(*kept.values(), strict=True))
    axes.set_title(f"{total} of {width} channels kept", loc="left")
    return figure


def accuracy_against_macs(
    tickets: Sequence[Mapping[str, Any]],
    front: Sequence[Mapping[str, Any]],
    dense: Mapping[str, Any],
    retrained: Mapping[str, Mapping[str, Any]],
) -> Figure:
    """What tickets keep of the accuracy for what share of the work.

    One panel for the last proofs of all tickets, hollow where that was before the last rung, with
    the Pareto front of the last rung (cheapest first); a second one, once anything is `retrained`,
    for the test accuracy of winners and of the dense network (`dense` among its keys). Takes
    tickets as `halving.proved` gives them, `retrained` events and the dense network's `macs`.
    """
    figure = _figure(11 if retrained else 6, 4.5)
    panels = figure.subplots(1, 2 if retrained else 1, squeeze=False)[0]
    panels[0].set_title("Every ticket, after its last proof (short fine-tune)", loc="left")
    panels[0].set_ylabel("validation accuracy")
    last = max((ticket["proof_rung"] for ticket in tickets), default=1)
    # Optuna may have proposed networks that are larger than the space's own.
    most = max([dense["macs"], *(ticket["macs"] for ticket in tickets)])
    for rung in range(1, last + 1):
        there = [ticket for ticket in tickets if ticket["proof_rung"] == rung]
        macs, accuracies = [t["macs"] for t in there], [t["proof_accuracy"] for t in there]
        label = "ticket" if last == 1 else f"ticket that reached rung {rung}"
        # The earlier a ticket was dropped, the lighter.
        shade = str(round(0.5 + 0.35 * (last - rung) / last, 2))
        face = shade if rung == last else "none"
        panels[0].scatter(macs, accuracies, facecolors=face, edgecolors=shade, label=label)
    x, y = [t["macs"] for t in front], [t["proof_accuracy"] for t in front]
    label = "Pareto front" if last == 1 else f"Pareto front of rung {last}"
    panels[0].plot(x, y, color=BLUE, marker="o", label=label)
    for ticket in front:
        at = ticket["macs"], ticket["proof_accuracy"]
        _name(panels[0], *at, _title(ticket), most)
    if retrained:
        titles = {ticket["ticket"]: _title(ticket) for ticket in tickets}
        panels[1].set_title("Winners, after full retraining", loc="left")
        panels[1].set_ylabel("test accuracy")
        by_macs = sorted(retrained.items(), key=lambda item: item[1]["macs"])
        for place, (run, event) in enumerate(by_macs):
            color, marker = (ORANGE, "D") if run == "dense" else (GREEN, "o")
            accuracy = event["test_accuracy"]
            panels[1].plot(event["macs"], accuracy, color=color, marker=marker, linestyle="none")
            if run == "dense":
                panels[1].axhline(accuracy, color=ORANGE, linestyle=":", linewidth=1)
            else:
                # Neighbours of the same accuracy: one label above, one below.
                _name(panels[1], event["macs"], accuracy, titles[run], most, place % 2)
    for axes in panels:
        axes.axvline(dense["macs"], color=ORANGE, linestyle="--", linewidth=1)
        bottom = axes.get_xaxis_transform()
        style = {"color": ORANGE, "fontsize": 8, "ha": "right", "rotation": 90}
        axes.text(0.99 * dense["macs"], 0.03, "dense network", transform=bottom, **style)
        axes.set_xlabel("multiply-accumulates for one image (MACs)")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlim(0, 1.1 * most)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.margins(y=0.15)
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(0.85, 0))
    return figure


METHODS = {
    "dense": (ORANGE, "D"),
    "early_bird": (BLUE, "o"),
    "early_bird_reinit": ("#56B4E9", "s"),
    "low_precision": ("#000000", "p"),
    "progressive": (GREEN, "^"),
    "iterative": ("#8C6D31", "v"),
    "lottery_ticket": ("#CC79A7", "P"),
    "snip": ("#E69F00", "*"),
    "random": (GREY, "X"),
}
"""A colour and a marker for each method of a comparison."""


def methods_against_macs(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Test accuracy against MACs: for each method and prune ratio the mean over seeds.

    Takes what `comparison.runs` gives: of each, `method`, `prune_ratio`, `seed`, `macs` and
    `test_accuracy`. Bars are one standard deviation; the dense network is a line too, and grey
    circles are the Pareto front of the means.
    """
    figure = _figure(9, 5)
    axes = figure.add_subplot()
    means: list[tuple[float, float]] = []
    places: dict[float, float] = {}
    highest: dict[float, float] = {}
    seeds: set[int] = set()
    for method, (color, marker) in METHODS.items():
        mine = [run for run in runs if run["method"] == method]
        if not mine:
            continue
        seeds |= {run["seed"] for run in mine}
        ratios = sorted({run["prune_ratio"] for run in mine})
        groups = [[run for run in mine if run["prune_ratio"] == ratio] for ratio in ratios]
        macs = [fmean(run["macs"] for run in group) for group in groups]
        accuracies = [fmean(run["test_accuracy"] for run in group) for group in groups]
        spreads = [
            stdev(run["test_accuracy"] for run in group) if len(group) > 1 else 0.0
            for group in groups
        ]
        means += zip(macs, accuracies, strict=True)
        axes.errorbar(
            macs,
            accuracies,
            spreads,
            color=color,
            marker=marker,
            markersize=9 if marker == "*" else 6,
            linewidth=0.8,
            linestyle={"dense": "--", "random": ":"}.get(method, "-"),
            elinewidth=1.2,
            capsize=3,
            label=method,
        )
        if method == "dense":
            axes.axhline(accuracies[0], color=color, linestyle="--", linewidth=1, zorder=0)
        for ratio, x, y, spread in zip(ratios, macs, accuracies, spreads, strict=True):
            if method == "early_bird":
                places[ratio] = x
            highest[ratio] = max(highest.get(ratio, 0.0), y + spread)
    for ratio, x in places.items():
        style = {"textcoords": "offset points", "fontsize": 8, "ha": "center", "color": "#444444"}
        axes.annotate(f"prune ratio {ratio:g}", (x, highest[ratio]), (0, 7), **style)
    front = [means[place] for place in pareto_front([a for _, a in means], [m for m, _ in means])]
    x, y = [macs for macs, _ in front], [accuracy for _, accuracy in front]
    style = {"color": "#D0D0D0", "marker": "o", "markersize": 15, "linestyle": "none", "zorder": -1}
    axes.plot(x, y, label="no other mean is better\nin both (Pareto front)", **style)
    axes.set_xlabel("multiply-accumulates for one image (MACs)")
    axes.set_ylabel("test accuracy")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.margins(y=0.12)
    mean = f"mean over {len(seeds)} seeds, bars of one standard deviation"
    order = ", ".join(f"{ratio:g}" for ratio in sorted(highest, reverse=True) if ratio)
    axes.set_title(
        f"{mean if len(seeds) > 1 else 'one seed'}\n"
        f"points of a method from left to right: prune ratio {order}",
        loc="left",
        fontsize=10,
    )
    figure.suptitle("Test accuracy against MACs, by method", x=0.01, ha="left")
    return figure


def page(figures: Mapping[str, Any]) -> str:
    """Plotly's figures below each other, with its code, so that they show without a network."""
    parts = [
        figure.to_html(full_html=False, include_plotlyjs=place == 0, default_height="480px")
        for place, figure in enumerate(figures.values())
    ]
    return "\n".join(["<!doctype html>", '<meta charset="utf-8">', *parts])


def _highest(rows: Sequence[Sequence[float]]) -> float:
    return max(max(row) for row in rows)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _title(ticket: Mapping[str, Any]) -> str:
    return f"ratio {ticket['prune_ratio']:g}, penalty {ticket['penalty']:g}"


def _name(axes: Axes, x: float, y: float, text: str, widest: float, above: int = 0) -> None:
    """Label a point on the side where there is room, and off a line that rises to the right."""
    right = x > 0.6 * widest
    up = 4 if right or above else -9
    side = {"ha": "right", "xytext": (-6, up)} if right else {"ha": "left", "xytext": (6, up)}
    axes.annotate(text, (x, y), textcoords="offset points", fontsize=8, **side)
