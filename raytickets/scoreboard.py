"""What a person sees of a comparison: live progress, the table at the end, the paper's numbers."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from raytickets import paper
from raytickets.comparison import source_count
from raytickets.config import SearchSpace
from raytickets.console import (
    Display,
    distance_text,
    epoch_text,
    lost_lines,
    plain_table,
    report_table,
    retry_line,
    short_text,
)
from raytickets.journal import Event

Row = Mapping[str, Any]


_UNDER_RATIOS = (
    "Under each prune ratio: the mask distance until a ticket is drawn, then the epoch of the draw."
)


class Scoreboard(Display):
    """The display of a comparison; `opening` is its first event."""

    def __init__(self, console: Console, opening: Event):
        super().__init__(console, SearchSpace.from_dict(opening["space"]))
        self._opening = opening

    def _line(self, event: Event) -> str | None:
        if event["event"] == "ticket":
            return f"{event['trajectory']}  found {self._name(event['ticket'])}"
        return super()._line(event)

    def _name(self, run: str) -> str:
        event = self._tickets[run]
        ratio = f" at prune ratio {event['prune_ratio']:g}" if event["prune_ratio"] else ""
        return f"{event['method']}{ratio}, seed {event['seed']}"

    def _tables(self) -> list[RenderableType]:
        tables: list[RenderableType] = [self._searches()] if self._rows else []
        running = {id: e for id, e in self._retraining.items() if "test_accuracy" not in e}
        if running:
            tables += [self._running(running), ""]
        if len(running) < len(self._retraining):
            tables.append(self._standings())
        return tables

    def _searches(self) -> Group:
        ratios = [f"{ratio:g}" for ratio in self._opening["prune_ratios"]]
        headers = ["source", "epoch", "validation", *(f"prune\n{ratio}" for ratio in ratios)]
        table = plain_table("Search for tickets", headers, right=headers[1:])
        running = {k: v for k, v in self._rows.items() if "trajectory" not in v}
        failed = [
            source["trajectory"]
            for source in self._rows.values()
            if source.get("trajectory", {}).get("state") in ("failed", "diverged")
        ]
        for name, source in running.items():
            check = source["check"]
            drawn = {
                f"{ticket['prune_ratio']:g}": ticket["draw_epoch"]
                for ticket in self._tickets.values()
                if ticket["trajectory"] == name and ticket["draw_epoch"] is not None
            }
            accuracy = source.get("validation_accuracy")
            cells = [
                f"[green]@{epoch_text(drawn[ratio])}[/]"
                if ratio in drawn
                else distance_text(check["distances"].get(ratio))
                for ratio in ratios
            ]
            shown = "-" if accuracy is None else f"{accuracy:.1%}"
            table.add_row(name, epoch_text(check["epoch"]), shown, *cells)
        parts: list[RenderableType] = [table, Text(_UNDER_RATIOS)] if running else []
        ended, planned = len(self._rows) - len(running), source_count(self._opening)
        parts.append(Text(f"{ended} of {planned} sources of tickets have ended."))
        parts += [Text(f"{e['trajectory']} {e['state']}: {e['reason']}") for e in failed]
        parts += [Text(retry_line(event)) for event in self._retries.values()]
        return Group(*parts, "")

    def _running(self, running: Mapping[str, Event]) -> Table:
        headers = ["retraining", "prune", "seed", "epoch", "loss", "validation"]
        table = plain_table("", headers, right=headers[1:])
        for id, event in running.items():
            ticket = self._tickets[id]
            table.add_row(
                ticket["method"],
                f"{ticket['prune_ratio']:g}",
                str(ticket["seed"]),
                f"{event['epoch']}/{self._space.retraining.epochs}",
                f"{event['loss']:.3f}",
                f"{event['validation_accuracy']:.1%}",
            )
        return table

    def _standings(self) -> Group:
        done = [
            (self._tickets[id], event["test_accuracy"])
            for id, event in self._retraining.items()
            if "test_accuracy" in event
        ]
        ratios = (0.0, *self._opening["prune_ratios"])
        headers = ["retrained", "dense", *(f"prune\n{ratio:g}" for ratio in ratios[1:])]
        table = plain_table("", headers, right=headers[1:])
        for method in self._opening["methods"]:
            cells = []
            for ratio in ratios:
                tests = [
                    accuracy
                    for ticket, accuracy in done
                    if (ticket["method"], ticket["prune_ratio"]) == (method, ratio)
                ]
                cells.append(f"{fmean(tests):.1%} ({len(tests)})" if tests else "")
            if any(cells):
                table.add_row(method, *cells)
        note = (
            f"Mean test accuracy (seeds so far). {len(done)} of the {len(self._tickets)} tickets"
            " found so far are retrained."
        )
        return Group(table, Text(note))


def table_of(report: Row) -> Group:
    """The table of a sweep's report, or of a comparison's."""
    return comparison_table(report) if report["kind"] == "comparison" else report_table(report)


def comparison_table(report: Row) -> Group:
    """A comparison's result: accuracy, size and cost of every method, and what may be claimed."""
    energies = dict.fromkeys(row["energy"] for row in report["table"] if row["energy"])
    parts: list[RenderableType] = [_results(report), "", _legend(), "", *_spending(report), ""]
    parts.append(Text(f"Energy: {'; '.join(energies) or 'not known yet'}."))
    parts += [Text(_SHARED)] if any("measured" in energy for energy in energies) else []
    parts.append("")
    for against in dict.fromkeys(claim["against"] for claim in report["claims"]):
        parts.append(Text(f"Does an early-bird ticket beat {against}?", style="bold"))
        parts += [
            Text(claim["sentence"]) for claim in report["claims"] if claim["against"] == against
        ]
        parts.append("")
    if report["claims"]:
        parts.append(Text(_TESTS.format(len(report["claims"]))))
    parts += map(Text, _missing(report))
    return Group(*parts)


_LEGEND = {
    "n": "seeds that it was retrained with",
    "test": "accuracy on the test images, % (mean ± standard deviation over seeds)",
    "MACs": "of one image forward, % of the dense network's; the same for params",
    "latency": "of one image on this machine, % of the dense network's",
    "drawn": "epoch of the draw, % of the epochs of retraining",
    "cost": "counted MACs of all training, search and retraining, that this ticket alone takes,"
    " % of what dense and progressive take",
    "-": "not known, or nothing to compare with",
}

_SHARED = (
    "What is measured is all that the device used meanwhile: of trials that share one, each counts"
    " the others' too."
)

_TESTS = (
    "points: percentage points of test accuracy. Each of these {} sentences is a paired t test of"
    " its own over seeds, at the 5 % level: of 20 tests of methods that are equal, one on average"
    " finds a difference."
)


def _results(report: Row) -> Table:
    costs = ["cost,\ndense", "cost,\nprogr."]
    headers = ["method", "n", "test", "MACs", "params", "latency", "drawn", *costs]
    table = plain_table(_title(report), headers, right=headers[1:])
    for row in _sections(table, report["table"]):
        table.add_row(
            row["method"],
            str(row["n"]),
            accuracy_text(row),
            *(
                _percent(row[key])
                for key in (
                    "relative_macs",
                    "relative_params",
                    "relative_latency",
                    "draw_share",
                    "macs_to_dense",
                    "macs_to_progressive",
                )
            ),
        )
    return table


def _spending(report: Row) -> list[RenderableType]:
    """Seconds and, if it is known of anything, energy."""
    watched = any(row["total_joules"] is not None for row in report["table"])
    costs = {"seconds": "s"} | ({"joules": "J"} if watched else {})
    headers = ["method"]
    for unit in costs.values():
        headers += [unit, f"{unit},\ndense", f"{unit},\nprogr."]
    what = "Time and energy" if watched else "Time"
    title = f"{what} of all training, on this machine; % as for the cost above"
    table = plain_table("", headers, right=headers[1:])
    for row in _sections(table, report["table"]):
        cells = []
        for cost in costs:
            spent = row[f"total_{cost}"]
            cells += [
                "-" if spent is None else short_text(spent),
                _percent(row[f"{cost}_to_dense"]),
                _percent(row[f"{cost}_to_progressive"]),
            ]
        table.add_row(row["method"], *cells)
    return [Text(title, style="bold"), table]


def _sections(table: Table, rows: Iterable[Row]) -> Iterable[Row]:
    """The rows, with a line in the table before those of each prune ratio."""
    ratio = 0.0
    for row in rows:
        if row["prune_ratio"] != ratio:
            ratio = row["prune_ratio"]
            table.add_row()
            table.add_row(f"[bold]prune ratio {ratio:g}[/]")
        yield row


def _title(report: Row) -> str:
    return (
        f"{report['name']}: {report['state']}, penalty {report['penalty']:g},"
        f" {len(report['seeds'])} seeds, {report['epochs']} epochs of retraining"
    )


def accuracy_text(row: Row) -> str:
    """98.74±0.13, in percent."""
    if row["test_accuracy"] is None:
        return "-"
    spread = row["test_accuracy_std"]
    return f"{100 * row['test_accuracy']:.2f}" + (
        f"±{100 * spread:.2f}" if spread is not None else ""
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _legend() -> Table:
    legend = Table.grid(padding=(0, 2, 0, 0))
    for header, meaning in _LEGEND.items():
        legend.add_row(header, meaning)
    return legend


def _missing(report: Row) -> list[str]:
    """What is not in the table, and why."""
    lines = [""]
    for row in report["table"]:
        name = f"{row['method']}, prune ratio {row['prune_ratio']:g}"
        planned = len(report["seeds"])
        if row["not_drawn"]:
            lines.append(f"{name}: {row['not_drawn']} of {planned} seeds did not draw a ticket.")
        if owed := planned - row["n"] - row["not_drawn"]:
            lines.append(f"{name}: {owed} of {planned} seeds are not done.")
    lines += lost_lines(report)
    return [*lines, *(f"Failed: {reason}" for reason in report["failures"])]


def paper_table(published: Sequence[paper.Published], report: Row | None = None) -> Group:
    """The paper's numbers, with a comparison's own beside them if one is given."""
    parts: list[RenderableType] = [Text(_PAPER), ""]
    for part in published:
        parts += [*_published(part, report), ""]
    if report is not None:
        parts.append(Text(_OURS.format(report["name"])))
    return Group(*parts)


_PAPER = (
    "Published by You et al., Drawing Early-Bird Tickets, ICLR 2020, arXiv 1909.11957; as shown in"
    " the authors' repository. Accuracies are top-1 on test images in %; FLOPs (10^15) and kJ are"
    " of all training, search included; % is relative to the progressive method (Network Slimming)"
    " at the same prune ratio."
)

_OURS = (
    "ours: the comparison {}; its test accuracy (mean ± standard deviation over n seeds) and the"
    " MACs of all training relative to its own progressive. Recipes, data splits and hardware are"
    " not the paper's: read down a column, not across."
)


def _published(part: paper.Published, report: Row | None) -> list[RenderableType]:
    title = f"{_NETWORKS[part.network]} on {_DATA[part.data]}: {part.place}"
    paid = any(row.flops for row in part.rows)
    watched = any(row.kilojoules for row in part.rows)
    headers = ["prune", "paper", "test"] + ["FLOPs", "%"] * paid + ["kJ"] * watched
    headers += ["ours", "n", "ours:\ntest", "ours:\nMACs %"] if report else ["raytickets"]
    table = plain_table("", headers, right=[h for h in headers if h not in _NAMES])
    about = "~" if part.within else ""
    for row in part.rows:
        relative = paper.relative_flops(part, row)
        cells = [f"{row.prune_ratio:g}" if row.prune_ratio else "", row.name]
        cells.append(f"{about}{row.accuracy:.{1 if part.within else 2}f}")
        if paid:
            cells += ["-" if row.flops is None else f"{row.flops:.2f}", _percent(relative)]
        if watched:
            cells.append("-" if row.kilojoules is None else f"{row.kilojoules:.1f}")
        cells.append(row.method or "-")
        if report:
            mine = paper.ours(report, row)
            cells += (
                [str(mine["n"]), accuracy_text(mine), _percent(mine["macs_to_progressive"])]
                if mine
                else ["-"] * 3
            )
        table.add_row(*cells)
    read = f"Read off a figure: accuracies are within {part.within} points. " if part.within else ""
    return [Text(title, style="bold"), table, Text(read + part.note)]


_NAMES = ("paper", "ours", "raytickets")
_NETWORKS = {
    "cifar_vgg": "VGG16",
    "cifar_preresnet": "PreResNet-101",
    "resnet18": "ResNet-18",
}
_DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet"}
