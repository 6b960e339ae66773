"""What a person sees: live progress, and the tables at the end."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from raytickets.journal import Event
from raytickets.ticket import Ticket, kept_channels


class Progress:
    """Shows a sweep's events as they come: tables that update, or lines if it is no terminal."""

    def __init__(self, console: Console):
        self._console = console
        self._live = Live(console=console, refresh_per_second=4)
        self._status = console.status("checking space, data and network; starting Ray")
        self._trajectories: dict[str, dict[str, Any]] = {}
        self._retraining: dict[str, Event] = {}
        self._ratios: list[str] = []

    def __enter__(self) -> "Progress":
        self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.stop()
        self._live.stop()

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind == "sweep":
            space = event["space"]
            self._ratios = [f"{ratio:g}" for ratio in space["prune_ratios"]]
            self._epochs = space["training"]["epochs"]
            self._retraining_epochs = space["retraining"]["epochs"]
        elif kind in ("check", "ticket", "trajectory"):
            row = self._trajectories.setdefault(event["trajectory"], {"tickets": {}})
            if kind == "ticket":
                row["tickets"][f"{event['prune_ratio']:g}"] = event
            else:
                row[kind] = event
        elif kind in ("epoch", "retrained"):
            self._retraining[event["run"]] = self._retraining.get(event["run"], {}) | event
        if not self._console.is_terminal:
            if line := self._line(event):
                self._console.print(line, highlight=False, soft_wrap=True)
            return
        if self._trajectories or self._retraining:
            self._status.stop()
            self._live.start()
            self._live.update(self._tables())

    def _line(self, event: Event) -> str | None:
        match event["event"]:
            case "check":
                distances = "  ".join(f"{r}: {_distance(d)}" for r, d in event["distances"].items())
                return (
                    f"{event['trajectory']}  epoch {event['epoch']}/{self._epochs}"
                    f"  validation {event['validation_accuracy']:.1%}  distance {distances}"
                )
            case "ticket":
                return (
                    f"{event['trajectory']}  drew ticket {event['ticket']} at prune ratio"
                    f" {event['prune_ratio']:g}: proof {event['proof_accuracy']:.1%}"
                )
            case "trajectory":
                reason = f" ({event['reason']})" if event["reason"] else ""
                return f"{event['trajectory']}  {event['state']}{reason}"
            case "epoch":
                return (
                    f"retraining {event['run']}  epoch {event['epoch']}/{self._retraining_epochs}"
                    f"  validation {event['validation_accuracy']:.1%}"
                )
            case "retrained":
                return f"retraining {event['run']}  test {event['test_accuracy']:.1%}"
            case "owed":
                return event["reason"]
        return None

    def _tables(self) -> Group:
        search = Table(title="Trajectories: mask distance, or the ticket's proof accuracy")
        for name in ("penalty, seed", "epoch", "loss", "validation"):
            search.add_column(name, justify="right")
        for ratio in self._ratios:
            search.add_column(f"prune {ratio}", justify="right")
        search.add_column("state")
        for name, row in self._trajectories.items():
            check, ended = row.get("check"), row.get("trajectory")
            cells = [name, "", "", ""]
            if check is not None:
                cells[1:] = [
                    f"{check['epoch']}/{self._epochs}",
                    f"{check['loss']:.3f}",
                    f"{check['validation_accuracy']:.1%}",
                ]
            for ratio in self._ratios:
                ticket = row["tickets"].get(ratio)
                cells.append(
                    f"[green]{ticket['proof_accuracy']:.1%} @{ticket['draw_epoch']}[/]"
                    if ticket
                    else _distance(check["distances"][ratio] if check else None)
                )
            search.add_row(*cells, ended["state"] if ended else "training")
        if not self._retraining:
            return Group(search)
        retraining = Table(title="Retraining")
        for name in ("run", "epoch", "loss", "validation", "test"):
            retraining.add_column(name, justify="right")
        for run, event in self._retraining.items():
            retraining.add_row(
                run,
                f"{event['epoch']}/{self._retraining_epochs}",
                f"{event['loss']:.3f}",
                f"{event['validation_accuracy']:.1%}",
                f"{event['test_accuracy']:.1%}" if "test_accuracy" in event else "",
            )
        return Group(search, retraining)


def _distance(distance: float | None) -> str:
    return "-" if distance is None else f"{distance:.2f}"


def report_table(report: Mapping[str, Any]) -> Group:
    """A sweep's result: the dense reference and each winner, and what the search cost."""
    table = Table(title=f"{report['name']}: winners against the dense reference")
    table.add_column("network")
    for name in ("penalty", "prune ratio", "drawn", "test", "MACs", "params", "training MACs"):
        table.add_column(name, justify="right")
    dense = report["dense"]
    for row in [dense, *report["winners"]]:
        winner = row is not dense
        table.add_row(
            f"ticket {row['run']}" if winner else "dense",
            f"{row['penalty']:g}" if winner else "",
            f"{row['prune_ratio']:g}" if winner else "",
            f"epoch {row['draw_epoch']}" if winner else "",
            "not yet" if row["test_accuracy"] is None else f"{row['test_accuracy']:.2%}",
            _relative(row["macs"], dense["macs"]),
            _relative(row["params"], dense["params"]),
            "not yet" if row["relative_cost"] is None else f"{row['relative_cost']:.0%}",
        )
    tickets, trajectories = report["tickets"], report["trajectories"]
    lines = [
        "Training MACs are relative to the dense reference's; a winner's are its retraining and an"
        " equal share of the whole search.",
        f"{len(tickets)} tickets from {len(trajectories)} trajectories; sweep {report['state']}.",
    ]
    if report["sweep_cost"] is not None:
        lines[-1] += (
            f" Search and all winners' retraining together: {report['sweep_cost']:.0%} of one"
            " dense training."
        )
    for event in trajectories:
        left = [f"{ratio} {s}" for ratio, s in event["ratios"].items() if s != "drawn"]
        if left:
            reason = f" ({event['reason']})" if event["reason"] else ""
            lines.append(f"{event['trajectory']}: prune ratio {', '.join(left)}{reason}")
    return Group(table, *lines)


def _relative(value: int, dense: int) -> str:
    return f"{_short(value)} ({value / dense:.0%})"


def _short(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def ticket_table(ticket: Ticket) -> Group:
    """A ticket: how it was found, and the channels it keeps in each group."""
    manifest = ticket.manifest
    rule, draw = manifest["stop_rule"], manifest["draw"]
    facts = Table(title=f"Ticket {ticket.id}", show_header=False)
    options = "".join(f" {name}={value}" for name, value in manifest["network"]["options"].items())
    for name, value in (
        ("network", manifest["network"]["name"] + options),
        ("found in", manifest["space"]["name"]),
        ("penalty", f"{manifest['penalty']:g}"),
        ("prune ratio", f"{manifest['prune_ratio']:g}"),
        ("learning rate", f"{manifest['learning_rate']:g}"),
        ("seed", str(manifest["seed"])),
        ("drawn", f"epoch {draw['epoch']}, check {draw['check']}"),
        ("stop rule", f"{rule['rule']}, window {rule['window']}, threshold {rule['threshold']:g}"),
        ("distances", ", ".join(f"{distance:.3f}" for distance in rule["distances"])),
        ("floor acted on", ", ".join(manifest["min_channels"]["acted_on"]) or "no group"),
        ("MACs", f"{manifest['macs']:,}"),
        ("params", f"{manifest['params']:,}"),
        *manifest.get("retrained", {}).items(),
    ):
        facts.add_row(name, str(value))
    groups = Table(title="Kept channels")
    for name in ("group", "kept", "of", ""):
        groups.add_column(name, justify="left" if name in ("group", "") else "right")
    for name, (kept, width) in kept_channels(manifest).items():
        groups.add_row(name, str(kept), str(width), "█" * round(24 * kept / width))
    return Group(facts, groups)
