"""A search on a cluster whose machines go: without a word, or after a notice."""

import json
import os
import subprocess
import sys
from itertools import chain
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

import raytickets.driver  # noqa: F401 - it sets what Ray reads when it is imported
from raytickets.config import Data, Network, Retraining, SearchSpace, StopRule
from raytickets.config import Training as Recipe
from raytickets.data import load_data
from raytickets.sweep import Sweep, select
from raytickets.trajectory import grid, prepare, run_trajectory

NETWORKS = """
import os
import time
from pathlib import Path
import ray
from torch import nn
from raytickets.models import cifar_vgg

class Watched(nn.Module):
    '''Writes on which node its training begins; there it stops in the middle while told to.'''

    def __init__(self, inner):
        super().__init__()
        self.inner, self.steps = inner, 0

    def forward(self, images):
        self.steps += self.training
        folder = Path(os.environ["NODES"])
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "none"
        if self.training and self.steps == 1:
            with (folder / "begun").open("a") as file:
                file.write(f"{node}\\n")
        while self.training and self.steps == 20 and (
            not (folder / "struck").exists() or (folder / f"stuck-{node}").exists()
        ):
            time.sleep(0.05)
        return self.inner(images)

def network(num_classes, in_channels):
    inner = cifar_vgg(num_classes=num_classes, in_channels=in_channels, depth=9, width=0.125)
    return Watched(inner)
"""

SEARCH = """
import json, os, sys, threading, time
from pathlib import Path
from raytickets.driver import ray, search
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
from raytickets.config import SearchSpace

what, folder, storage = sys.argv[1], Path(os.environ["NODES"]), sys.argv[3]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
going, checks = nodes[1], []

def announce(seconds):
    deadline = int((time.time() + seconds) * 1000)
    client = GcsClient(address=cluster.address)
    reason = DRAIN_NODE_REASON_PREEMPTION
    accepted, why = client.drain_node(going.node_id, reason, "it was told to go", deadline)
    assert accepted, why
    with (folder / "begun").open("a") as file:
        file.write("notice\\n")

def strike():
    match what:
        case "removed":
            (folder / f"stuck-{going.node_id}").touch()  # A worker may outlive its node a little.
            cluster.remove_node(going, allow_graceful=False)
        case "taken":
            (folder / f"stuck-{going.node_id}").touch()
            announce(5)
            threading.Timer(6, cluster.remove_node, (going, False)).start()
        case "noticed":
            announce(600)
    (folder / "struck").touch()

def hear(event):
    if event["event"] == "check" and event["epoch"] == 2:
        checks.append(event)
        if len(checks) == 2:
            strike()

space = SearchSpace.from_dict(json.loads(sys.argv[2]))
search(space, name="it", storage=storage, observer=hear)
alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
(folder / "end").write_text(json.dumps({"gone": going.node_id, "alive": alive}))
ray.shutdown()
cluster.shutdown()
"""


ALONE = """
import json, os, subprocess, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster
from raytickets.sweep import Sweep, select

folder, loopback = Path(os.environ["NODES"]), {"node_ip_address": "127.0.0.1"}
sweep = Sweep(folder / "it")
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **loopback})
node = cluster.add_node(num_cpus=1, **loopback)
command = [sys.executable, "-m", "raytickets.cli", *sys.argv[1:], "--address", cluster.address]
said = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

def half_way():
    events = sweep.events() if (sweep.path / "journal.jsonl").exists() else []
    return any(event["epoch"] == 2 for event in select(events, "check"))

first = subprocess.Popen(command, **said)
while first.poll() is None and not half_way():
    time.sleep(0.2)
cluster.remove_node(node, allow_graceful=False)
_, errors = first.communicate()
(folder / "struck").touch()  # Not before: a worker may outlive its node a little.
end = {"errors": errors, "report": sweep.report(), "left": sweep.events()}
cluster.add_node(num_cpus=1, **loopback)
again = subprocess.run(command, **said)
end |= {"codes": [first.returncode, again.returncode], "again": again.stderr}
(folder / "end").write_text(json.dumps(end))
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    place = tmp_path_factory.mktemp("networks")
    (place / "nets.py").write_text(NETWORKS)
    return SearchSpace(
        name="tiny",
        network=Network(f"{place}/nets.py:network"),
        data=Data("digits", limit=256),
        penalties=(1e-3, 3e-3, 1e-2, 3e-2),
        prune_ratios=(0.3, 0.5),
        training=Recipe(epochs=5, learning_rate=0.05, batch_size=32),
        stop_rule=StopRule(window=3, threshold=0.5),
        retraining=Retraining(epochs=1, batch_size=32, num_workers=1),
        winners=1,
    )


@pytest.fixture(scope="module")
def undisturbed(space, tmp_path_factory):
    """The tickets that the trajectories draw without any Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "struck").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODES", str(folder))
        setting = prepare(space, load_data(space.data), folder)
        steps = [step for point in grid(space) for step in run_trajectory(setting, point)]
    return found(chain.from_iterable(steps))


def found(events):
    return {(event["trajectory"], event["ticket"]) for event in select(events, "ticket")}


@pytest.fixture
def search(space, tmp_path):
    """`search("removed")` is a sweep on two nodes, one of which is to go in the middle.

    `removed` without a word, `taken` at the end of its notice, or `noticed` long before.
    """

    def run(what):
        command = [sys.executable, "-c", SEARCH, what, json.dumps(space.as_dict()), tmp_path]
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        env = {**os.environ, "NODES": str(tmp_path), "MLFLOW_TRACKING_URI": uri}
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        runs = MlflowClient(uri).search_runs(["1"], "tags.`raytickets.kind` = 'trajectory'")
        retries = {run.data.tags["raytickets.run"]: run.data.metrics.get("retries") for run in runs}
        before, _, after = (tmp_path / "begun").read_text().partition("notice\n")
        return SimpleNamespace(
            sweep=Sweep(tmp_path / "it"),
            before=before.split(),
            after=after.split(),
            retries={name: count for name, count in retries.items() if count},
            **json.loads((tmp_path / "end").read_text()),
        )

    return run


def assert_done(swept, undisturbed, retries):
    """Nothing differs but for these retries, which the report and MLflow tell of too."""
    events, report = swept.sweep.events(), swept.sweep.report()
    assert found(events) == undisturbed
    assert report["state"] == "done"
    assert [row["test_accuracy"] is not None for row in report["winners"]] == [True]
    assert dict.fromkeys(retries, 1) == report["retries"] == swept.retries


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_is_removed_costs_nothing_but_time(search, undisturbed):
    swept = search("removed")
    (retry,) = select(swept.sweep.events(), "retry")
    assert retry["reason"].startswith("its worker was lost: ")
    assert_done(swept, undisturbed, [retry["trajectory"]])
    assert swept.before.count(swept.gone) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_is_taken_at_the_end_of_its_notice_costs_nothing_but_time(search, undisturbed):
    swept = search("taken")
    (retry,) = select(swept.sweep.events(), "retry")
    assert retry["reason"] == "its machine was given notice, and taken at its end"
    assert_done(swept, undisturbed, [retry["trajectory"]])
    assert swept.before.count(swept.gone) == 1
    assert swept.gone not in swept.after


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_was_given_notice_ends_its_trajectory_and_begins_nothing(search, undisturbed):
    """There is time for that; Ray then takes the node from the cluster itself."""
    swept = search("noticed")
    assert_done(swept, undisturbed, [])
    assert swept.before.count(swept.gone) == 1
    assert swept.gone not in [*swept.after, *swept.alive]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_whose_only_machine_goes_ends_by_the_deadline_and_goes_on_later(
    space, undisturbed, tmp_path
):
    (tmp_path / "mine.py").write_text(
        "from raytickets.config import SearchSpace\n"
        f"def space():\n    return SearchSpace.from_dict({space.as_dict()!r})\n"
    )
    command = ["search", f"{tmp_path}/mine.py", "--name", "it", "--storage", str(tmp_path)]
    env = os.environ | {
        "NODES": str(tmp_path),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "RAYTICKETS_DEADLINE_S": "5",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # which lets Ray keep to loopback
        "RAY_enable_autoscaler_v2": "0",  # of which this cluster has none
    }
    script = [sys.executable, "-c", ALONE, *command]
    done = subprocess.run(script, capture_output=True, text=True, timeout=850, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    end = json.loads((tmp_path / "end").read_text())
    assert end["codes"] == [3, 0], end

    reason = "no machine with 1 CPU came within 5 s (RAYTICKETS_DEADLINE_S)"
    assert end["errors"].splitlines()[-1] == f"raytickets: {reason}"
    assert "no machine with 1 CPU yet: waited 0 of 5 s" in end["errors"]
    assert end["left"][-1] == {"event": "end", "state": "failed", "reason": reason}
    (lost,) = end["report"]["retries"]
    assert end["report"]["interrupted"] == [lost]
    assert not end["report"]["trajectories"]

    sweep = Sweep(tmp_path / "it")
    assert sweep.events()[: len(end["left"])] == end["left"]
    assert found(sweep.events()) == undisturbed
    assert sweep.report()["state"] == "done"
