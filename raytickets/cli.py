"""The command line: `raytickets search`, `report`, `show`, `retrain` and `spaces`."""

import dataclasses
import gc
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from raytickets.config import InputError
from raytickets.spaces import built_in, load_space

BAD_INPUT, FAILED, INTERRUPTED = 2, 3, 130
"""Exit codes besides 0, which means that everything asked for was done."""

STORAGE = Path("sweeps")

app = tyro.extras.SubcommandApp()


@app.command
def search(
    space: Annotated[Positional[str], arg(metavar="SPACE")] = "digits",
    *,
    name: str | None = None,
    storage: Path = STORAGE,
    tracking_uri: str | None = None,
    data: str | None = None,
    smoke: bool = False,
) -> int:
    """Search a space for early-bird tickets, retrain the winners, record everything in MLflow.

    Runs on all cores of this machine, or on the Ray cluster at RAY_ADDRESS.

    Args:
        space: a built-in space (see `raytickets spaces`), path/to/file.py, or
            package.module:function.
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
    console = Console()
    console.print(f"sweep [bold]{name}[/] in {storage / name}", soft_wrap=True)

    from raytickets.console import Progress, report_table
    from raytickets.plan import make_plan

    plan = make_plan(chosen, name=name, storage=storage)

    from raytickets.driver import SweepFailed, run
    from raytickets.tracking import resolve_uri, ui_command

    gc.enable()
    try:
        with Progress(console) as progress:
            run(plan, tracking_uri, progress)
        code = 0
    except SweepFailed as error:
        Console(stderr=True).print(f"raytickets: a stage failed: {error}", soft_wrap=True)
        code = FAILED
    except KeyboardInterrupt:
        console.print("interrupted; the same command with the sweep's name goes on:")
        console.print("  " + _again(name), soft_wrap=True, highlight=False)
        return INTERRUPTED
    console.print(report_table(_sweep(str(storage / name)).report()))
    console.print("Compare the tickets in MLflow:")
    console.print("  " + ui_command(resolve_uri(tracking_uri)), soft_wrap=True, highlight=False)
    return code


def _again(name: str) -> str:
    """The command line as it was given, with the sweep's name."""
    words = ["raytickets", *sys.argv[1:]]
    return " ".join(words if "--name" in words else [*words, "--name", name])


@app.command
def report(sweep: Positional[str], *, json: bool = False) -> int:
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
def show(ticket: Positional[str], *, json: bool = False) -> int:
    """Show how a ticket was found and what it keeps, after verifying its checksums.

    Args:
        ticket: the ticket's folder, or its id if it is in a sweep under ./sweeps.
        json: print its manifest as JSON.
    """
    from raytickets.console import ticket_table
    from raytickets.ticket import load_ticket

    found = load_ticket(_ticket(ticket))
    if json:
        print(_json(dict(found.manifest)))
    else:
        Console().print(ticket_table(found))
    return 0


@app.command
def retrain(
    ticket: Positional[str],
    *,
    epochs: int | None = None,
    weights: Literal["inherit", "reinit"] | None = None,
    tracking_uri: str | None = None,
) -> int:
    """Retrain one ticket of a sweep, with the sweep's recipe and on its data.

    Args:
        ticket: the ticket's folder, or its id if it is in a sweep under ./sweeps.
        epochs: train this long in place of the recipe's epochs.
        weights: go on from the ticket's weights, or draw new ones in its shape.
        tracking_uri: the MLflow store; else MLFLOW_TRACKING_URI, else sqlite:///mlflow.db here.
    """
    path = _ticket(ticket)
    console = Console()

    from raytickets.console import Progress
    from raytickets.driver import SweepFailed, retrain_ticket

    gc.enable()
    try:
        with Progress(console) as progress:
            done = retrain_ticket(
                path,
                epochs=epochs,
                weights=weights,
                tracking_uri=tracking_uri,
                observer=progress,
            )
    except SweepFailed as error:
        Console(stderr=True).print(f"raytickets: retraining failed: {error}", soft_wrap=True)
        return FAILED
    console.print(f"test accuracy {done['test_accuracy']:.2%}, saved as {done['path']}")
    return 0


@app.command
def spaces() -> int:
    """List the search spaces that come with raytickets."""
    console = Console()
    for name, file in built_in().items():
        summary = file.read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
        console.print(f"[bold]{name}[/]  {summary}", highlight=False)
    return 0


def _json(values: object) -> str:
    return json.dumps(values, indent=2)


def _sweep(given: str):
    from raytickets.sweep import Sweep

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
        )
    except KeyboardInterrupt:
        code = INTERRUPTED
    except ValueError as error:
        # InputError and DamagedTicket name the field and what is allowed in one line.
        print(f"raytickets: {error}", file=sys.stderr)
        code = BAD_INPUT
    sys.exit(code)
