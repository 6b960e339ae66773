"""What a tracking server that is dead, or takes 5 s for every call, costs a sweep's training.

    uv run python tests/faults/away.py --folder EMPTY

One sweep, so that the machine's own drift hits all alike: its `mlflow server` on SQLite is there,
dead or slow for a block of epochs at a time, in turns. It has one trajectory of fixed length, so
that the server and the driver have a core of their own: with one on each of two cores a sweep would
gain by a server that does nothing. In the end the server is there, and owed nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from faulty_server import Proxy, Server
from timing import HEADER, machine, ratio, row

SLOW_S = 5.0
ORDER = ("there", "dead", "slow", "there", "slow", "dead")
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


def switch(proxy: Proxy, state: str) -> None:
    proxy.dead = state == "dead"
    proxy.delay = SLOW_S if state == "slow" else 0.0


def checked(folder: Path) -> list[float]:
    """Seconds at which each epoch was over, as the worker tells them."""
    journal = folder / "sweeps/it/journal.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    events = map(json.loads, lines[:-1])  # The last one may not be whole.
    return [event["seconds"] for event in events if event["event"] == "check"]


def sweep(folder: Path, proxy: Proxy, states: Sequence[str], block: int) -> list[float]:
    """Seconds at which each epoch was over; the server's state changes after each block of them."""
    (folder / "space.py").write_text(SPACE.format(epochs=len(states) * block))
    words = ["search", "space.py", "--name", "it", "--tracking-uri", proxy.address]
    with (folder / "output.txt").open("w") as output:
        command = subprocess.Popen(
            [Path(sys.executable).parent / "raytickets", *words],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
        while command.poll() is None:
            over = len(checked(folder)) // block
            switch(proxy, (*states, "there")[min(over, len(states))])
            time.sleep(0.5)
    assert command.returncode == 0, (folder / "output.txt").read_text()[-2000:]
    return checked(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="an empty one to work in")
    parser.add_argument("--rounds", type=int, default=20, help="blocks of epochs in each state")
    parser.add_argument("--block", type=int, default=15, help="epochs; three more lead over to it")
    given = parser.parse_args()
    root = given.folder.resolve()
    root.mkdir(exist_ok=True)
    server = Server(root)
    server.start()
    proxy = Proxy(server.address)
    block = given.block + 3
    states = (ORDER * given.rounds)[: 3 * given.rounds]
    try:
        over = sweep(root, proxy, states, block)
    finally:
        proxy.close()
        server.kill()
    assert len(over) == len(states) * block, len(over)
    epochs = [0.0, *(after - before for before, after in pairwise(over))]
    seconds: dict[str, list[float]] = {state: [] for state in ORDER[:3]}
    for place, state in enumerate(states):
        seconds[state].append(median(epochs[place * block + 3 : (place + 1) * block]))
    print(HEADER)
    for state, what in (("dead", "dead"), ("slow", f"{SLOW_S:g} s for every call")):
        between = ratio(seconds[state], seconds["there"])
        more = [100 * (share - 1) for share in (between.value, between.low, between.high)]
        measured = f"{more[0]:+.2f} % ({more[1]:+.2f} to {more[2]:+.2f})"
        note = f"median of {given.block} epochs of {median(seconds[state]):.3f} s, in turns"
        print(row(f"MLflow {what}: an epoch is slower by", "<= 1 %", measured, given.rounds, note))
    print(f"\n{dict(proxy.calls.most_common(3))}, {proxy.refused} refused; all was delivered")
    print(machine("ray", "mlflow"))


if __name__ == "__main__":
    main()
