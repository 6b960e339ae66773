"""Ray Tune as it comes beside raytickets: what a killed driver costs, and a tracking server that is
gone.

    uv run python tests/faults/versus.py --folder EMPTY

Both train two trajectories of the same network on digits for as many epochs. A driver is killed
with SIGKILL after so many trained epochs, and the same command is given again; counted are the
epochs that were trained more than once. Then the MLflow server dies in the middle, for good.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from faulty_server import Server

HERE = Path(__file__).parent
TOOLS = Path(sys.executable).parent
LONGEST_S = 900
SPACE = """
from raytickets.config import *

def space():
    return SearchSpace(
        name="versus",
        network=Network("cifar_vgg", {{"depth": 9, "width": 0.5}}),
        data=Data("digits", validation=0.1, test=0.1),
        penalties=(1e-4, 1e-3),
        prune_ratios=(0.5,),
        training=Training(epochs={epochs}, batch_size=32, learning_rate=0.01),
        stop_rule=StopRule(window={epochs}, threshold=1e-9),
        retraining=Retraining(epochs=1, batch_size=32, learning_rate=0.01),
    )
"""


def ours(folder: Path, uri: str, epochs: int) -> subprocess.Popen:
    (folder / "faults").mkdir(exist_ok=True)
    (folder / "faults/plan.json").write_text(
        '[{"kind": "worker killed in an epoch", "at": 1000000000}]'
    )
    (folder / "space.py").write_text(SPACE.format(epochs=epochs))
    words = ("search", "space.py", "--name", "it", "--tracking-uri", uri)
    environment = {"RAYTICKETS_FAULTS": folder / "faults", "PYTHONPATH": HERE / "injector"}
    return start([TOOLS / "raytickets", *words], folder, environment)


def stock(folder: Path, uri: str, epochs: int) -> subprocess.Popen:
    return start([sys.executable, HERE / "stock.py", folder, uri, epochs], folder, {})


def start(command: list, folder: Path, environment: dict) -> subprocess.Popen:
    everything = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            env={name: str(value) for name, value in everything.items()},
            stdout=output,
            stderr=output,
        )


def trained(folder: Path) -> int:
    """Epochs so far, repeated ones included."""
    stock, ours = folder / "epochs", folder / "faults/worker-killed-in-an-epoch"
    if ours.exists():
        return ours.stat().st_size
    return len(stock.read_text().splitlines()) if stock.exists() else 0


def wait(process: subprocess.Popen, until: Callable[[], bool]) -> None:
    while process.poll() is None and not until():
        time.sleep(0.05)


def killed(begin: Callable, folder: Path, epochs: int, after: int) -> int:
    """Epochs that were trained again after the driver was killed."""
    folder.mkdir()
    uri = f"sqlite:///{folder}/mlflow.db"
    process = begin(folder, uri, epochs)
    wait(process, lambda: trained(folder) >= after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(5)  # Ray's processes follow their driver.
    again = begin(folder, uri, epochs)
    assert again.wait(LONGEST_S) == 0, (folder / "output.txt").read_text()[-2000:]
    return trained(folder) - 2 * epochs


def gone(begin: Callable, folder: Path, epochs: int) -> tuple[int | None, float]:
    """The exit code and seconds of a sweep whose tracking server dies in the middle."""
    folder.mkdir()
    server = Server(folder)
    server.start()
    process = begin(folder, server.address, epochs)
    wait(process, lambda: trained(folder) >= epochs)
    died = time.monotonic()
    server.kill()
    try:
        code = process.wait(LONGEST_S)
    except subprocess.TimeoutExpired:
        process.kill()
        code = None
    return code, time.monotonic() - died


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--kills", type=int, nargs="+", default=[6, 20, 40, 60])
    given = parser.parse_args()
    root = given.folder.resolve()
    root.mkdir(exist_ok=True)
    print("| fault | Ray Tune as it comes | raytickets |\n|---|---|---|")
    for after in given.kills:
        again = [
            killed(begin, root / f"{begin.__name__}-{after}", given.epochs, after)
            for begin in (stock, ours)
        ]
        what = f"driver killed after {after} of {2 * given.epochs} epochs: epochs trained again"
        print(f"| {what} | {again[0]} | {again[1]} |", flush=True)
    ends = [gone(begin, root / f"{begin.__name__}-gone", given.epochs) for begin in (stock, ours)]
    cells = [
        f"not over after {LONGEST_S} s"
        if code is None
        else f"exit code {code} after {seconds:.0f} s"
        for code, seconds in ends
    ]
    print(f"| tracking server gone for good in the middle | {cells[0]} | {cells[1]} |")
    for begin in (stock, ours):
        print(begin.__name__, trained(root / f"{begin.__name__}-gone"), "epochs trained")


if __name__ == "__main__":
    main()
