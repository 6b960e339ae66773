"""`raytickets search` on a Ray cluster, as a file for `ray submit` and `ray job submit`.

The arguments are those of `raytickets search`; `--storage` is RAYTICKETS_STORAGE unless given.
Before the sweep starts, the autoscaler is asked for room for all trajectories at once.
"""

import functools
import logging
import os
import sys
import time

import tyro
from tyro.conf import FlagCreatePairsOff

from raytickets import cli
from raytickets.config import InputError, SearchSpace
from raytickets.spaces import load_space

PATIENCE_S = 180
"""How long after the latest machine came the sweep starts on what there is."""
DEADLINE_S = 1800
"""How long no machine at all may come: from launching one to having installed everything."""


def main() -> int:
    # Without an address Ray would start a cluster of its own beside the one that runs here.
    os.environ.setdefault("RAY_ADDRESS", "auto")
    words = sys.argv[1:]
    storage = os.environ.get("RAYTICKETS_STORAGE")
    if storage and not any(word.partition("=")[0] == "--storage" for word in words):
        words += ["--storage", storage]
    try:
        prepare(asked_for(words))
    except InputError as error:
        print(f"raytickets: {error}", file=sys.stderr)
        return cli.BAD_INPUT
    except TimeoutError as error:
        print(f"raytickets: {error}", file=sys.stderr)
        return cli.FAILED
    sys.argv = ["raytickets", "search", *words]
    cli.main()
    raise AssertionError("the command line exits")


def asked_for(words: list[str]) -> SearchSpace:
    """The space that these arguments of `raytickets search` name; InputError if there is none."""

    @functools.wraps(cli.search)
    def load(space: str = "digits", *, smoke: bool = False, **_: object) -> SearchSpace:
        return load_space(space, smoke=smoke)

    return tyro.cli(load, prog="raytickets search", args=words, config=(FlagCreatePairsOff,))


def prepare(space: SearchSpace) -> None:
    """Connect to Ray, ask for room for every trajectory, and wait until there is some.

    Raises InputError if no Ray cluster answers, TimeoutError if no machine comes that has room.
    """
    from raytickets.driver import ray  # which first sets what Ray reads when it is imported

    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        address = os.environ["RAY_ADDRESS"]
        raise InputError("RAY_ADDRESS", address, "no Ray cluster answers") from error

    from ray.autoscaler.sdk import request_resources

    asked = {"CPU": space.resources.cpus_per_trial, "GPU": space.resources.gpus_per_trial}
    needed = {kind: amount for kind, amount in asked.items() if amount}
    wanted = trajectory_count(space)

    def room() -> int:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fits = (min(int(node.get(k, 0) / amount) for k, amount in needed.items()) for node in nodes)
        return sum(fits)

    found, since = room(), time.monotonic()
    if found >= wanted:
        return
    print(f"asking for room for {wanted} trajectories, there is room for {found}", flush=True)
    request_resources(bundles=[needed] * wanted)
    try:
        while found < wanted and time.monotonic() - since < (PATIENCE_S if found else DEADLINE_S):
            time.sleep(1)
            if (now := room()) != found:
                found, since = now, time.monotonic()
                print(f"there is room for {found}", flush=True)
    finally:
        # The request would outlive this process. Idle machines stay for `idle_timeout_minutes`.
        request_resources(bundles=[])
    if not found:
        raise TimeoutError(f"no machine with {needed} came within {DEADLINE_S // 60} minutes")


def trajectory_count(space: SearchSpace) -> int:
    if space.optuna is not None:
        return space.optuna.trajectories
    return len(space.penalties) * len(space.seeds)


if __name__ == "__main__":
    sys.exit(main())
