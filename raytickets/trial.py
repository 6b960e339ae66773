"""What a Ray Tune trial does: a trajectory, or a ticket's further proof."""

from collections.abc import Iterator
from pathlib import Path

import torch
from ray import tune
from ray.util.queue import Queue

from raytickets.config import SearchSpace
from raytickets.data import DataSet
from raytickets.journal import Event
from raytickets.trajectory import Point, prepare, prove, run_trajectory


class Trial(tune.Trainable):
    """Reports the events of one check at a time; a worker goes on to the next trial in place.

    With a `point` in its config it is a trajectory. Without one it is a prover, and
    takes tickets (path and rung) from the queue until it finds None there.
    """

    # `tune.with_parameters` gives the arguments after the first.
    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, config: dict, space: SearchSpace, dataset: DataSet, sweep: Path, queue: Queue
    ) -> None:
        torch.set_num_threads(space.resources.cpus_per_trial)
        gpus = space.resources.gpus_per_trial
        if 0 < gpus < 1:
            torch.cuda.set_per_process_memory_fraction(gpus)
        self._queue = queue
        self._setting = prepare(space, dataset, sweep, "cuda" if gpus else "cpu")
        self.reset_config(config)

    def reset_config(self, new_config: dict) -> bool:
        if "point" in new_config:
            self._steps = run_trajectory(self._setting, Point(**new_config["point"]))
        else:
            self._steps = self._prove()
        return True

    def _prove(self) -> Iterator[list[Event]]:
        while job := self._queue.get():
            path, rung = job
            yield [prove(self._setting, self._setting.sweep / path, rung)]

    def step(self) -> dict:
        events = next(self._steps, [])
        result = {"events": events, "done": not events or events[-1]["event"] == "trajectory"}
        check = events[0] if events else {}
        # What halving is not to judge has no accuracy (see `tuner`).
        if check.get("validation_accuracy") is not None and not check["about_to_draw"]:
            result |= {"epoch": check["epoch"], "accuracy": check["validation_accuracy"]}
        return result
