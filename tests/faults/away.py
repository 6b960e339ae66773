"""What a tracking server costs a sweep that is dead from the start, or takes 5 s for every call.

    uv run python tests/faults/away.py --folder EMPTY

The same sweep each time, and an `mlflow server` on SQLite: there, dead, or slow. It has one
trajectory of fixed length, so that the server and the driver have a core of their own: with one on
each of two cores a sweep would gain by a server that does nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from faulty_server import Proxy, Server
from free_ports import free_ports
from timing import HEADER, interleave, machine, ratio, row

SLOW_S = 5.0
SPACE = """
from raytickets.config import *

def space():
    return SearchSpace(
        name="away",
        network=Network("cifar_vgg", {{"depth": 9, "width": 0.5}}),
        data=Data("digits", validation=0.1, test=0.1),
        penalties=(1e-4,),
        prune_ratios=(0.5,),
        training=Training(epochs={epochs}, batch_size=32, learning_rate=0.01),
        stop_rule=StopRule(window={epochs}, threshold=1e-9),
        retraining=Retraining(epochs=1, batch_size=32, learning_rate=0.01),
    )
"""


def sweep(folder: Path, uri: str, epochs: int) -> tuple[float, float, int]:
    """Seconds from the trajectory's first check to its last, those of the command, its exit code.

    The seconds of a check are told by the worker, who trains on once the driver asks it to.
    """
    folder.mkdir(parents=True)
    (folder / "space.py").write_text(SPACE.format(epochs=epochs))
    words = ["search", "space.py", "--name", "it", "--tracking-uri", uri]
    began = time.monotonic()
    ended = subprocess.run(
        [Path(sys.executable).parent / "raytickets", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    seconds = time.monotonic() - began
    lines = (folder / "sweeps/it/journal.jsonl").read_text().splitlines()
    checks = [event for event in map(json.loads, lines) if event["event"] == "check"]
    # 3 says that MLflow is owed events.
    assert ended.returncode in (0, 3), ended.stdout + ended.stderr
    assert len(checks) == epochs, f"{len(checks)} checks"
    return checks[-1]["seconds"] - checks[0]["seconds"], seconds, ended.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="an empty one to work in")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100)
    given = parser.parse_args()
    root = given.folder.resolve()
    root.mkdir(exist_ok=True)
    server = Server(root)
    server.start()
    slow = Proxy(server.address, delay=SLOW_S)
    addresses = {
        "there": server.address,
        "dead": f"http://127.0.0.1:{free_ports(1)[0]}",
        "slow": slow.address,
    }
    commands: dict[str, list[float]] = {name: [] for name in addresses}
    codes: dict[str, Counter[int]] = {name: Counter() for name in addresses}

    def one(name: str) -> float:
        folder = root / f"{name}-{len(commands[name])}"
        training, command, code = sweep(folder, addresses[name], given.epochs)
        commands[name].append(command)
        codes[name][code] += 1
        print(f"{name}: training {training:.2f} s, command {command:.1f} s", file=sys.stderr)
        return training

    functions: dict[str, Callable[[], float]] = {name: partial(one, name) for name in addresses}
    try:
        training = interleave(functions, given.runs, warm_up=False)
    finally:
        slow.close()
        server.kill()
    print(HEADER)
    for name, what in (("dead", "dead from the start"), ("slow", f"{SLOW_S:g} s for every call")):
        for figure, goal, seconds in (
            ("first check to last", "<= 1 %", training),
            ("whole command", "", commands),
        ):
            between = ratio(seconds[name], seconds["there"])
            more = [100 * (share - 1) for share in (between.value, between.low, between.high)]
            measured = f"{more[0]:+.2f} % ({more[1]:+.2f} to {more[2]:+.2f})"
            note = f"{median(seconds[name]):.1f} s, with MLflow {median(seconds['there']):.1f} s"
            note += f"; exit codes {dict(codes[name])}"
            print(row(f"MLflow {what}: {figure}, slower by", goal, measured, given.runs, note))
    print(f"\n{slow.calls.total()} calls were slow; exit codes with MLflow {dict(codes['there'])}")
    print(machine("ray", "mlflow"))


if __name__ == "__main__":
    main()
