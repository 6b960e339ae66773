"""Connecting to Ray, and what there is room for on it."""

import contextlib
import logging
import os
import re
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
import torch
from ray._private import ray_constants
from ray._private import state as ray_state
from ray._private import worker as ray_worker
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated import autoscaler_pb2
from ray.exceptions import RayError
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from raytickets.config import InputError, SearchSpace, expanded
from raytickets.plan import deadline_s, ray_address

LOOK_S = 1.0
"""How long not to look for machines again."""
_ANSWER_S = 30.0

log = logging.getLogger("raytickets")


class NoRoom(TimeoutError):
    """No machine with room for a trial came before the deadline."""


@dataclass(frozen=True)
class Room:
    """What one trial takes, and how many fit."""

    cpus: int
    gpus: float
    slots: int
    """Trials that fit now."""
    most: int
    """Trials worth asking for at once: `slots`, or more on a cluster that can grow."""
    workers: int
    """`workers_now` when the sweep starts; there may be others when retraining begins."""

    @property
    def needed(self) -> dict[str, float]:
        """What one trial takes, as Ray calls it."""
        return _needed(self.cpus, self.gpus)


@contextlib.contextmanager
def connected(
    space: SearchSpace, address: str | None = None, wanted: int | None = None
) -> Iterator[Room]:
    """Ray, and what there is room for on it; Ray is left again if it was not connected before.

    Ray is at `address`, else at RAY_ADDRESS, else started here and listens on loopback alone.
    `wanted` is how many trials there are to do; None are the trajectories of a sweep. Where a
    cluster has no room yet but can grow, waits for its first machine with room, at most
    `RAYTICKETS_DEADLINE_S` seconds. Raises InputError if no Ray answers, if it listens off loopback
    without a token, and if no machine that it has or can get has what one trial takes; NoRoom if
    none came by the deadline.
    """
    deadline = deadline_s()
    started = not ray.is_initialized()
    with contextlib.ExitStack() as stack:
        if started:
            address = _connect(address)
            if address == "local":
                stack.enter_context(_agents_end_with_us())
            stack.callback(ray.shutdown)
        autoscaler = _Autoscaler(expected=started and address != "local")
        wanted = space.trajectories if wanted is None else wanted
        yield _room(space, wanted, deadline, autoscaler)


# Connecting


def _connect(address: str | None) -> str:
    """The address, once connected to Ray there; `local` if it was started here."""
    field, address = ray_address(address)
    if address == "local":
        # Whoever can read the token that Ray keeps there can run code as its owner.
        tokens = expanded("HOME", "~/.ray")
        tokens.mkdir(mode=0o700, exist_ok=True)
        tokens.chmod(0o700)
        with _loopback():
            # Ray counts GPUs that the installed torch or driver may not be able to use.
            gpus = None if torch.cuda.is_available() else 0
            _init(address, include_dashboard=False, num_gpus=gpus)
        return address
    host = urlsplit(f"//{address}").hostname or ""
    try:
        with _loopback() if _is_loopback(host) else contextlib.nullcontext():
            _init(address)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(field, address, f"no Ray cluster answers ({first})") from error
    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    open_to_all = sorted(host for host in hosts if not _is_loopback(host))
    if open_to_all and not is_token_auth_enabled():
        ray.shutdown()
        mode = os.environ.get("RAY_AUTH_MODE")
        allowed = f"must be token, as Ray listens on {open_to_all[0]} (see cluster/README.md)"
        raise InputError("RAY_AUTH_MODE", mode, allowed)
    return address


def _init(address: str, **options: Any) -> None:
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    # Else Ray takes the machine's address where it is told 127.0.0.1.
    kept = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = kept


_AGENT = re.compile(rb"^ray::\w*Agent|/agent(/main)?\.py")
"""A command line: an agent's title, or until it has set one its script."""


@contextlib.contextmanager
def _agents_end_with_us() -> Iterator[None]:
    """However this process ends: if it is killed, Ray's agents would take another minute."""
    node = ray_worker._global_node
    assert node is not None
    raylet = node.all_processes[ray_constants.PROCESS_TYPE_RAYLET][0].process
    children: list[str] = []
    for thread in Path(f"/proc/{raylet.pid}/task").glob("*/children"):
        for pid in thread.read_text().split():
            with contextlib.suppress(OSError):  # It may have ended.
                # Workers end long before, and their numbers are used again.
                if _AGENT.search(Path(f"/proc/{pid}/cmdline").read_bytes()):
                    children.append(pid)
    script = ["sh", "-c", 'read _; kill -KILL "$@"', "sh", *children]
    # Its input ends when this process does.
    watch = subprocess.Popen(script, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        watch.kill()
        watch.wait()


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# Room


def _room(space: SearchSpace, wanted: int, deadline: float, autoscaler: "_Autoscaler") -> Room:
    cpus, gpus = space.resources.cpus_per_trial, space.resources.gpus_per_trial
    try:
        if gpus is None:
            one = {"CPU": cpus, "GPU": 1.0}
            gpus = 1.0 if _slots(one) or autoscaler.can_bring(one, 1) else 0.0
        needed = _needed(cpus, gpus)
        slots = _slots(needed)
        if not slots and autoscaler.can_bring(needed, 1) is False:
            _refuse(needed)
        most = autoscaler.most(needed, slots, wanted)
        if not slots:
            autoscaler.can_bring(needed, most)  # The last number asked for may have been too many.
            waiting = Waiting(needed, deadline)
            while not (slots := waiting.look()):
                time.sleep(LOOK_S)
    finally:
        autoscaler.withdraw()
    return Room(cpus, gpus, slots, max(slots, most), workers_now(gpus))


def _needed(cpus: int, gpus: float) -> dict[str, float]:
    return {"CPU": float(cpus)} | ({"GPU": gpus} if gpus else {})


def workers_now(gpus: float) -> int:
    """GPUs that the cluster has now if a trial takes any, else CPUs."""
    kind = "GPU" if gpus else "CPU"
    return int(sum(machine.get(kind, 0) for machine in _machines()))


def leaving() -> Collection[str]:
    """Ids of the nodes that were given notice, as spot machines are: Ray starts nothing there."""
    return ray_state.state.get_draining_nodes()


def _machines(noticed: bool = False) -> list[dict[str, float]]:
    """What those alive have, with or without those that were given notice."""
    left_out = () if noticed else leaving()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in left_out]
    return [node["Resources"] for node in nodes]


def _slots(needed: Mapping[str, float], noticed: bool = False) -> int:
    """How many trials that need this fit on the machines there are."""
    return sum(
        min(_times(machine.get(kind, 0), amount) for kind, amount in needed.items())
        for machine in _machines(noticed)
    )


def _times(there: float, amount: float) -> int:
    """How often an amount fits; a share of a GPU is all on one."""
    if amount < 1:
        return int(there) * int(1 / amount + 1e-9)
    return int(there / amount)


def _refuse(needed: Mapping[str, float]) -> None:
    most = {kind: max(machine.get(kind, 0) for machine in _machines()) for kind in needed}
    lacking = [kind for kind, amount in needed.items() if amount > most[kind]]
    if len(lacking) != 1:
        allowed = "no machine of the cluster has all of this, nor can it get one that does"
        raise InputError("resources", {k: f"{amount:g}" for k, amount in needed.items()}, allowed)
    kind = lacking[0]
    amount = needed[kind]
    allowed = f"no machine of the cluster has over {most[kind]:g}, nor can it get one that does"
    field = f"resources.{kind.lower()}s_per_trial"
    raise InputError(field, int(amount) if amount == int(amount) else amount, allowed)


class Waiting:
    """For machines with room for at least so many times what is needed, with a line a minute.

    One that was given notice has none, unless `noticed` says that what runs there goes on.
    """

    def __init__(
        self, needed: Mapping[str, float], deadline: float, noticed: bool = False, least: int = 1
    ):
        self._needed, self._deadline, self._noticed = needed, deadline, noticed
        self._least = least
        one = ", ".join(f"{amount:g} {kind}" for kind, amount in needed.items())
        self._what = f"machine with {one}" if least == 1 else f"room for {least} workers of {one}"
        self.end()

    def end(self) -> None:
        """There is room, or none is waited for any more."""
        self._since: float | None = None
        self._told = float("-inf")

    def look(self) -> int:
        """How many times it fits now, 0 for too few; NoRoom if so up to the deadline."""
        if (slots := _slots(self._needed, self._noticed)) >= self._least:
            self.end()
            return slots
        now = time.monotonic()
        if self._since is None:
            self._since = now
        waited = now - self._since
        if waited >= self._deadline:
            allowed = f"{self._deadline:g} s (RAYTICKETS_DEADLINE_S)"
            raise NoRoom(f"no {self._what} came within {allowed}")
        if waited - self._told >= 60:
            log.warning(f"no {self._what} yet: waited {waited:.0f} of {self._deadline:g} s")
            self._told = waited
        return 0


class _Autoscaler:
    """What the cluster's autoscaler can bring, by asking it.

    For a request that its `max_workers` cannot hold it brings nothing at all, and says so. What it
    was asked for outlives this process until it is withdrawn. The first autoscaler of Ray, which
    `RAY_enable_autoscaler_v2=0` stands for, does not say.
    """

    def __init__(self, expected: bool):
        """`expected` is whether the cluster may have one that has not told of itself yet."""
        told = _status().autoscaling_state.autoscaler_state_version > 0
        self._answers = told or (expected and is_autoscaler_v2(True, internal_kv_get_gcs_client()))
        self._expected, self._asked = expected, False

    def can_bring(self, needed: Mapping[str, float], count: int) -> bool | None:
        """Whether so many would fit, what there is included; they are on their way if so.

        None if nobody says, on a cluster that may grow nevertheless.
        """
        if self._answers:
            request_resources(bundles=[dict(needed)] * count)
            self._asked = True
            asked = _status().cluster_resource_state.cluster_resource_state_version
            deadline = time.monotonic() + _ANSWER_S
            while time.monotonic() < deadline:
                told = _status().autoscaling_state
                if told.last_seen_cluster_resource_state_version >= asked:
                    return not told.infeasible_cluster_resource_constraints
                time.sleep(LOOK_S)
            self._answers = False
        return None if self._expected else False

    def most(self, needed: Mapping[str, float], slots: int, wanted: int) -> int:
        """How many of `wanted` would fit, found by halving; all of them if nobody says."""
        if wanted <= slots or self.can_bring(needed, slots + 1) is False:
            return slots
        low, high, tried = slots + 1, wanted, wanted
        while low < high:
            if self.can_bring(needed, tried) is False:
                high = tried - 1
            else:
                low = tried
            tried = (low + high + 1) // 2
        return low

    def withdraw(self) -> None:
        if self._asked or self._answers:  # A driver that was killed may have asked.
            request_resources(bundles=[])


def _status() -> Any:
    """The message GetClusterStatusReply of Ray's autoscaler.proto."""
    reply = autoscaler_pb2.GetClusterStatusReply()  # pyright: ignore[reportAttributeAccessIssue]
    client = internal_kv_get_gcs_client()
    assert client is not None
    reply.ParseFromString(client.get_cluster_status(timeout_s=10))
    return reply
