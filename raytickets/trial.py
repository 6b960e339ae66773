"""A trajectory as a Ray Tune trial."""

from pathlib import Path

import torch
from ray import tune

from raytickets.config import SearchSpace
from raytickets.data import DataSet
from raytickets.trajectory import Point, run_trajectory


class Trial(tune.Trainable):
    """Reports the events of one check at a time; a worker goes on to the next trial in place."""

    # `tune.with_parameters` gives the arguments after the first.
    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, config: dict, space: SearchSpace, dataset: DataSet, sweep: Path
    ) -> None:
        self._space, self._dataset, self._sweep = space, dataset, sweep
        torch.set_num_threads(space.resources.cpus_per_trial)
        self.reset_config(config)

    def reset_config(self, new_config: dict) -> bool:
        point = Point(**new_config["point"])
        device = "cuda" if self._space.resources.gpus_per_trial else "cpu"
        self._events = run_trajectory(self._space, point, self._dataset, self._sweep, device)
        return True

    def step(self) -> dict:
        events = next(self._events)
        return {"events": events, "done": events[-1]["event"] == "trajectory"}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune asks at the end of a trial; its tickets are on disk and nothing else is kept."""
