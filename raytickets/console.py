"""What a person sees: live progress, and the tables at the end."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from raytickets.config import SearchSpace
from raytickets.history import Best, Row
from raytickets.journal import Event
from raytickets.ticket import Ticket, kept_channels


class Display:
    """Shows events as they come: tables that update, or lines if it is no terminal."""

    _budget = ""
    """What follows the epoch of a check."""

    def __init__(self, console: Console, space: SearchSpace):
        self._console, self._space = console, space
        self._live = Live(console=console, refresh_per_second=4)
        self._status = console.status("starting Ray")
        self._rows: dict[str, dict[str, Any]] = {}
        self._tickets: dict[str, Event] = {}
        self._drawn: dict[tuple[str, float], Event] = {}
        self._proofs: dict[str, Event] = {}
        self._retraining: dict[str, Event] = {}
        self._retries: dict[str, Event] = {}

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()
        self._live.stop()

    def __call__(self, event: Event) -> None:
        self._take(event)
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            if line := self._line(event):
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif tables := self._tables():
            self._status.stop()
            self._live.start()
            self._live.update(Group(*tables))

    def _take(self, event: Event) -> None:
        kind = event["event"]
        if kind in ("check", "trajectory"):
            row = self._rows.setdefault(event["trajectory"], {})
            row[kind] = event
            if kind == "check":
                row.pop("trajectory", None)  # One that failed runs again.
                if event["validation_accuracy"] is not None:  # It is, within an epoch.
                    row["validation_accuracy"] = event["validation_accuracy"]
        elif kind == "ticket":
            self._tickets[event["ticket"]] = event
            self._drawn[event["trajectory"], event["prune_ratio"]] = event
        elif kind == "proof":
            self._proofs[event["ticket"]] = event
        elif kind in ("epoch", "retrained"):
            self._retraining[event["run"]] = self._retraining.get(event["run"], {}) | event
        elif kind == "retry":
            self._retries[event.get("trajectory") or event["run"]] = event
            if event.get("anew"):
                gone = event.get("trajectory")
                self._drawn = {key: e for key, e in self._drawn.items() if key[0] != gone}

    def _line(self, event: Event) -> str | None:
        """What to print of this event, if anything."""
        match event["event"]:
            case "check":
                distances = "  ".join(
                    f"{r}: {distance_text(d)}" for r, d in event["distances"].items()
                )
                accuracy = event["validation_accuracy"]
                return (
                    f"{event['trajectory']}"
                    f"  epoch {epoch_text(event['epoch'])}{self._budget}"
                    + (f"  validation {accuracy:.1%}" if accuracy is not None else "")
                    + (f"  mask distance {distances}" if distances else "")
                )
            case "ticket":
                return (
                    f"{event['trajectory']}  drew ticket {event['ticket']} at prune ratio"
                    f" {event['prune_ratio']:g}: proof {event['proof_accuracy']:.1%}"
                )
            case "proof":
                return (
                    f"ticket {event['ticket']}"
                    f"  proof in rung {event['rung']}: {event['proof_accuracy']:.1%}"
                )
            case "trajectory":
                reason = f" ({event['reason']})" if event["reason"] else ""
                proposed = f": {changes_text(event['changes'])}" if event["changes"] else ""
                return f"{event['trajectory']}  {event['state']}{reason}{proposed}"
            case "retry":
                return retry_line(event)
            case "epoch":
                return (
                    f"retraining {self._name(event['run'])}"
                    f"  epoch {event['epoch']}/{self._space.retraining.epochs}"
                    f"  validation {event['validation_accuracy']:.1%}"
                )
            case "retrained":
                return f"retraining {self._name(event['run'])}  test {event['test_accuracy']:.1%}"
        return None

    def _name(self, run: str) -> str:
        return run

    def _tables(self) -> list[RenderableType]:
        """What a terminal shows; nothing as long as there is nothing to show."""
        raise NotImplementedError


class Progress(Display):
    """The display of a sweep, or of retraining one of its tickets."""

    def __init__(self, console: Console, space: SearchSpace):
        super().__init__(console, space)
        proposed = space.optuna.ranges if space.optuna else {}
        self._budget = "" if "training.epochs" in proposed else f"/{space.training.epochs}"

    def _tables(self) -> list[RenderableType]:
        parts: list[RenderableType] = [self._search()] if self._rows else []
        return [*parts, *([self._retrainings()] if self._retraining else [])]

    def _search(self) -> Group:
        ratios = self._space.prune_ratios
        seeds = ["seed"] if len(self._space.seeds) > 1 else []
        prune = [f"prune\n{ratio:g}" for ratio in ratios]
        headers = ["trial" if self._space.optuna else "penalty"]
        headers += [*seeds, "epoch", "validation", *prune]
        table = plain_table("Search", headers, right=headers)
        table.add_column("state", min_width=len("converged"))
        shown = self._rows
        rule = self._space.stop_rule
        notes = [
            f"Under each prune ratio: the mask distance (- before check {rule.window}) until it is"
            f" at most {rule.limit:g}, then the ticket's proof accuracy @ draw epoch."
        ]
        if len(shown) > self._console.height // 2:
            shown = {name: row for name, row in shown.items() if "trajectory" not in row}
            notes.append(f"{len(self._rows) - len(shown)} trajectories have ended.")
        notes += map(retry_line, self._retries.values())
        if self._proofs:
            notes.append(_proved_again([proof["rung"] for proof in self._proofs.values()]))
        for name, row in shown.items():
            check, ended = row.get("check"), row.get("trajectory")
            first, seed = name.removeprefix("penalty").removeprefix("trial").rsplit("-seed")
            cells = [first, seed] if seeds else [first]
            cells.append(f"{epoch_text(check['epoch'])}{self._budget}" if check else "")
            accuracy = row.get("validation_accuracy")
            cells.append("-" if accuracy is None else f"{accuracy:.1%}")
            for ratio in ratios:
                if ticket := self._drawn.get((name, ratio)):
                    last = self._proofs.get(ticket["ticket"]) or ticket
                    drawn = f"{last['proof_accuracy']:.1%} @{epoch_text(ticket['draw_epoch'])}"
                    cells.append(f"[green]{drawn}[/]")
                else:
                    cells.append(distance_text(check["distances"][f"{ratio:g}"] if check else None))
            table.add_row(*cells, ended["state"] if ended else "training")
        return Group(table, *map(Text, notes), "")

    def _retrainings(self) -> Table:
        headers = ["network", "epoch", "loss", "validation", "test"]
        table = plain_table("Retraining", headers, right=headers[1:])
        for run, event in self._retraining.items():
            table.add_row(
                run,
                f"{event.get('epoch', event.get('epochs'))}/{self._space.retraining.epochs}",
                f"{event['loss']:.3f}" if "loss" in event else "",
                f"{event['validation_accuracy']:.1%}",
                f"{event['test_accuracy']:.1%}" if "test_accuracy" in event else "",
            )
        return table


def retry_line(event: Event) -> str:
    who = event.get("trajectory") or f"retraining {event['run']}"
    return f"{who}  runs again, attempt {event['attempt']}: {event['reason']}"


def plain_table(title: str, headers: list[str], right: list[str]) -> Table:
    """A table that fits 80 columns: two blanks between columns, and words are wrapped, not cut."""
    table = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for header in headers:
        longest = max(map(len, header.split()), default=0)
        table.add_column(header, justify="right" if header in right else "left", min_width=longest)
    return table


def changes_text(changes: Mapping[str, Any]) -> str:
    """What Optuna proposed, numbers to three digits."""
    shown = {n: f"{v:.3g}" if isinstance(v, float) else str(v) for n, v in changes.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _proved_again(reached: list[int]) -> str:
    """How many tickets came to each rung above the first; `reached` is the last one of each."""
    rungs = range(2, max(reached) + 1)
    counts = [f"{sum(last >= rung for last in reached)} in rung {rung}" for rung in rungs]
    return f"Tickets proved again with more MACs: {', '.join(counts)}."


def epoch_text(epoch: float) -> str:
    """Two decimals at most: 8, 8.5, 8.33."""
    return f"{epoch:.2f}".rstrip("0").rstrip(".")


def distance_text(distance: float | None) -> str:
    """Two decimals; - where the window is not full."""
    return "-" if distance is None else f"{distance:.2f}"


def report_table(report: Mapping[str, Any]) -> Group:
    """A sweep's result: the dense reference and each winner, and what the search cost."""
    ticket = ["penalty", "prune\nratio", "draw\nepoch"]
    headers = ["network", *ticket, "test", "MACs", "params", "cost"]
    table = plain_table(f"{report['name']}: {report['state']}", headers, right=headers[1:])
    dense = report["dense"]
    for row in [dense, *report["winners"]]:
        winner = row is not dense
        table.add_row(
            row["run"],
            f"{row['penalty']:.3g}" if winner else "",
            f"{row['prune_ratio']:g}" if winner else "",
            epoch_text(row["draw_epoch"]) if winner else "",
            "-" if row["test_accuracy"] is None else f"{row['test_accuracy']:.2%}",
            _relative(row["macs"], dense["macs"]),
            _relative(row["params"], dense["params"]),
            "-" if row["relative_cost"] is None else f"{row['relative_cost']:.0%}",
        )
    legend = Table.grid(padding=(0, 2, 0, 0))
    for header, meaning in _LEGEND.items():
        legend.add_row(header, meaning)
    tickets, trajectories = report["tickets"], report["trajectories"]
    lines = [f"Trajectories: {len(trajectories)}. Tickets: {len(tickets)}."]
    reached = [ticket["proof_rung"] for ticket in tickets]
    if max(reached, default=1) > 1:
        lines.append(_proved_again(reached))
    correlation = report["proof_correlation"]
    if correlation["spearman"] is not None:
        lines.append(
            f"Rank correlation of proof and final validation accuracy (Spearman):"
            f" {correlation['spearman']:.2f} over {correlation['n']} tickets."
        )
    origins = {ticket["ticket"]: ticket["trajectory"] for ticket in tickets}
    proposed = {event["trajectory"]: event["changes"] for event in trajectories}
    for row in report["winners"]:
        if changes := proposed.get(origins[row["run"]]):
            lines.append(f"{row['run']}: {origins[row['run']]}, {changes_text(changes)}")
    for event in trajectories:
        left = [f"{ratio} {s}" for ratio, s in event["ratios"].items() if s != "drawn"]
        if left:
            reason = f" ({event['reason']})" if event["reason"] else ""
            lines.append(f"{event['trajectory']}: prune ratio {', '.join(left)}{reason}")
    lines += lost_lines(report)
    costs = ["", _costs(report), ""] if report["sweep_cost"] is not None else [""]
    return Group(table, "", legend, *costs, *map(Text, lines))


def lost_lines(report: Mapping[str, Any]) -> list[str]:
    """What a report says of what was cut off, and of what ran again."""
    lines = [f"{name}: interrupted" for name in report["interrupted"]]
    if retries := report["retries"]:
        shown = ", ".join(f"{name} ({count})" for name, count in retries.items())
        lines.append(f"Run again, or gone on from an older checkpoint: {shown}.")
    return lines


_LEGEND = {
    "test": "accuracy on the test images",
    "MACs": "of one image forward; % is of the dense network's, as for params",
    "cost": "MACs of training, counted and not timed, % of the dense network's; a winner's are"
    " its retraining and an equal share of the search",
}


def _costs(report: Mapping[str, Any]) -> Group:
    """What the whole sweep cost, and what it would have without what saves MACs."""
    cost = report["sweep_cost"]
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(justify="right")
    rows.add_row(f"{cost:.0%}", "this sweep: the search, and the retraining of all winners")
    for key, other, saver in (
        ("without_sharing", "a trajectory for each prune ratio", "sharing them"),
        ("without_halving", "every ticket retrained in place of proofs", "proofs"),
    ):
        saved = 1 - cost / report[key]
        verdict = f"saved {saved:.0%}" if saved > -0.005 else f"cost {-saved:.0%} more"
        rows.add_row(f"{report[key]:.0%}", f"with {other}: {saver} {verdict}")
    return Group("The sweep's cost as counted MACs of training, % of the dense network's:", rows)


def _relative(value: int, dense: int) -> str:
    return f"{short_text(value)} {value / dense:4.0%}"


def short_text(value: float) -> str:
    """Three digits: 918k, 2.38M."""
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def ticket_table(ticket: Ticket) -> Group:
    """A ticket: how it was found, and the channels it keeps in each group."""
    manifest = ticket.manifest
    rule, draw, rate = manifest["stop_rule"], manifest["draw"], manifest["learning_rate"]
    options = "".join(f" {name}={value}" for name, value in manifest["network"]["options"].items())
    facts = {
        "network": manifest["network"]["name"] + options,
        "found in": manifest["space"]["name"],
        "method": manifest.get("method"),
        "penalty": f"{manifest['penalty']:g}",
        "prune ratio": f"{manifest['prune_ratio']:g}",
        "learning rate": rate and f"{rate:g}",
        "seed": manifest["seed"],
        "drawn": draw and f"epoch {epoch_text(draw['epoch'])}, check {draw['check']}",
        "precision": manifest["precision"],
        "rounded to": f"multiples of {manifest['round_to']}",
        "stop rule": rule
        and f"{rule['rule']}, window {rule['window']}, threshold {rule['threshold']:g}",
        "distances": rule and ", ".join(f"{distance:.3f}" for distance in rule["distances"]),
        "floor acted on": ", ".join(manifest["min_channels"]["acted_on"]) or "no group",
        "MACs": f"{manifest['macs']:,}",
        "params": f"{manifest['params']:,}",
    }
    if retrained := manifest.get("retrained"):
        facts["retrained from"] = retrained["from"]
        facts["retrained for"] = f"{retrained['epochs']} epochs"
        facts["validation"] = f"{retrained['validation_accuracy']:.2%}"
        facts["test"] = f"{retrained['test_accuracy']:.2%}"
    table = plain_table(f"Ticket {ticket.id}", ["", " "], right=[])
    table.show_header = False
    for name, value in facts.items():
        if value is not None:  # Not every method draws.
            table.add_row(name, escape(str(value)))
    groups = plain_table("Kept channels", ["group", "kept", "of", ""], right=["kept", "of"])
    for name, (kept, width) in kept_channels(manifest).items():
        groups.add_row(name, str(kept), str(width), "█" * round(24 * kept / width))
    return Group(table, "", groups)


def history_table(space: str, rows: Sequence[Row]) -> Group:
    """The sweeps of a space: the best retrained ticket within each share of the dense MACs."""
    budgets = sorted({best.budget for row in rows for best in row.best})
    headers = ["sweep", "state", *(f"within\n{budget:.0%}" for budget in budgets)]
    table = plain_table(f"Sweeps of {space}", headers, right=headers[2:])
    lines = []
    for row in rows:
        best = {best.budget: best for best in row.best}
        cells = [_best_text(best[b]) if b in best else "-" for b in budgets]
        table.add_row(row.sweep, row.state, *cells)
        lines += [f"{row.sweep}: {row.reason}"] if row.reason else []
        lines += [f"{row.sweep} changed {', '.join(row.changed)}."] if row.changed else []
    return Group(table, Text(_HISTORY), *map(Text, lines))


_HISTORY = (
    "Test accuracy of the best retrained ticket (by validation accuracy) within each share of the"
    " dense network's MACs, and how many points its validation accuracy is above or below the sweep"
    " before; ! marks a fall by more than its standard error."
)


def _best_text(best: Best) -> str:
    change = "" if best.change is None else f" {100 * best.change:+.1f}"
    return f"{best.test_accuracy:.1%}{change}{'!' * best.regression}"
