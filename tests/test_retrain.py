"""Retraining: shares of a batch; lost workers, drivers and machines; damaged checkpoints."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_ticket import saved_ticket

import raytickets.driver  # noqa: F401 - it sets what Ray reads when it is imported
from raytickets.batches import Batches
from raytickets.config import Data, InputError, Network, Retraining, SearchSpace, Training
from raytickets.data import load_data
from raytickets.retrain import DENSE, RETRIES, Job, _Told, retrain, weigh, worker_count
from raytickets.sweep import select
from raytickets.ticket import load_ticket
from raytickets.train import accuracy, numerics

SPACE = SearchSpace(
    name="tiny",
    network=Network("cifar_vgg", {"depth": 9, "width": 0.125}),
    data=Data("digits", limit=128),
    penalties=(1e-3,),
    prune_ratios=(0.5,),
    training=Training(epochs=10),
    retraining=Retraining(epochs=3, batch_size=24, num_workers=2),
)
STEPS = 128 // 24


@pytest.mark.parametrize(
    ("asked", "batch", "available", "workers"),
    [
        (None, 64, 2, 2),
        (None, 128, 64, 4),
        (None, 30, 7, 1),
        (None, 64, 0, 1),
        (3, 64, 4, 3),
        ((2, 8), 64, 4, (2, 8)),
    ],
)
def test_workers_are_what_is_there_or_what_was_asked_for(asked, batch, available, workers):
    retraining = Retraining(epochs=3, batch_size=batch, num_workers=asked)
    space = dataclasses.replace(SPACE, retraining=retraining)
    assert worker_count(space, available) == workers


def test_a_group_that_starts_again_tells_nothing_twice_of_networks_that_are_done():
    heard = []
    told, epoch = _Told(heard.append), {"event": "epoch", "run": "a", "epoch": 1}
    whole = [epoch, {"event": "retrained", "run": "a"}]
    for event in [*whole, *whole, epoch | {"run": "b"}]:
        told.hear(event)
    assert heard == [*whole, epoch | {"run": "b"}]


def test_machines_that_were_taken_after_notice_count_towards_no_limit(tmp_path, monkeypatch):
    from ray.exceptions import RayActorError
    from ray.train import WorkerGroupError

    gone = RayActorError(error_msg="its machine was taken", preempted=True)
    failures = [WorkerGroupError("gone", {0: gone}) for _ in range(RETRIES + 3)]

    def run_group(*_):
        if failures:
            raise failures.pop()

    monkeypatch.setattr("raytickets.retrain._run_group", run_group)
    heard = []
    retrain(SPACE, [Job(DENSE, None)], None, tmp_path, 2, heard.append)
    assert [event["attempt"] for event in heard] == [1, 2, 3, 4, 5]
    assert heard[0]["reason"] == "worker 0: its machine was taken"


def test_a_network_that_cannot_be_retrained_leaves_the_others(tmp_path, monkeypatch):
    from ray.train import WorkerGroupError

    def run_group(_space, jobs, _data, _sweep, _workers, told, *_):
        for job in jobs:
            if job.run == "diverges":
                raise WorkerGroupError("gone", {0: FloatingPointError("no number")})
            if job.run == "kills":
                raise WorkerGroupError("gone", {0: RuntimeError("killed")})
            told.hear({"event": "retrained", "run": job.run})

    monkeypatch.setattr("raytickets.retrain._run_group", run_group)
    heard = []
    jobs = [Job(run, tmp_path) for run in (DENSE, "diverges", "kills", "last")]
    with pytest.raises(RuntimeError) as failed:
        retrain(SPACE, jobs, None, tmp_path, 2, heard.append)
    assert str(failed.value) == (
        "diverges: worker 0: FloatingPointError: no number; kills: worker 0: RuntimeError: killed"
    )
    assert [event["run"] for event in select(heard, "retrained")] == [DENSE, "last"]
    assert [event["run"] for event in select(heard, "retry")] == ["kills"] * RETRIES


@pytest.mark.parametrize("asked", [2, (2, 4)])
def test_more_workers_than_there_is_room_for_are_refused(asked):
    with pytest.raises(InputError, match=r"retraining\.num_workers: .*2.* room for 1"):
        worker_count(SPACE.with_retraining(num_workers=asked), 1)


@given(batch=st.integers(1, 40), data=st.data())
def test_the_average_over_uneven_shares_is_the_gradient_of_the_whole_batch(batch, data):
    world = data.draw(st.integers(1, batch))
    generator = torch.Generator().manual_seed(batch)
    images = torch.randn(batch, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (batch,), generator=generator)

    def gradient(rank, world):
        network = torch.nn.Linear(6, 4, bias=False, dtype=torch.float64)
        torch.nn.init.constant_(network.weight, 0.1)
        share = labels[rank::world]
        weigh(network, len(share) / batch * world)
        F.cross_entropy(network(images[rank::world]), share).backward()
        return network.weight.grad

    averaged = sum(gradient(rank, world) for rank in range(world)) / world
    assert torch.allclose(averaged, gradient(0, 1), rtol=1e-12, atol=1e-15)


NETWORKS = """
import os
import signal
import time
from pathlib import Path
import torch
from torch import nn
from raytickets import checkpoint, train
from raytickets.models import cifar_vgg

train.PART = 2

class Watched(nn.Module):
    '''Writes a byte for every training step; dies at some steps of a worker, each time once.'''

    def __init__(self, inner, folder, deaths, pause_s):
        super().__init__()
        self.inner, self.folder, self.pause_s, self.steps = inner, Path(folder), pause_s, 0
        self.deaths = {tuple(death) for death in deaths}

    def forward(self, images):
        if self.training:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            self.steps += 1
            time.sleep(self.pause_s)
            with (self.folder / f"steps-{rank}").open("a") as file:
                file.write(".")
            flag = self.folder / f"died-{rank}-{self.steps}"
            if (rank, self.steps) in self.deaths and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if (self.folder / "never").exists():
                raise RuntimeError("there is no way")
        return self.inner(images)

def network(num_classes, in_channels, folder, deaths=(), pause_s=0, interval_s=60):
    checkpoint.INTERVAL_S = interval_s
    inner = cifar_vgg(num_classes=num_classes, in_channels=in_channels, depth=9, width=0.125)
    return Watched(nn.Sequential(inner, nn.Dropout(0.1)), folder, deaths, pause_s)

def plain(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, num_classes)
    )
"""


class Retrainings:
    """Retrains a ticket of a network that is watched, in a sweep's folder of its own."""

    def __init__(self, folder, deaths=(), **options):
        import ray

        folder.mkdir()
        self.folder = folder
        (folder / "nets.py").write_text(NETWORKS)
        options |= {"folder": str(folder), "deaths": [list(death) for death in deaths]}
        self.space = dataclasses.replace(
            SPACE, network=Network(f"{folder}/nets.py:network", options)
        )
        self.ticket = saved_ticket(folder / "tickets", self.space.network)
        self.data = ray.put(load_data(SPACE.data))

    def __call__(self, on_event=lambda _: None, **recipe):
        """The events, each once."""
        events = []

        def hear(event):
            if event not in events:
                events.append(event)
                on_event(event)

        space = self.space.with_retraining(**recipe)
        jobs = [Job(self.ticket.id, self.ticket.path)]
        workers = space.retraining.num_workers
        retrain(space, jobs, self.data, self.folder, workers, hear)
        return events

    def steps(self, rank=0):
        return (self.folder / f"steps-{rank}").stat().st_size

    def checkpoints(self):
        return sorted((self.folder / "checkpoints").glob("*/*/*.safetensors"))

    def weights(self, events):
        (done,) = select(events, "retrained")
        return load_ticket(self.folder / done["path"], trust_code=True).network().state_dict()


def told(events):
    """What does not depend on the clock or the folder."""
    keys = ("event", "epoch", "loss", "validation_accuracy", "test_accuracy", "best_epoch")
    return [{key: e.get(key) for key in keys} for e in events if e["event"] != "retry"]


def assert_same(weights, others):
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture(scope="module")
def calm(ray_instance, tmp_path_factory):  # noqa: ARG001
    """An undisturbed retraining: its events and its weights."""
    undisturbed = Retrainings(tmp_path_factory.mktemp("calm") / "sweep")
    events = undisturbed()
    assert undisturbed.steps(0) == undisturbed.steps(1) == 3 * STEPS
    return events, undisturbed.weights(events)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_lost_worker_costs_nothing_but_time(calm, tmp_path, seed):
    """Final weights after a worker was killed at a random step are those of an undisturbed run."""
    dice = random.Random(seed)
    death = (seed % 2, dice.randint(1, 3 * STEPS))
    disturbed = Retrainings(tmp_path / "sweep", [death])
    events = disturbed()
    (lost,) = select(events, "retry")
    assert lost["run"] == disturbed.ticket.id
    assert lost["attempt"] == 1
    assert lost["reason"].startswith(f"worker {death[0]}: The actor"), lost
    # A worker that was not killed may have begun the step after.
    repeated = death[1] - (death[1] - 1) // STEPS * STEPS
    assert 3 * STEPS + repeated - 1 <= disturbed.steps(death[0]) <= 3 * STEPS + repeated
    assert told(events) == told(calm[0])
    assert_same(disturbed.weights(events), calm[1])


@pytest.mark.slow
def test_a_lost_worker_is_replaced_within_an_epoch(calm, tmp_path):
    disturbed = Retrainings(tmp_path / "sweep", [(1, 2 * STEPS)], interval_s=0)
    events = disturbed()
    assert len(select(events, "retry")) == 1
    # There are checkpoints after the second and the fourth step of an epoch; the last one may have
    # been on its way to the disk.
    assert 3 * STEPS < disturbed.steps(1) <= 3 * STEPS + 3
    assert told(events) == told(calm[0])
    assert_same(disturbed.weights(events), calm[1])


@pytest.mark.slow
def test_a_driver_that_stops_goes_on_from_the_last_epoch(calm, tmp_path):
    # Else its workers may come to the end before they hear of it.
    retraining = Retrainings(tmp_path / "sweep", pause_s=0.2)

    def full(event):
        if event.get("epoch") == 2:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        retraining(full)
    newest = retraining.checkpoints()[-1]
    # The workers may have come further before they were stopped.
    epoch = int(newest.name.partition("-")[0])
    assert epoch >= 2
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    before = retraining.steps()
    events = retraining()
    # The newest checkpoint is damaged: its epoch is trained again, and those after it.
    assert retraining.steps() - before == (4 - epoch) * STEPS
    (retry,) = select(events, "retry")
    assert retry["attempt"] == 1
    assert newest.name in retry["reason"]
    assert retry["reason"].endswith(f"goes on from epoch {epoch - 1}")
    assert told(events) == told(calm[0])
    assert_same(retraining.weights(events), calm[1])

    assert [path.name[:8] for path in retraining.checkpoints()] == ["00000004"]

    # What ended is only told again, by the same recipe; another one begins at its beginning.
    before = retraining.steps()
    again = [event for event in retraining() if event["event"] != "retry"]
    assert again == [event for event in events if event["event"] != "retry"]
    assert retraining.steps() == before
    # But a retrained ticket that is gone is made again.
    shutil.rmtree(retraining.folder / select(events, "retrained")[0]["path"])
    anew = retraining()
    assert retraining.steps() == before + 3 * STEPS
    assert select(anew, "retry")[-1]["reason"] == "damaged: the retrained ticket; begins again"
    assert told(anew) == told(calm[0])
    assert_same(retraining.weights(anew), calm[1])
    before = retraining.steps()
    other = retraining(epochs=2)
    assert retraining.steps() == before + 2 * STEPS
    assert [event["epoch"] for event in select(other, "epoch")] == [1, 2]
    (done,) = select(other, "retrained")
    assert done["recipe"] == json.loads(json.dumps(done["recipe"]))
    recipe = Retraining(**done["recipe"] | {"milestones": ()})
    assert recipe == retraining.space.with_retraining(epochs=2).retraining


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_workers_that_get_nowhere_are_given_up(tmp_path):
    retraining = Retrainings(tmp_path / "sweep")
    (retraining.folder / "never").touch()
    events = []
    with pytest.raises(Exception, match="there is no way"):
        retraining(events.append, num_workers=1)
    assert [event["event"] for event in events] == ["retry"] * RETRIES
    assert [event["attempt"] for event in events] == [1, 2]
    assert events[0]["reason"] == "worker 0: RuntimeError: there is no way"
    assert retraining.steps() == 1 + RETRIES
    (retraining.folder / "never").unlink()
    with pytest.raises(Exception, match=f"{retraining.ticket.id} diverged in epoch 1"):
        retraining(events.append, num_workers=1, learning_rate=1e30)
    assert len(events) == RETRIES


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_two_workers_with_uneven_shares_train_as_one(tmp_path):
    import ray

    (tmp_path / "nets.py").write_text(NETWORKS)
    network = Network(f"{tmp_path}/nets.py:plain")  # BatchNorm has statistics for each worker.
    space = dataclasses.replace(SPACE, network=network, precision="float32")
    data = ray.put(load_data(SPACE.data))
    losses = []
    for workers in (1, 2):
        one = space.with_retraining(batch_size=25, num_workers=workers)
        events = []
        folder = tmp_path / str(workers)
        retrain(one, [Job(DENSE, None)], data, folder, workers, events.append)
        assert [event["num_workers"] for event in events] == [workers] * 4
        assert events[-1]["path"] is None
        losses.append([event["loss"] for event in events[:-1]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] > 1.1 * losses[0][-1]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_two_workers_share_the_evaluation_and_tell_of_the_whole(tmp_path):
    import ray

    images = Data("digits", validation=0.4, test=0.3)  # Two batches of evaluation each.
    space = dataclasses.replace(SPACE, data=images, precision="float32")
    dataset, events = load_data(images), []
    ticket = saved_ticket(tmp_path / "tickets")
    retrain(space, [Job(ticket.id, ticket.path)], ray.put(dataset), tmp_path, 2, events.append)
    done = events[-1]
    network = load_ticket(tmp_path / done["path"]).network()
    how, alone = numerics("float32", True, network), Batches(dataset, images)
    how.place(network)
    for split in ("validation", "test"):
        assert done[f"{split}_accuracy"] == accuracy(network, alone, split, how)
    assert done["validation_accuracy"] == events[-2]["validation_accuracy"]


RESIZED = """
import functools, json, sys, threading
from pathlib import Path
from raytickets.driver import ray
from ray.cluster_utils import Cluster
from raytickets import retrain as module
from raytickets.config import *
from raytickets.data import load_data
from raytickets.retrain import DENSE, Job, ScalingConfig, retrain, worker_count
from raytickets.room import NoRoom

module.LEAST_IMAGES = 12
module.ScalingConfig = functools.partial(ScalingConfig, elastic_resize_monitor_interval_s=3)
folder, asked, here, there, epochs = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": int(here)})
other = cluster.add_node(num_cpus=1) if there == "goes" else None
ray.init(address=cluster.address, log_to_driver=False)
asked = {"pair": (1, 2), "any": None, "two": 2, "more": (2, 3)}[asked]
space = SearchSpace(
    name="tiny",
    network=Network("cifar_vgg", {"depth": 9, "width": 0.125}),
    data=Data("digits", limit=128),
    penalties=(1e-3,),
    prune_ratios=(0.5,),
    training=Training(epochs=10),
    retraining=Retraining(epochs=int(epochs), batch_size=25, num_workers=asked),
)
under_way, heard = threading.Event(), set()

class Grown(Exception):
    pass

def hear(event):
    if event["event"] != "epoch" or event["epoch"] not in heard:
        print(json.dumps(event), flush=True)
    heard.add(event.get("epoch"))
    if event.get("epoch") == 3:
        under_way.set()
    if there == "comes" and event.get("num_workers") == 2:
        raise Grown

def train():
    try:
        retrain(space, [Job(DENSE, None)], data, Path(folder), workers, hear)
    except (Grown, NoRoom) as error:
        print(error)

data, workers = ray.put(load_data(space.data)), worker_count(space, int(here) + bool(other))
training = threading.Thread(target=train)
training.start()
under_way.wait()
if other:
    cluster.remove_node(other, False)
else:
    cluster.add_node(num_cpus=1)
training.join()
ray.shutdown()
cluster.shutdown()
"""


def resized(folder, asked, here, there, epochs, **environment):
    """What is printed where so many workers are here and a machine for one more comes or goes."""
    command = [sys.executable, "-c", RESIZED, folder, asked, here, there, epochs]
    # How long a group waits for its workers before it is counted again what there is.
    env = {**os.environ, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15", **environment}
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    events = [json.loads(line) for line in lines if line.startswith('{"event"')]
    return events, lines


def sizes(events):
    return {event["epoch"]: event["num_workers"] for event in select(events, "epoch")}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("asked", ["pair", "any"])
def test_a_lost_machine_leaves_a_smaller_group(tmp_path, asked):
    events, _ = resized(tmp_path, asked, here=1, there="goes", epochs=150)
    assert select(events, "retry")
    found = sizes(events)
    assert list(found) == list(range(1, 151))
    assert [found[1], found[150]] == [2, 1]
    assert select(events, "retrained")[0]["num_workers"] == 1
    assert Path(tmp_path / "checkpoints" / DENSE).exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_new_machine_makes_a_larger_group(tmp_path):
    """It is ended then: how many epochs that takes is up to Ray."""
    events, _ = resized(tmp_path, "pair", here=1, there="comes", epochs=100_000)
    found = sizes(events)
    last = max(found)
    assert list(found) == list(range(1, last + 1))
    assert [found[1], found[last]] == [1, 2]
    assert not select(events, "retry")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("asked", "here", "what"),
    [
        ("any", 0, "machine with 1 CPU"),
        ("two", 1, "room for 2 workers of 1 CPU"),
        ("more", 1, "room for 2 workers of 1 CPU"),
    ],
)
def test_retraining_waits_no_longer_than_the_deadline(tmp_path, asked, here, what):
    environment = {"RAYTICKETS_DEADLINE_S": "20"}
    events, lines = resized(tmp_path, asked, here, there="goes", epochs=10_000, **environment)
    assert f"no {what} came within 20 s (RAYTICKETS_DEADLINE_S)" in lines
    assert not select(events, "retrained")
