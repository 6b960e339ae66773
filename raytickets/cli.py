"""The command line: `raytickets search`, `compare`, `report`, `show`, `retrain` and `spaces`."""

import dataclasses
import gc
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console, Group
from tyro.conf import FlagCreatePairsOff, Positional, arg

from raytickets.config import InputError, SearchSpace
from raytickets.spaces import built_in, load_space
from raytickets.sweep import Sweep

if TYPE_CHECKING:
    from raytickets.plan import Kind

BAD_INPUT, FAILED, INTERRUPTED = 2, 3, 130
"""Exit codes besides 0, which means that everything asked for was done."""

STORAGE = Path("sweeps")

Given = Annotated[Positional[str], arg(metavar="TICKET")]

app = tyro.extras.SubcommandApp()


@app.command
def search(
    space: Annotated[Positional[str], arg(metavar="SPACE")] = "digits",
    *,
    name: Annotated[str | None, arg(metavar="NAME")] = None,
    storage: Annotated[Path, arg(metavar="FOLDER")] = STORAGE,
    tracking_uri: Annotated[str | None, arg(metavar="URI")] = None,
    data: Annotated[str | None, arg(metavar="FOLDER")] = None,
    smoke: bool = False,
) -> int:
    """Search a space for early-bird tickets, retrain the winners, record everything in MLflow.

    Runs on all cores of this machine, or on the Ray cluster at RAY_ADDRESS.

    Args:
        space: a built-in name (see `raytickets spaces`), a .py file or package.module:function.
        name: the sweep's name; the name of a sweep that was cut off goes on with it.
        storage: where the sweep's folder is made.
        tracking_uri: the MLflow store; else MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here.
        data: the folder of the images, in place of the space's own.
        smoke: the space's smallest variant, to see that everything works.
    """
    return _run(_space(space, data, smoke), "sweep", name, storage, tracking_uri)


@app.command
def compare(
    space: Annotated[Positional[str], arg(metavar="SPACE|paper")] = "digits",
    *,
    name: Annotated[str | None, arg(metavar="NAME")] = None,
    storage: Annotated[Path, arg(metavar="FOLDER")] = STORAGE,
    tracking_uri: Annotated[str | None, arg(metavar="URI")] = None,
    data: Annotated[str | None, arg(metavar="FOLDER")] = None,
    smoke: bool = False,
    seeds: Annotated[int | None, arg(metavar="N")] = None,
    methods: Annotated[tuple[str, ...] | None, arg(metavar="METHOD ...")] = None,
    prune_ratios: Annotated[tuple[float, ...] | None, arg(metavar="RATIO ...")] = None,
) -> int:
    """Compare early-bird tickets with what they replace, at equal recipe, data and seeds.

    Prints and records one table, and what may be claimed from it. With `paper` in place of a
    space: what the early-bird paper published, and beside it the comparison NAME if it is given.

    Args:
        space: a built-in name (see `raytickets spaces`), a .py file or package.module:function.
        name: the comparison's name; the name of one that was cut off goes on with it.
        storage: where the comparison's folder is made.
        tracking_uri: the MLflow store; else MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here.
        data: the folder of the images, in place of the space's own.
        smoke: the space's smallest variant, to see that everything works.
        seeds: how many seeds, from 0; more tell smaller differences from chance.
        methods: dense, early_bird, early_bird_reinit, progressive, iterative, lottery_ticket,
            snip, random or low_precision; all of them unless the space says.
        prune_ratios: shares of the channels to drop; those of the space unless given.
    """
    if seeds is not None and seeds < 1:
        raise InputError("seeds", seeds, "must be at least 1")
    given: dict[str, Any] = {
        "methods": methods,
        "prune_ratios": prune_ratios,
        "seeds": seeds and tuple(range(seeds)),
    }
    given = {field: value for field, value in given.items() if value is not None}
    if space == "paper":
        others = {"tracking_uri": tracking_uri, "data": data, "smoke": smoke or None, **given}
        for field, value in others.items():
            if value is not None:
                raise InputError(field, value, "`compare paper` takes a name and a storage alone")
        return _paper(name, storage)
    chosen = _space(space, data, smoke)
    compared = dataclasses.replace(chosen.comparison, **given)
    chosen = dataclasses.replace(chosen, comparison=compared)
    return _run(chosen, "comparison", name, storage, tracking_uri)


def _paper(name: str | None, storage: Path) -> int:
    from raytickets import paper
    from raytickets.scoreboard import paper_table

    if name is None:
        Console().print(paper_table(paper.PUBLISHED))
        return 0
    report = Sweep(storage / name).report()
    if report["kind"] != "comparison":
        raise InputError("name", name, "must be a comparison, and this is a sweep")
    Console().print(paper_table(paper.published_for(report), report))
    return 0


def _space(given: str, data: str | None, smoke: bool) -> SearchSpace:
    chosen = load_space(given, smoke=smoke)
    if data is None:
        return chosen
    folder = dataclasses.replace(
        chosen.data, source="folder", path=data, download=False, columns=None
    )
    return dataclasses.replace(chosen, data=folder)


def _run(
    space: SearchSpace, kind: "Kind", name: str | None, storage: Path, tracking_uri: str | None
) -> int:
    """Run a sweep or a comparison, and show it."""
    from raytickets.plan import default_name, make_plan

    # The name is settled here so that one that is interrupted can be told how to go on.
    name = name or default_name(space, kind)
    console = Console()
    with console.status("checking the network and reading the images"):
        plan = make_plan(space, name=name, storage=storage, kind=kind)
    print(f"{kind} {name} in {plan.folder}", flush=True)

    from raytickets.console import Progress
    from raytickets.driver import SweepFailed, run
    from raytickets.scoreboard import Scoreboard
    from raytickets.tracking import resolve_uri, tickets_address, ui_command

    gc.enable()
    code = 0
    compared = kind == "comparison"
    display = Scoreboard(console, plan.opening) if compared else Progress(console, space)
    try:
        with display:
            sweep = run(plan, tracking_uri, display)
    except SweepFailed as error:
        print(f"raytickets: a stage failed: {error}", file=sys.stderr)
        sweep, code = Sweep(plan.folder), FAILED
    except KeyboardInterrupt:
        print(f"interrupted; the same command with the {kind}'s name goes on:")
        print("  " + _again(name))
        return INTERRUPTED
    console.print("", _table(sweep.report()), "", sep="\n")
    uri = resolve_uri(tracking_uri)
    print(f"Compare the tickets in MLflow:\n  {ui_command(uri)}")
    if code == 0:
        print(f"  {tickets_address(uri, space.name, kind, name)}")
    return code


def _table(report: dict[str, Any]) -> Group:
    from raytickets.console import report_table
    from raytickets.scoreboard import comparison_table

    return comparison_table(report) if report["kind"] == "comparison" else report_table(report)


def _again(name: str) -> str:
    """The command line as it was given, with the sweep's or comparison's name."""
    words = ["raytickets", *sys.argv[1:]]
    named = any(word.partition("=")[0] == "--name" for word in words)
    return shlex.join(words if named else [*words, "--name", name])


@app.command
def report(sweep: Annotated[Positional[str], arg(metavar="SWEEP")], *, json: bool = False) -> int:
    """Show what a sweep or a comparison found, from its folder.

    Args:
        sweep: its folder, or its name under ./sweeps.
        json: print the report as JSON (see `raytickets.Sweep.report`).
    """
    found = _sweep(sweep).report()
    if json:
        print(_json(found))
        return 0

    Console().print(_table(found))
    return 0


@app.command
def show(ticket: Given, *, json: bool = False) -> int:
    """Show how a ticket was found and what it keeps, after verifying its checksums.

    Args:
        ticket: the ticket's folder, or its id if it is in a sweep under ./sweeps.
        json: print its manifest as JSON.
    """
    from raytickets.console import ticket_table
    from raytickets.ticket import DamagedTicket, load_ticket

    try:
        found = load_ticket(_ticket(ticket))
    except DamagedTicket as error:
        raise InputError("ticket", ticket, str(error)) from error
    if json:
        print(_json(dict(found.manifest)))
    else:
        Console().print(ticket_table(found))
    return 0


@app.command
def retrain(
    ticket: Given,
    *,
    epochs: Annotated[int | None, arg(metavar="N")] = None,
    weights: Annotated[Literal["inherit", "reinit"] | None, arg(metavar="inherit|reinit")] = None,
    tracking_uri: Annotated[str | None, arg(metavar="URI")] = None,
) -> int:
    """Retrain one ticket of a sweep, with the sweep's recipe and on its data.

    Args:
        ticket: the ticket's folder, or its id if it is in a sweep under ./sweeps.
        epochs: train this long in place of the recipe's epochs.
        weights: go on from the ticket's weights, or draw new ones in its shape.
        tracking_uri: the MLflow store; else MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here.
    """
    path = _ticket(ticket).resolve()
    sweep = Sweep(path.parent.parent)
    space = sweep.space()
    if epochs is not None:
        space = space.with_retraining(epochs=epochs)

    from raytickets.console import Progress
    from raytickets.driver import SweepFailed, retrain_ticket
    from raytickets.ticket import DamagedTicket

    gc.enable()
    try:
        with Progress(Console(), space) as progress:
            done = retrain_ticket(
                path,
                epochs=epochs,
                weights=weights,
                tracking_uri=tracking_uri,
                observer=progress,
            )
    except DamagedTicket as error:
        raise InputError("ticket", ticket, str(error)) from error
    except SweepFailed as error:
        print(f"raytickets: retraining failed: {error}", file=sys.stderr)
        return FAILED
    print(f"test accuracy {done['test_accuracy']:.2%}, saved as {sweep.path / done['path']}")
    return 0


@app.command
def spaces() -> int:
    """List the search spaces that come with raytickets."""
    names = built_in()
    for name, file in names.items():
        summary = file.read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
        print(f"{name:{max(map(len, names))}}  {summary}")
    return 0


def _json(values: object) -> str:
    return json.dumps(values, indent=2)


def _sweep(given: str) -> Sweep:
    path = Path(given)
    return Sweep(path if path.is_dir() else STORAGE / given)


def _ticket(given: str) -> Path:
    path = Path(given)
    if path.is_dir():
        return path
    found = [*STORAGE.glob(f"*/tickets/{given}"), *STORAGE.glob(f"*/retrained/{given}")]
    if not found:
        raise InputError("ticket", given, "must be a ticket's folder, or an id under ./sweeps")
    return found[0]


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input, 3 a stage failed, 130 interrupted."""
    gc.disable()  # The garbage of importing torch is none; collecting it takes a second.
    try:
        code = app.cli(
            prog="raytickets",
            description="Search early-bird lottery tickets: smaller networks for less energy.",
            config=(FlagCreatePairsOff,),
        )
    except KeyboardInterrupt:
        code = INTERRUPTED
    except InputError as error:
        print(f"raytickets: {error}", file=sys.stderr)
        code = BAD_INPUT
    sys.exit(code)


if __name__ == "__main__":
    main()
