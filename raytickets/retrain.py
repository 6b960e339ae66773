"""Retraining: winning tickets and the dense reference, data-parallel on Ray Train."""

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from ray.util.queue import Empty, Queue
from torch import nn

from raytickets import cost
from raytickets.batches import Batches
from raytickets.config import InputError, SearchSpace
from raytickets.data import DataSet
from raytickets.journal import Event
from raytickets.models import build_network
from raytickets.ticket import load_ticket, save_retrained
from raytickets.train import SGD, epoch_event, fit, numerics, retrained_event, seeded

DENSE = "dense"
"""The run of the dense reference."""

_STATE = "state.pt"


@dataclass(frozen=True)
class Job:
    """One network to retrain: a ticket's id, or `DENSE` with no path."""

    run: str
    path: Path | None


def worker_count(space: SearchSpace, available: int) -> int:
    """Workers to retrain with: those the space asks for, or the most that divide a batch.

    `available` counts the CPUs, or the GPUs if the space trains on them. Raises InputError if the
    space asks for more.
    """
    asked, batch = space.retraining.num_workers, space.retraining.batch_size
    if asked is None:
        return max(n for n in range(1, max(available, 1) + 1) if batch % n == 0)
    if asked > available:
        allowed = f"the cluster has room for {available}"
        raise InputError("retraining.num_workers", asked, allowed)
    return asked


def retrain(
    space: SearchSpace,
    jobs: Sequence[Job],
    data: "ray.ObjectRef[DataSet]",
    sweep: Path,
    num_workers: int,
    on_event: Callable[[Event], None],
) -> None:
    """Retrain the jobs one after the other on one group of Ray Train workers.

    `on_event` hears every epoch, and of each finished network once it is on disk under
    `sweep/retrained`, on a thread of its own. Raises what Ray Train raises when the workers fail
    more often than it restarts them.
    """
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = _Trainer(
        _train_worker,
        train_loop_config={
            "space": space,
            "jobs": list(jobs),
            "data": data,
            "sweep": sweep,
            "queue": queue,
        },
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=space.resources.gpus_per_trial > 0
        ),
        run_config=RunConfig(
            name=f"retrain-{jobs[0].run}-{time.time_ns()}",
            storage_path=str((sweep / "ray").resolve()),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=2),
        ),
    )
    over = threading.Event()
    listener = threading.Thread(target=_listen, args=(queue, on_event, over), daemon=True)
    listener.start()
    try:
        trainer.fit()
    finally:
        # Also after Ctrl-C: a thread that asks Ray for something while it shuts down is fatal.
        over.set()
        listener.join()
    queue.shutdown()


class _Trainer(TorchTrainer):
    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave Ctrl-C alone: Ray Train's handler outlives the training, and may exit with 0."""


def _listen(queue: Queue, on_event: Callable[[Event], None], over: threading.Event) -> None:
    while not over.is_set() or not queue.empty():
        with contextlib.suppress(Empty):
            on_event(queue.get(timeout=0.2))


def _train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: every job in turn, going on from a checkpoint if any."""
    data: ray.ObjectRef[DataSet] = config["data"]
    dataset = ray.get(data)
    state = _load_checkpoint()
    for place, job in enumerate(config["jobs"]):
        if state is None or place >= state["job"]:
            here = state if state is not None and place == state["job"] else None
            _retrain_one(config, job, place, dataset, here)


def _retrain_one(
    config: dict[str, Any],
    job: Job,
    place: int,
    dataset: DataSet,
    state: dict[str, Any] | None,
) -> None:
    space: SearchSpace = config["space"]
    recipe, started = space.retraining, time.monotonic()
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    network = _starting_network(space, job, dataset)
    macs = cost.macs(network, dataset.shape.example())
    how = numerics(space.precision, space.channels_last, network, get_device())
    parallel = prepare_model(how.place(network))
    batches = Batches(dataset, space.data, get_device())
    optimizer = SGD(parallel, recipe.momentum, recipe.weight_decay)
    if state is not None:
        network.load_state_dict(state["network"])
        for velocity, saved in zip(optimizer.velocity, state["velocity"], strict=True):
            velocity.copy_(saved)
    first = 0 if state is None else state["epoch"]

    def order(epoch: int) -> torch.Generator:
        return seeded("retrain", space.seeds[0], epoch)

    losses = fit(
        parallel, optimizer, batches, recipe, order, how, first=first, worker=(rank, world)
    )
    for epoch, (_, loss) in enumerate(losses, start=first + 1):
        if rank == 0:
            event = epoch_event(job.run, epoch, loss, network, batches, recipe, how)
            config["queue"].put(event)
        _report(place, epoch, network, optimizer)
    if rank == 0:
        event = retrained_event(job.run, started, network, macs, batches, recipe, how, world)
        if job.path is not None:
            ticket = save_retrained(config["sweep"] / "retrained", job.path, network, event)
            event["path"] = str(ticket.path.relative_to(config["sweep"]))
        config["queue"].put(event)


def _starting_network(space: SearchSpace, job: Job, dataset: DataSet) -> nn.Module:
    if job.path is None:
        return build_network(
            space.network,
            in_channels=dataset.shape.channels,
            num_classes=len(dataset.shape.classes),
            seed=space.seeds[0],
        )
    ticket = load_ticket(job.path, trust_code=True)
    if space.retraining.weights == "reinit":
        # The ticket's own seed would give it back the weights that its trajectory began with.
        return ticket.fresh_network(seeded("reinit", ticket.manifest["seed"]).initial_seed())
    return ticket.network()


def _report(job: int, epoch: int, network: nn.Module, optimizer: SGD) -> None:
    """Tell Ray Train how far all workers are, with a checkpoint to go on from."""
    metrics = {"job": job, "epoch": epoch}
    if ray.train.get_context().get_world_rank() > 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = {"network": network.state_dict(), "velocity": optimizer.velocity}
        torch.save(metrics | weights, Path(folder) / _STATE)
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _load_checkpoint() -> dict[str, Any] | None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / _STATE, map_location="cpu", weights_only=True)
