"""What a worker does: trajectories and sources, further proofs, retraining of compared tickets."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from ray import tune

from raytickets.config import SearchSpace
from raytickets.data import DataSet
from raytickets.draw import prove
from raytickets.journal import Event
from raytickets.methods import Source, retrain_alone, run_source
from raytickets.sweep import select
from raytickets.trajectory import Point, prepare, run_trajectory

CONTEXT_BYTES = 600 * 2**20
"""An estimate of what CUDA itself takes of a GPU in every process, beside what torch allocates."""

_LAST = ("trajectory", "proof", "retrained")


class Trial(tune.Trainable):
    """Reports the events of one step of a job at a time; a worker goes on to the next in place.

    Its config is one of these: `point` (of a trajectory), `source` (of a comparison), `proof` (a
    ticket's path) and `rung`, `ticket` (the path of one to retrain), or `wait` (seconds between
    reports of nothing).
    """

    # `tune.with_parameters` gives the arguments after the first.
    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        config: dict,
        space: SearchSpace,
        dataset: DataSet,
        sweep: Path,
        cpus: int,
        gpus: float,
    ) -> None:
        torch.set_num_threads(cpus)
        if 0 < gpus < 1:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(max(gpus - CONTEXT_BYTES / total, gpus / 2))
        self._setting = prepare(space, dataset, sweep, "cuda" if gpus else "cpu")
        self.reset_config(config)

    def reset_config(self, new_config: dict) -> bool:
        self._steps = self._run(new_config)
        return True

    def _run(self, config: dict) -> Iterator[list[Event]]:
        setting = self._setting
        match config:
            case {"point": point}:
                yield from run_trajectory(setting, Point(**point))
            case {"source": source}:
                yield from run_source(setting, Source(**source))
            case {"proof": path, "rung": rung}:
                yield [prove(setting, setting.sweep / path, rung)]
            case {"ticket": path}:
                yield from retrain_alone(setting, setting.sweep / path)
            case {"wait": seconds}:
                while True:
                    time.sleep(seconds)
                    yield []

    def step(self) -> dict:
        events = next(self._steps, None)
        done = events is None or (bool(events) and events[-1]["event"] in _LAST)
        result = {"events": events or [], "done": done}
        # What goes on tells its old events again, maybe all at once.
        check = (select(events or [], "check") or [{}])[-1]
        # What halving is not to judge has no accuracy (see `tuner`).
        if check.get("validation_accuracy") is not None and not check["about_to_draw"]:
            result |= {"epoch": check["epoch"], "accuracy": check["validation_accuracy"]}
        return result
