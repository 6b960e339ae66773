"""The command line: `raytickets search`, `report`, `show`, `retrain` and `spaces`."""

import dataclasses
import gc
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import FlagCreatePairsOff, Positional, arg

from raytickets.config import InputError
from raytickets.spaces import built_in, load_space
from raytickets.sweep import Sweep

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
    chosen = load_space(space, smoke=smoke)
    if data is not None:
        chosen = dataclasses.replace(
            chosen, data=dataclasses.replace(chosen.data, source="folder", path=data)
        )
    # The name is settled here so that an interrupted sweep can be told how to go on.
    name = name or f"{chosen.name}-{time.strftime('%Y%m%d-%H%M%S')}"

    from raytickets.plan import make_plan

    console = Console()
    with console.status("checking the network and reading the images"):
        plan = make_plan(chosen, name=name, storage=storage)
    print(f"sweep {name} in {plan.folder}", flush=True)

    from raytickets.console import Progress, report_table
    from raytickets.driver import SweepFailed, run
    from raytickets.tracking import resolve_uri, tickets_address, ui_command

    gc.enable()
    code = 0
    try:
        with Progress(console, plan.space) as progress:
            sweep = run(plan, tracking_uri, progress)
    except SweepFailed as error:
        print(f"raytickets: a stage failed: {error}", file=sys.stderr)
        sweep, code = Sweep(plan.folder), FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command with the sweep's name goes on:")
        print("  " + _again(name))
        return INTERRUPTED
    console.print("", report_table(sweep.report()), "", sep="\n")
    uri = resolve_uri(tracking_uri)
    print(f"Compare the tickets in MLflow:\n  {ui_command(uri)}")
    if code == 0:
        print(f"  {tickets_address(uri, plan.space.name)}")
    return code


def _again(name: str) -> str:
    """The command line as it was given, with the sweep's name."""
    words = ["raytickets", *sys.argv[1:]]
    named = any(word.partition("=")[0] == "--name" for word in words)
    return shlex.join(words if named else [*words, "--name", name])


@app.command
def report(sweep: Annotated[Positional[str], arg(metavar="SWEEP")], *, json: bool = False) -> int:
    """Show what a sweep found, from its folder.

    Args:
        sweep: the sweep's folder, or its name under ./sweeps.
        json: print the report as JSON (see `raytickets.Sweep.report`).
    """
    found = _sweep(sweep).report()
    if json:
        print(_json(found))
        return 0

    from raytickets.console import report_table

    Console().print(report_table(found))
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
