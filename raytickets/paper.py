"""What You et al. published, to be set beside a comparison of ours, and never mixed with it.

Drawing Early-Bird Tickets: Towards More Efficient Training of Deep Networks, ICLR 2020,
arXiv 1909.11957. The numbers are those of the tables and the figure that the authors' repository
shows (GATECH-EIC/Early-Bird-Tickets, folder `assets`). The paper's FLOPs and energies are of other
hardware, batch sizes and ways to count, so that they only compare with each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytickets.config import InputError, Method


@dataclass(frozen=True)
class Row:
    """One published number, and what else was published with it."""

    name: str
    """As the paper calls the method."""
    method: Method | None
    """What `raytickets compare` has that does the same, if anything."""
    prune_ratio: float
    accuracy: float
    """On test images, in percent; the first guess counts."""
    flops: float | None = None
    """Of all training, in 10^15."""
    kilojoules: float | None = None
    """Of all training."""


@dataclass(frozen=True)
class Published:
    """One table or figure for one network and data set."""

    network: str
    options: Mapping[str, Any]
    """The options that make it the published one; an option that is left out is."""
    data: str
    place: str
    """Where it was published."""
    note: str
    within: float
    """How far, in points, accuracies may be off for having been read off a figure; else 0."""
    rows: tuple[Row, ...]


def _table2() -> tuple[Row, ...]:
    ratios, unit = (0.1, 0.3, 0.5), 0.05
    methods: dict[str, tuple[Method | None, str]] = {
        "LT (one-shot)": ("lottery_ticket", "72.62 741.2/605 71.31 741.2/605 70.96 741.2/605"),
        "SNIP": ("snip", "71.55 370.6/302 70.83 370.6/302 70.35 370.6/302"),
        "NS": ("progressive", "71.24 636.5/586 71.28 592.3/542 69.74 567.8/480"),
        "ThiNet": (None, "70.83 632.2/547 69.57 568.5/451 67.22 381.4/379"),
        "EB Train (re-init)": (
            "early_bird_reinit",
            "71.65 345.3/326 71.48 300.0/273 69.66 246.8/212",
        ),
        "EB Train": ("early_bird", "71.81 287.7/282 72.17 262.2/243 71.28 221.7/197"),
        "EB Train (LF)": ("low_precision", "71.60 270.5/277 71.50 262.7/252 70.27 208.7/194"),
        "EB Train (LL)": (None, "71.34 54.6/277 70.53 64.4/252 69.91 44.4/194"),
    }
    rows = []
    for name, (method, numbers) in methods.items():
        words = numbers.split()
        for ratio, accuracy, costs in zip(ratios, words[::2], words[1::2], strict=True):
            kilojoules, flops = map(float, costs.split("/"))
            rows.append(Row(name, method, ratio, float(accuracy), unit * flops, kilojoules))
    return tuple(sorted(rows, key=lambda row: row.prune_ratio))


def _panel(dense: float, early: tuple[float, ...], late: tuple[float, ...]) -> tuple[Row, ...]:
    """A panel of the figure: accuracies at its prune ratios of 30, 50 and 70 percent."""
    rows = [Row("unpruned", "dense", 0.0, dense)]
    for ratio, first, last in zip((0.3, 0.5, 0.7), early, late, strict=True):
        rows.append(Row("drawn at epoch 20", "early_bird", ratio, first))
        rows.append(Row("drawn at epoch 160", "progressive", ratio, last))
    return tuple(rows)


_FIGURE = "the figure of retraining accuracy against the epoch of the draw (eb-retrain.png)"
_FIGURE_NOTE = "Trained for 160 epochs. The figure has neither FLOPs nor energies."

PUBLISHED = (
    Published(
        "cifar_vgg",
        {"depth": 16, "width": 1.0},
        "cifar100",
        "Table 2 (vgg-result.png)",
        "LF searches in 8 bits, where low_precision has bfloat16, and retrains in full precision;"
        " LL retrains in 8 bits too. There is no row of the dense network.",
        0.0,
        _table2(),
    ),
    Published(
        "resnet18",
        {},
        "imagenet",
        "Table 3 (resnet18-result.png)",
        "Energies were not published for it.",
        0.0,
        (
            Row("Unpruned", "dense", 0.0, 69.57, 1259.13),
            Row("Network Slimming", "progressive", 0.1, 69.65, 2424.86),
            Row("EB Train", "early_bird", 0.1, 69.84, 1177.15),
            Row("Network Slimming", "progressive", 0.3, 67.85, 2168.89),
            Row("SFP", None, 0.3, 67.10, 1991.94),
            Row("EB Train", "early_bird", 0.3, 68.28, 952.46),
        ),
    ),
    Published(
        "cifar_preresnet",
        {"depth": 101, "width": 16},
        "cifar10",
        _FIGURE,
        _FIGURE_NOTE,
        0.2,
        _panel(93.6, (93.8, 93.5, 92.5), (93.6, 93.4, 92.9)),
    ),
    Published(
        "cifar_vgg",
        {"depth": 16, "width": 1.0},
        "cifar10",
        _FIGURE,
        _FIGURE_NOTE,
        0.2,
        _panel(93.4, (93.3, 93.2, 93.0), (93.2, 93.1, 93.0)),
    ),
)
"""In the order they are shown."""


def published_for(report: Mapping[str, Any]) -> list[Published]:
    """What was published of a comparison's network and data set, at one of its prune ratios.

    `report` is that of `raytickets.comparison`. A folder counts as the data set that the space is
    named after, as in `cifar10_vgg16`; images that were left out by `data.limit` do not. Raises
    InputError if there is nothing.
    """
    network, data = report["network"], report["data"]
    here = [
        published
        for published in PUBLISHED
        if network["name"] == published.network
        and all(network["options"].get(k, v) == v for k, v in published.options.items())
        and data["limit"] is None
        and published.data in (data["source"], report["space"].split("_")[0])
    ]
    ratios = {row.prune_ratio for published in here for row in published.rows}
    if not ratios & set(report["prune_ratios"]):
        allowed = "the paper has nothing at these prune ratios" if here else _UNKNOWN
        raise InputError("name", report["name"], allowed)
    return here


_UNKNOWN = (
    "the paper has nothing for its network and data: that takes all images of CIFAR-10 or CIFAR-100"
    " on VGG16, CIFAR-10 on PreResNet-101 or ImageNet on ResNet-18"
)


def relative_flops(published: Published, row: Row) -> float | None:
    """What it cost relative to the progressive method at the same prune ratio."""
    for other in published.rows:
        if (other.method, other.prune_ratio) == ("progressive", row.prune_ratio):
            return row.flops / other.flops if row.flops and other.flops else None
    return None


def ours(report: Mapping[str, Any], row: Row) -> Mapping[str, Any] | None:
    """The line of the comparison's table for the same method and prune ratio, if it has one."""
    for line in report["table"]:
        if row.method and (line["method"], line["prune_ratio"]) == (row.method, row.prune_ratio):
            return line
    return None
