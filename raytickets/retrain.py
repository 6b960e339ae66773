"""Retraining: winning tickets and the dense reference, data-parallel on Ray Train."""

import contextlib
import hashlib
import json
import math
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed
from ray.exceptions import RayActorError
from ray.train import (
    ControllerError,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer, get_device, prepare_model
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor, nn

from raytickets import checkpoint, cost
from raytickets.batches import Batches
from raytickets.config import InputError, SearchSpace
from raytickets.data import DataSet
from raytickets.journal import Event
from raytickets.plan import deadline_s
from raytickets.room import LOOK_S, Waiting
from raytickets.ticket import has_lost, load_ticket, save_retrained
from raytickets.train import SGD, epoch_event, fit, numerics, retrained_event, seed_of
from raytickets.trajectory import dense_network

DENSE = "dense"
"""The run of the dense reference."""

LEAST_IMAGES = 32
"""Of a batch, that each worker has unless told otherwise."""

RETRIES = 2
"""How often a network's workers are started again without an epoch done in between."""


@dataclass(frozen=True)
class Job:
    """One network to retrain: a ticket's id, or `DENSE` with no path."""

    run: str
    path: Path | None


def worker_count(space: SearchSpace, available: int, grows: bool = False) -> int | tuple[int, int]:
    """Workers to retrain with, or the least and the most, as the space asks for.

    Where it asks for none, each has at least `LEAST_IMAGES` of a batch: BatchNorm over few is
    another network (Wu and He 2018, arXiv 1803.08494, figure 1).
    `available` counts the CPUs, or the GPUs if there are any. Raises InputError if the space asks
    for more, unless the cluster grows.
    """
    asked = space.retraining.num_workers
    if asked is None:
        return max(min(available, space.retraining.batch_size // LEAST_IMAGES), 1)
    if (asked if isinstance(asked, int) else asked[0]) > available and not grows:
        allowed = f"the cluster has room for {available}"
        raise InputError("retraining.num_workers", asked, allowed)
    return asked


def retrain(
    space: SearchSpace,
    jobs: Sequence[Job],
    data: "ray.ObjectRef[DataSet]",
    sweep: Path,
    num_workers: int | tuple[int, int],
    on_event: Callable[[Event], None],
    *,
    use_gpu: bool = False,
) -> None:
    """Retrain the jobs one after the other on one group of Ray Train workers.

    `on_event` hears every epoch, and of each finished network once it is on disk under
    `sweep/retrained`, on a thread of its own. A network goes on from its last epoch if its
    retraining by the same recipe was cut off, and epochs before that are told again; one whose
    retraining had ended is only told again. Where workers are lost, the group is started again: a
    `retry` event says why. A network is given up if that happens `RETRIES` times more without an
    epoch in between and without notice, at once if the input is to blame or the loss is no number;
    RuntimeError names all such and why, once the others are retrained. Raises NoRoom if for
    `RAYTICKETS_DEADLINE_S` seconds there was no room for the least number of workers, which is one
    where the space names none; what `on_event` raises.
    """
    told = _Told(on_event)
    failed, given_up = 0, {}
    while left := [job for job in jobs if job.run not in told.ended]:
        before = len(told.epochs)
        ours = space.retraining.num_workers is None and isinstance(num_workers, int)
        try:
            _run_group(space, left, data, sweep, num_workers, told, use_gpu, ours)
            break
        except ControllerError:
            if not ours:
                raise
        except TrainingFailedError as error:
            if len(told.epochs) > before:
                failed = 0
            # A machine that was given notice counts towards no limit.
            failed += not _is_preemption_failure(error)
            left = [job for job in left if job.run not in told.ended]
            if not left:
                raise
            if failed > RETRIES or _bound_to_fail(error):
                told.ended.add(left[0].run)
                given_up[left[0].run] = error
                failed = 0
                continue
            told.hear({"event": "retry", "run": left[0].run, "reason": _reason(error)})
        if ours and isinstance(num_workers, int):
            # A lost machine may not come back, and Ray hears of its loss late.
            num_workers = (1, num_workers)
    if given_up:
        reasons = [f"{run}: {_reason(error)}" for run, error in given_up.items()]
        raise RuntimeError("; ".join(reasons)) from next(iter(given_up.values()))


class _Told:
    """Tells events, and knows of which networks the last one was told."""

    def __init__(self, on_event: Callable[[Event], None]):
        self._on_event, self._retries = on_event, Counter()
        self.epochs: set[tuple[str, int]] = set()
        self.ended: set[str] = set()

    def hear(self, event: Event) -> None:
        run = event["run"]
        if run in self.ended:
            return  # A group that was started again tells of all its networks.
        if event["event"] == "retry":
            self._retries[run] += 1
            event = {"event": "retry", "run": run, "attempt": self._retries[run]} | event
        elif event["event"] == "epoch":
            self.epochs.add((run, event["epoch"]))
        else:
            self.ended.add(run)
        self._on_event(event)

    @contextlib.contextmanager
    def listening(self) -> Iterator[Queue]:
        """A queue whose events are heard, all of them by the end."""
        # It is to outlive the machines that workers run on.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        over = threading.Event()

        def listen() -> None:
            try:
                while not over.is_set() or not queue.empty():
                    with contextlib.suppress(Empty):
                        self.hear(queue.get(timeout=0.2))
            except Exception:
                queue.shutdown(force=True)  # The next epoch fails: nobody would hear of it.
                raise

        with ThreadPoolExecutor(1) as pool:
            listener = pool.submit(listen)
            try:
                yield queue
            finally:
                # Also after Ctrl-C: a thread that asks Ray for something while it shuts down is
                # fatal.
                over.set()
                listener.result()
        queue.shutdown()


def _run_group(
    space: SearchSpace,
    jobs: Sequence[Job],
    data: "ray.ObjectRef[DataSet]",
    sweep: Path,
    num_workers: int | tuple[int, int],
    told: _Told,
    use_gpu: bool,
    ours: bool,
) -> None:
    if ours:
        least, starts = 1, 0
    else:
        least = num_workers if isinstance(num_workers, int) else num_workers[0]
        # Ray Train waits for its workers for a minute at a time.
        starts = math.ceil(deadline_s() / 60) + 1
    with told.listening() as queue:
        trainer = _Trainer(
            _train_worker,
            train_loop_config={
                "space": space,
                "jobs": list(jobs),
                "data": data,
                "sweep": sweep,
                "queue": queue,
            },
            least=least,
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
            run_config=RunConfig(
                name=f"retrain-{jobs[0].run}-{time.time_ns()}",
                storage_path=str((sweep / "ray").resolve()),
                # Lost workers come back to `retrain`, which knows of progress and of what is left
                # of the cluster: Ray Train would wait for a lost machine.
                failure_config=FailureConfig(
                    max_failures=0, max_preemption_failures=0, controller_failure_limit=starts
                ),
            ),
        )
        trainer.fit()


class _Trainer(TorchTrainer):
    def __init__(self, *given: Any, least: int, **options: Any):
        """`least` is how many workers there must be room for."""
        super().__init__(*given, **options)
        self._least = least

    def _initialize_and_run_controller(self, **options: Any) -> Result:
        """As Ray Train does it, but for two things.

        It raises NoRoom: Ray Train may wait without end for a machine. And it leaves Ctrl-C alone:
        Ray Train's handler outlives the training, and may exit with 0.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(TrainController)  # pyright: ignore[reportArgumentType]
        environment = {"env_vars": get_env_vars_to_propagate()}
        actor = actor.options(num_cpus=0, scheduling_strategy=here, runtime_env=environment)
        controller = actor.remote(**options)
        worker = {"GPU": 1.0} if self.scaling_config.use_gpu else {"CPU": 1.0}
        waiting = Waiting(worker, deadline_s(), noticed=True, least=self._least)
        running = controller.run.remote()
        try:
            while not ray.wait([running], timeout=LOOK_S)[0]:
                waiting.look()
        except BaseException:  # Ctrl-C too: a Ray that was there before goes on.
            ray.kill(controller)
            raise
        ray.get(running)
        return ray.get(controller.get_result.remote())


def _reason(error: TrainingFailedError) -> str:
    """One line: which workers, and what Ray says of them."""
    if not isinstance(error, WorkerGroupError):
        return " ".join(str(error).split())
    # Ray Train wraps what it hears of an actor that is gone.
    failures = {
        rank: getattr(failure, "health_check_failure", failure)
        for rank, failure in error.worker_failures.items()
    }
    # The others fail for want of the one that is gone.
    gone = {rank: e for rank, e in failures.items() if isinstance(e, RayActorError)} or failures
    return "; ".join(f"worker {rank}: {_line(e)}" for rank, e in sorted(gone.items()))


def _bound_to_fail(error: TrainingFailedError) -> bool:
    """Whether the input is to blame, or the loss is no number: it will be so again."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
    return any(isinstance(failure, ValueError | FloatingPointError) for failure in failures)


def _line(error: Exception) -> str:
    """Of what Ray says of a lost actor the facts, of a traceback the last line."""
    if isinstance(error, RayActorError):
        return " ".join(str(error).partition(" Some common causes")[0].split())
    return traceback.format_exception_only(error)[-1].strip().rpartition("\n")[2]


def _train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: every job in turn."""
    data: ray.ObjectRef[DataSet] = config["data"]
    dataset = ray.get(data)
    for job in config["jobs"]:
        _retrain_one(config["space"], job, dataset, config["sweep"], config["queue"])


def _retrain_one(space: SearchSpace, job: Job, dataset: DataSet, sweep: Path, queue: Queue) -> None:
    recipe, device = space.retraining, get_device()
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    batch = min(recipe.batch_size, len(dataset.train.labels))
    if world > batch:
        raise InputError("retraining.num_workers", world, f"a batch has {batch} images")

    # Only the first worker reads and writes checkpoints, and only it tells of anything.
    folder = sweep / "checkpoints" / job.run / _identity(space, dataset)
    batches = Batches(dataset, space.data, device)
    count = batches.count(recipe.batch_size)
    found = checkpoint.load(folder) if rank == 0 else None
    newest, damaged = found.number if found else 0, ()
    if rank == 0:
        damaged = found.damaged if found else checkpoint.generations(folder)
        if found and has_lost(sweep, found.state["events"]):
            found, damaged = None, ("the retrained ticket",)
    events: list[Event] = list(found.state["events"]) if found else []
    for event in events:
        queue.put(event)
    if rank == 0 and damaged:
        place = f"goes on from epoch {found.state['steps'] / count:g}" if found else "begins again"
        reason = f"damaged: {', '.join(damaged)}; {place}"
        queue.put({"event": "retry", "run": job.run, "reason": reason})
    first = torch.tensor(found.state["steps"] if found else 0, device=device)
    if _from_first_worker(first, world) > recipe.epochs * count:
        return

    network = _starting_network(space, job, dataset)
    macs = cost.macs(network, dataset.shape.example())
    how = numerics(space.precision, space.channels_last, network, device)
    how.place(network)
    optimizer = SGD(network, recipe.momentum, recipe.weight_decay)
    losses = torch.zeros((), dtype=torch.float64, device=device)
    started = time.monotonic()
    if found is not None:
        network.load_state_dict(_part(found.tensors, "network."))
        optimizer.load(_part(found.tensors, "optimizer."))
        losses.copy_(found.tensors["losses"])
        started -= found.state["seconds"]
    # Buffers are needed at an epoch's end alone, and not before every step as by default. And
    # without find_unused_parameters DistributedDataParallel puts gradients into other buckets
    # after its first step, and with three workers or more the sums of a group that was started
    # again would differ in the last bit.
    options = {"find_unused_parameters": True, "forward_sync_buffers": False}
    parallel = prepare_model(network, parallel_strategy_kwargs=options)
    for tensor in (losses, *optimizer.velocity):
        _from_first_worker(tensor, world)
    share = len(range(rank, batch, world)) / batch
    if batch % world:
        weigh(parallel, share * world)

    def state() -> dict[str, Any]:
        return {"events": list(events), "steps": steps, "seconds": time.monotonic() - started}

    def save() -> None:
        tensors = _prefixed("network.", network.state_dict()) | {"losses": losses}
        tensors |= _prefixed("optimizer.", optimizer.state())
        writer.save(_copied(tensors), state())

    purpose, ours = ("retrain", space.seeds[0]), (rank, world)
    parts = fit(parallel, optimizer, batches, recipe, purpose, how, first=int(first), worker=ours)
    with checkpoint.Writer(folder, newest) as writer:
        for steps, part in parts:
            part *= share
            if world > 1:
                torch.distributed.all_reduce(part)
            losses += part
            if steps % count:
                if rank == 0 and writer.due:
                    save()
                continue
            epoch, mean = steps // count, (losses / count).item()
            if not math.isfinite(mean):
                raise FloatingPointError(f"{job.run} diverged in epoch {epoch}")
            losses.zero_()
            for buffer in network.buffers():
                _from_first_worker(buffer, world)  # BatchNorm's averages are of its own images.
            event = epoch_event(job.run, epoch, mean, network, batches, recipe, how, ours)
            if rank == 0:
                events.append(event | {"num_workers": world, "identity": folder.name})
                save()
                writer.wait()
                queue.put(events[-1])
        took = time.monotonic() - started
        event = retrained_event(job.run, took, network, macs, batches, recipe, how, ours)
        if rank == 0:
            # The first epoch of the highest.
            top = max(events, key=lambda epoch: epoch["validation_accuracy"])
            event |= {
                "best_epoch": top["epoch"],
                "best_validation_accuracy": top["validation_accuracy"],
                "recipe": space.as_dict()["retraining"],
            }
            if job.path is not None:
                ticket = save_retrained(sweep / "retrained", job.path, network, event)
                event["path"] = str(ticket.path.relative_to(sweep))
            events.append(event)
            steps = recipe.epochs * count + 1  # One more than there are: it has ended.
            writer.save({}, state(), keep=1)
            writer.wait()
            queue.put(event)


def _identity(space: SearchSpace, dataset: DataSet) -> str:
    """What a checkpoint must have been made by: the recipe and every other field, and the data."""
    fields = json.dumps([checkpoint.FORMAT, space.fingerprint, dataset.fingerprint])
    return hashlib.sha256(fields.encode()).hexdigest()[:16]


def _from_first_worker(tensor: Tensor, world: int) -> Tensor:
    """The first worker's values, in place."""
    if world > 1:
        torch.distributed.broadcast(tensor, 0)
    return tensor


def weigh(parallel: nn.Module, weight: float) -> None:
    """Multiply every gradient by a weight.

    Workers average their gradients of the mean loss over their own images. With a weight of `world`
    times its share of the batch each, that is the gradient of the mean over the whole batch.
    """

    def scale(_module: nn.Module, _images: Any, logits: Tensor) -> None:
        logits.register_hook(lambda gradient: gradient * weight)

    parallel.register_forward_hook(scale)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _starting_network(space: SearchSpace, job: Job, dataset: DataSet) -> nn.Module:
    if job.path is None:
        return dense_network(space, dataset, space.seeds[0])
    ticket = load_ticket(job.path, trust_code=True)
    if space.retraining.weights == "reinit":
        # The ticket's own seed would give it back the weights that its trajectory began with.
        return ticket.fresh_network(seed_of("reinit", ticket.manifest["seed"]))
    return ticket.network()
