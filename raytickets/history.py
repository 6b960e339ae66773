"""What changed from sweep to sweep of a space: the best ticket of every budget, and regressions."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from raytickets.config import InputError, changed_fields
from raytickets.journal import NAME, Event
from raytickets.storage import fetch_journal, names
from raytickets.sweep import Sweep

BUDGETS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the dense network's MACs that a ticket may have."""


@dataclass(frozen=True)
class Best:
    """A sweep's best retrained ticket within a budget, by validation accuracy."""

    budget: float
    ticket: str
    macs: int
    """Of one image forward."""
    validation_accuracy: float
    test_accuracy: float
    change: float | None = None
    """Validation accuracy minus that of the sweep before; None if none before has such a ticket."""
    regression: bool = False
    """Validation accuracy fell by more than a standard error of its own, sqrt(p (1 - p) / n) for n
    validation images. Chance alone does that to about one sweep in four: the difference of two
    sweeps spreads sqrt(2) as far.
    """


@dataclass(frozen=True)
class Row:
    """A sweep of the space, or a journal that is damaged: its name and the reason, no more."""

    sweep: str
    started: str | None
    """UTC, as 2026-11-22T20:24:52Z; None for sweeps of before that was kept."""
    state: str
    """done, failed, interrupted, unfinished or damaged."""
    reason: str = ""
    """Why it failed or what is damaged."""
    tickets: int = 0
    best: tuple[Best, ...] = ()
    """By rising budget; budgets within which no ticket was retrained are left out."""
    changed: tuple[str, ...] = ()
    """Fields of the space that differ from the sweep before, and `data` if its images do."""


def history(storage: Path, space: str) -> list[Row]:
    """The sweeps of the space with this name in a folder or the local copy of an address.

    They are in order of their beginning, those that do not tell it first, by name; damaged ones,
    whose space cannot be known, come last. A sweep is compared with the last one before it that
    retrained a ticket within the same budget. Other folders and comparisons are passed over.
    """
    read, damaged = [], []
    for name in names(storage):
        sweep = Sweep(storage / name)
        if not fetch_journal(sweep.path / NAME).is_file():
            continue
        try:
            events = sweep.events()
        except InputError as error:
            damaged.append(Row(name, None, "damaged", error.args[2]))
            continue
        if events and events[0]["event"] == "sweep" and events[0]["space"]["name"] == space:
            read.append((events[0], _row(sweep, events)))
    read.sort(key=lambda pair: (pair[1].started or "", pair[1].sweep))
    return [*_compared(read), *damaged]


def _row(sweep: Sweep, events: list[Event]) -> Row:
    opening, report = events[0], sweep.report()
    retrained = [row for row in report["winners"] if row["validation_accuracy"] is not None]
    reasons = [event["reason"] for event in events if event["event"] == "end"]
    best = []
    for budget in BUDGETS:
        within = [row for row in retrained if row["macs"] <= budget * opening["dense"]["macs"]]
        if within:
            row = max(within, key=lambda row: (row["validation_accuracy"], -row["macs"]))
            fields = ("macs", "validation_accuracy", "test_accuracy")
            best.append(Best(budget, row["run"], **{name: row[name] for name in fields}))
    return Row(
        sweep=sweep.name,
        started=opening.get("started"),
        state=report["state"],
        reason=reasons[-1] if reasons else "",
        tickets=len(report["tickets"]),
        best=tuple(best),
    )


def _compared(read: list[tuple[Event, Row]]) -> list[Row]:
    rows, last, before = [], {}, None
    for opening, row in read:
        best = tuple(
            _changed(best, last.get(best.budget), opening["data"]["validation"])
            for best in row.best
        )
        changed = () if before is None else _changes(before, opening)
        rows.append(dataclasses.replace(row, best=best, changed=changed))
        last |= {best.budget: best for best in best}
        before = opening
    return rows


def _changed(best: Best, before: Best | None, images: int) -> Best:
    if before is None:
        return best
    accuracy = best.validation_accuracy
    change = accuracy - before.validation_accuracy
    error = math.sqrt(accuracy * (1 - accuracy) / images)
    return dataclasses.replace(best, change=change, regression=change < -error)


def _changes(before: Event, opening: Event) -> tuple[str, ...]:
    fields = changed_fields(before["space"], opening["space"])
    images = before["data"]["fingerprint"] != opening["data"]["fingerprint"]
    return (*fields, "data") if images else tuple(fields)
