"""The command line: `raytickets search`, `compare`, `report`, `show`, `retrain`, `sync`, `history`
and `spaces`.
"""

import contextlib
import dataclasses
import gc
import os
import re
import shlex
import signal
import sys
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import FlagCreatePairsOff, Positional, arg

from raytickets.config import InputError, SearchSpace, masked
from raytickets.journal import NAME, Event
from raytickets.lease import Held, hold
from raytickets.plan import Kind, check_services, check_store, default_name, opened
from raytickets.spaces import built_in, load_space
from raytickets.storage import address as shown
from raytickets.storage import names
from raytickets.sweep import Sweep, place

if TYPE_CHECKING:
    from raytickets.console import Display

BAD_INPUT, FAILED, HELD, INTERRUPTED = 2, 3, 4, 130
"""Exit codes besides 0, which means that everything asked for was done."""

STORAGE = os.environ.get("RAYTICKETS_STORAGE") or "sweeps"

ABOUT = """Search early-bird lottery tickets: smaller networks for less energy.

Exit codes: 0 all done; 2 bad input; 3 something failed, or MLflow has not got everything; 4 another
process runs the sweep of this name; 130 interrupted: the same command goes on, with --name."""

Ticket = Annotated[
    Positional[str], arg(metavar="TICKET", help=f"its folder or address, or its id under {STORAGE}")
]
Found = Annotated[
    Positional[str],
    arg(metavar="SWEEP", help=f"its folder or address, or its name under {STORAGE}"),
]
Name = Annotated[
    str | None,
    arg(metavar="NAME", help="what it is called; with the name of one that was cut off it goes on"),
]
New = Annotated[
    bool, arg(help="start anew under this name, and keep what was found under another one")
]
Place = Annotated[
    str,
    arg(
        metavar="FOLDER|ADDRESS",
        help="where it is kept: a folder, or as s3://bucket/sweeps; else RAYTICKETS_STORAGE",
    ),
]
Ray = Annotated[
    str | None,
    arg(
        metavar="ADDRESS",
        help="the Ray cluster (auto or host:port); else RAY_ADDRESS, else this machine",
    ),
]
Store = Annotated[
    str | None,
    arg(
        metavar="URI",
        help="the MLflow store; else MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here",
    ),
]
Recorded = Annotated[
    str | None,
    arg(metavar="URI", help="the MLflow store; else the one that the sweep was recorded in"),
]
Images = Annotated[
    str | None,
    arg(metavar="FOLDER", help="an ImageFolder (train/CLASS/, test/CLASS/) for the space's images"),
]
Smoke = Annotated[
    bool, arg(help="the smallest variant of a space that has one, to see that all works")
]

app = tyro.extras.SubcommandApp()


@app.command
def search(
    space: Annotated[Positional[str], arg(metavar="SPACE")] = "digits",
    *,
    name: Name = None,
    new: New = False,
    resume_or_start: bool = False,
    storage: Place = STORAGE,
    address: Ray = None,
    tracking_uri: Store = None,
    data: Images = None,
    smoke: Smoke = False,
) -> int:
    """Search a space for early-bird tickets, retrain the winners, record everything in MLflow.

    Runs on all cores of this machine, or on a Ray cluster. The same command with its name goes on
    with a sweep that was cut off.

    Args:
        space: a built-in name (see `raytickets spaces`), a .py file or package.module:function.
        resume_or_start: for schedules: NAME is a series of numbered sweeps; go on with the newest
            unless it is done, has failed twice or began with another space; else start the next.
    """
    if resume_or_start and (new or name is None):
        raise InputError("resume_or_start", True, "needs the --name of a series, and no --new")
    options = {"name": name, "storage": storage, "new": new, "series": resume_or_start}
    return _run(_space(space, data, smoke), "sweep", options, address, tracking_uri)


@app.command
def compare(
    space: Annotated[Positional[str], arg(metavar="SPACE|paper")] = "digits",
    *,
    name: Name = None,
    new: New = False,
    storage: Place = STORAGE,
    address: Ray = None,
    tracking_uri: Store = None,
    data: Images = None,
    smoke: Smoke = False,
    seeds: Annotated[int | None, arg(metavar="N")] = None,
    methods: Annotated[tuple[str, ...] | None, arg(metavar="METHOD ...")] = None,
    prune_ratios: Annotated[tuple[float, ...] | None, arg(metavar="RATIO ...")] = None,
) -> int:
    """Compare early-bird tickets with what they replace, at equal recipe, data and seeds.

    Prints and records one table, and what may be claimed from it. With `paper` in place of a space:
    what the early-bird paper published, and beside it the comparison NAME if it is given.

    Args:
        space: a built-in name (see `raytickets spaces`), a .py file or package.module:function.
        seeds: how many seeds, from 0; more tell smaller differences from chance.
        methods: dense, early_bird, early_bird_reinit, progressive, iterative, lottery_ticket,
            snip, random or low_precision; all of them unless the space says. There has to be dense,
            and early_bird for random.
        prune_ratios: shares of the channels to drop; those of the space unless given.
    """
    if seeds is not None and not 1 <= seeds <= 1000:
        raise InputError("seeds", seeds, "must be between 1 and 1000")
    given: dict[str, Any] = {"methods": methods, "prune_ratios": prune_ratios}
    given["seeds"] = seeds and tuple(range(seeds))
    given = {field: value for field, value in given.items() if value is not None}
    if space == "paper":
        others = given | {"tracking_uri": tracking_uri, "data": data, "address": address}
        others |= {"smoke": smoke or None, "new": new or None}
        for field, value in others.items():
            if value is not None:
                raise InputError(field, value, "`compare paper` takes a name and a storage alone")
        return _paper(name, storage)
    chosen = _space(space, data, smoke)
    chosen = dataclasses.replace(chosen, comparison=dataclasses.replace(chosen.comparison, **given))
    options = {"name": name, "storage": storage, "new": new}
    return _run(chosen, "comparison", options, address, tracking_uri)


def _paper(name: str | None, storage: str) -> int:
    from raytickets import paper
    from raytickets.scoreboard import paper_table

    if name is None:
        Console().print(paper_table(paper.PUBLISHED))
        return 0
    report = Sweep(place(storage) / name).fetched().report()
    if report["kind"] != "comparison":
        raise InputError("name", name, "must be a comparison, and this is a sweep")
    Console().print(paper_table(paper.published_for(report), report))
    return 0


def _space(given: str, data: str | None, smoke: bool) -> SearchSpace:
    chosen = load_space(given, smoke=smoke)
    if data is None:
        return chosen
    folder = {"source": "folder", "path": data, "download": False, "columns": None}
    return dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, **folder))


def _run(
    space: SearchSpace, kind: Kind, options: dict[str, Any], address: str | None, uri: str | None
) -> int:
    """Run a sweep or a comparison, and show it; `options` are those of `plan.opened`."""
    check_services(address, uri)
    # The name is settled here so that one that is interrupted can be told how to go on.
    name = options.pop("name")
    name = default_name(space, kind) if name is None else name
    again = f"interrupted; the same command with the {kind}'s name goes on:\n  {_again(name)}"
    console, code = Console(), 0
    try:
        with contextlib.ExitStack() as stack:
            with console.status("checking the network and reading the images"):
                plan = stack.enter_context(opened(space, name=name, kind=kind, **options))
            folder = plan.folder
            print(f"{kind} {folder.name} in {shown(folder)}", *plan.notes, sep="\n", flush=True)

            from raytickets.driver import SweepFailed, interruptible, run
            from raytickets.scoreboard import table_of

            gc.enable()
            try:
                with interruptible(again), _display(console, plan.opening, space) as display:
                    sweep = run(plan, uri, display, address=address)
            except SweepFailed as error:
                print(f"raytickets: {error}", file=sys.stderr)
                sweep, code = Sweep(folder), FAILED
                if not (folder / NAME).exists() or not sweep.events():
                    return code
    except KeyboardInterrupt:
        print(again)
        return INTERRUPTED
    console.print("", table_of(sweep.report()), "", sep="\n")
    # MLflow takes seconds to import, which the sweep had done while Ray started.
    from raytickets.tracking import resolve_uri, tickets_address, ui_command

    uri = resolve_uri(uri)
    print(f"Compare the tickets in MLflow:\n  {ui_command(uri)}")
    if code == 0:
        with contextlib.suppress(Exception):  # All is done, whether or not the server answers now.
            print(f"  {tickets_address(uri, space.name, kind, folder.name)}")
    return code


def _display(console: Console, opening: Event, space: SearchSpace) -> "Display":
    """What shows a sweep or a comparison that began so."""
    from raytickets.console import Progress
    from raytickets.scoreboard import Scoreboard

    if opening["event"] == "comparison":
        return Scoreboard(console, opening | {"space": space.as_dict()})
    return Progress(console, space)


def _again(name: str) -> str:
    """The command line as it was given, with the sweep's or comparison's name."""
    words = ["raytickets", *(masked(word) for word in sys.argv[1:] if word != "--new")]
    named = any(word.partition("=")[0] == "--name" for word in words)
    return shlex.join(words if named else [*words, "--name", name])


@app.command
def report(sweep: Found, *, json: bool = False) -> int:
    """Show what a sweep or a comparison found, from its folder.

    Args:
        json: print the report as JSON (see `raytickets.Sweep.report`).
    """
    found = _sweep(sweep).report()
    if json:
        print(dumps(found, indent=2))
        return 0
    from raytickets.scoreboard import table_of

    Console().print(table_of(found))
    return 0


@app.command
def show(ticket: Ticket, *, json: bool = False) -> int:
    """Show how a ticket was found and what it keeps, after verifying its checksums.

    Args:
        json: print its manifest as JSON.
    """
    from raytickets.console import ticket_table
    from raytickets.ticket import DamagedTicket, Untrusted, load_ticket

    try:
        found = load_ticket(_ticket(ticket))
        with contextlib.suppress(Untrusted):  # Own code is not run for it.
            found.network()
    except DamagedTicket as error:
        raise InputError("ticket", ticket, str(error)) from error
    if json:
        print(dumps(dict(found.manifest), indent=2))
    else:
        Console().print(ticket_table(found))
    return 0


@app.command
def retrain(
    ticket: Ticket,
    *,
    epochs: Annotated[int | None, arg(metavar="N")] = None,
    weights: Annotated[Literal["inherit", "reinit"] | None, arg(metavar="inherit|reinit")] = None,
    address: Ray = None,
    tracking_uri: Recorded = None,
) -> int:
    """Retrain one ticket of a sweep, with the sweep's recipe and on its data.

    Args:
        epochs: train this long in place of the recipe's epochs.
        weights: go on from the ticket's weights, or draw new ones in its shape.
    """
    path = _ticket(ticket)
    sweep = Sweep(path.parent.parent)
    opening, space = sweep.opening(), sweep.space()
    if epochs is not None:
        space = space.with_retraining(epochs=epochs)
    check_services(address, tracking_uri)

    from raytickets.driver import SweepFailed, interruptible, retrain_ticket
    from raytickets.ticket import DamagedTicket

    gc.enable()
    line = "interrupted; the same command goes on"
    try:
        with interruptible(line), _display(Console(), opening, space) as display:
            done = retrain_ticket(
                path,
                epochs=epochs,
                weights=weights,
                tracking_uri=tracking_uri,
                observer=display,
                address=address,
            )
    except DamagedTicket as error:
        raise InputError("ticket", ticket, str(error)) from error
    except SweepFailed as error:
        print(f"raytickets: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(line)
        return INTERRUPTED
    print(f"test accuracy {done['test_accuracy']:.2%}, saved as {shown(sweep.path / done['path'])}")
    return 0


@app.command
def sync(sweep: Found, *, tracking_uri: Recorded = None) -> int:
    """Deliver to MLflow what it has not got of a sweep or a comparison; as often as you like."""
    found = _sweep(sweep)
    found.opening()
    if tracking_uri:
        check_store(tracking_uri)

    from raytickets.tracking import Undelivered, sync

    gc.enable()
    try:
        with hold(found.path):
            events, runs = sync(found.path, tracking_uri)
    except Undelivered as error:
        print(f"raytickets: {error}", file=sys.stderr)
        return FAILED
    print(f"MLflow has all {events} events of {found.name} in {runs} runs")
    return 0


@app.command
def history(
    space: Annotated[Positional[str], arg(metavar="SPACE")], *, storage: Place = STORAGE
) -> int:
    """Show what changed from sweep to sweep of a space: the best ticket per MACs, and regressions.

    Args:
        space: the name of the space, as its sweeps have it.
    """
    from raytickets.console import history_table
    from raytickets.history import history as sweeps_of

    rows = sweeps_of(place(storage), space)
    if not rows:
        raise InputError("space", space, f"has no sweep in {storage}")
    Console().print(history_table(space, rows))
    return 0


@app.command
def spaces() -> int:
    """List the search spaces that come with raytickets."""
    names = built_in()
    for name, file in names.items():
        summary = file.read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
        print(f"{name:{max(map(len, names))}}  {summary}")
    return 0


def _sweep(given: str) -> Sweep:
    path = place(given)
    found = Sweep(path if path.is_dir() or path.is_absolute() else place(STORAGE) / given)
    return found.fetched()


def _ticket(given: str) -> Path:
    path = place(given)
    if path.is_dir() or shown(path) != str(path):
        return path.resolve()
    found: list[Path] = []
    if re.fullmatch(r"[0-9a-f]{16}", given):
        root = place(STORAGE)
        for folder in [root / n / kind for n in names(root) for kind in ("tickets", "retrained")]:
            with contextlib.suppress(PermissionError):  # of a sweep that is another's
                found += [folder / given] if given in names(folder) else []
    if not found:
        raise InputError("ticket", given, f"must be a ticket's folder, or an id under {STORAGE}")
    if len(found) > 1:
        raise InputError("ticket", given, f"is in several sweeps: {', '.join(map(shown, found))}")
    return found[0].resolve()


def main() -> None:
    """Run the command line and exit, with the codes that ABOUT tells."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    if sys.argv[1:] == ["--version"]:
        print(version("raytickets"))
        sys.exit(0)
    gc.disable()  # The garbage of importing torch is none; collecting it takes a second.
    try:
        code = app.cli(prog="raytickets", description=ABOUT, config=(FlagCreatePairsOff,))
    except KeyboardInterrupt:
        code = INTERRUPTED
    except (InputError, Held, OSError) as error:
        print(f"raytickets: {error}", file=sys.stderr)
        code = HELD if isinstance(error, Held) else FAILED
        code = BAD_INPUT if isinstance(error, InputError) else code
    sys.exit(code)


if __name__ == "__main__":
    main()
