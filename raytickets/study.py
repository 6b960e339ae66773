"""Optuna, which proposes trajectories in place of the grid; the only module that knows it.

Everything is kept in a study: a file in the sweep's folder, one beside the sweeps of a series, or
the database that the space names. In the last two the next sweep of the same space goes on with it
and proposes from all that was found before, so only one at a time should run. With one trial at a
time the same seed proposes the same points; with several, proposals depend on which trajectory
ended first.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import BaseTrial, TrialState

from raytickets import storage
from raytickets.config import InputError, Range, SearchSpace
from raytickets.config import Optuna as Settings
from raytickets.halving import drawn, hypervolume
from raytickets.journal import NAME, Event, read_journal
from raytickets.trajectory import Point

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

optuna.logging.set_verbosity(optuna.logging.WARNING)

FILE = "study.db"
"""The study's file in the sweep's folder, `<series>.study.db` beside the sweeps of a series."""
DIRECTIONS = {"hypervolume": ("maximize",), "pareto": ("maximize", "minimize")}


def check_study(space: SearchSpace, sweep: Path, data: str, events: list[Event]) -> None:
    """InputError if the database cannot be used, or is not the one that the sweep began with."""
    numbers = {_number(event) for event in events} - {None}
    if settings(space).storage is None and not numbers:
        return
    if settings(space).storage is None:
        storage.fetch_database(_file(sweep))
    study = open_study(space, open_storage(space, sweep), study_name(space, data))
    if numbers - {trial.number for trial in study.get_trials(deepcopy=False)}:
        allowed = f"no longer holds the study that sweep {sweep.name} began; choose a new name"
        raise InputError("optuna.storage", settings(space).storage, allowed)


def study_name(space: SearchSpace, data: str) -> str:
    """`raytickets/<space>-<hash>`: over all that trajectories depend on, so that none are mixed.

    `data` is the fingerprint of the images. How many trajectories are asked for, the sampler, what
    winners get and where it all runs may change from sweep to sweep.
    """
    fields = space.as_dict()
    for other in ("retraining", "winners", "resources", "comparison"):
        del fields[other]
    for other in ("path", "loading", "loader_workers"):
        del fields["data"][other]
    fields["optuna"] = {name: fields["optuna"][name] for name in ("ranges", "objective")}
    canonical = json.dumps([fields, data], sort_keys=True)
    return f"raytickets/{space.name}-{hashlib.sha256(canonical.encode()).hexdigest()[:12]}"


def file_of(sweep: Path, opening: Event) -> Path:
    """The study's file if the space names no database; the sweeps of a series have one."""
    series = opening.get("series")
    return sweep.parent / f"{series}.{FILE}" if series else sweep / FILE


def _file(sweep: Path) -> Path:
    events = read_journal(sweep) if (sweep / NAME).exists() else []
    return file_of(sweep, events[0] if events else {})


def open_storage(space: SearchSpace, sweep: Path) -> RDBStorage:
    """The database, with its tables; InputError if it cannot be used."""
    given = settings(space).storage
    url = _with_secrets(given) if given else f"sqlite:///{storage.fetch(_file(sweep))}"
    # A server that does not answer is waited for by minutes, and one closes what was idle for long.
    patience = {"sqlite": {"timeout": 60}, "postgresql": {"connect_timeout": 10}}
    connect = patience.get(re.split(r"\W", url)[0], {})
    try:
        return RDBStorage(url, {"connect_args": connect, "pool_pre_ping": True})
    except Exception as error:  # It lets those of SQLAlchemy, the driver and the system through.
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise InputError("optuna.storage", given, f"cannot be used ({reason})") from error


def _with_secrets(url: str) -> str:
    """The URL with the values of environment variables for each `${NAME}`."""
    names = set(re.findall(r"\$\{(\w+)\}", url))
    if missing := sorted(names - os.environ.keys()):
        allowed = f"the environment variable {missing[0]} is not set"
        raise InputError("optuna.storage", url, allowed)
    for name in names:
        url = url.replace(f"${{{name}}}", quote(os.environ[name], safe=""))
    return url


def open_study(space: SearchSpace, storage: RDBStorage, name: str) -> optuna.Study:
    """The study of this name, begun if there is none."""
    directions = DIRECTIONS[settings(space).objective]
    return optuna.create_study(
        storage=storage, study_name=name, directions=directions, load_if_exists=True
    )


def sampler(space: SearchSpace, trials: int) -> BaseSampler:
    """What draws the point of the trial that comes after so many."""
    given = settings(space)
    seed = int(np.random.SeedSequence([given.seed, trials]).generate_state(1)[0])
    if given.sampler == "random":
        return RandomSampler(seed)
    return TPESampler(n_startup_trials=given.startup, seed=seed)


def propose(space: SearchSpace, trial: BaseTrial) -> Point:
    """The trial's point; the seeds of the space take turns."""
    ranges = settings(space).ranges
    changes = {name: _suggest(trial, name, values) for name, values in ranges.items()}
    seed = space.seeds[trial.number % len(space.seeds)]
    return Point(changes.get("penalty", space.penalties[0]), seed, trial.number, changes)


def _suggest(trial: BaseTrial, name: str, values: Range | tuple) -> Any:
    if not isinstance(values, Range):
        return trial.suggest_categorical(name, values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(name, values.low, values.high, log=values.log)
    return trial.suggest_float(name, values.low, values.high, log=values.log)


def outcome(space: SearchSpace, dense_macs: int, events: Iterable[Event]) -> list[float] | None:
    """What a trajectory with these events scores in each objective; None if it is a failure.

    `hypervolume`: that of its tickets, 0 without one. `pareto`: proof accuracy and share of the
    MACs of the ticket that has the largest one alone; without one it is a failure.
    """
    events = list(events)
    ended = [event["state"] for event in events if event["event"] == "trajectory"]
    if ended and ended[-1] in ("diverged", "failed"):
        return None
    points = [(t["proof_accuracy"], t["macs"] / dense_macs) for t in drawn(events)]
    if settings(space).objective == "hypervolume":
        return [hypervolume([a for a, _ in points], [s for _, s in points])]
    best = max(points, key=lambda point: (hypervolume(*zip(point)), point), default=None)
    return list(best) if best else None


def ask(study: optuna.Study, space: SearchSpace) -> Point:
    """The point of a new trial, which the study takes for running until it is settled."""
    # A sampler of its own for each: what a sweep that was cut off draws next is the same.
    study.sampler = sampler(space, len(study.get_trials(deepcopy=False)))
    return propose(space, study.ask())


def settle(
    study: optuna.Study,
    space: SearchSpace,
    events: list[Event],
    checkpoints: Path,
    numbers: set[int] | None = None,
) -> None:
    """Tell the study of trials that it takes for running: what the journal has of them, or failed.

    One that has not ended and has a folder in `checkpoints` stays, for it can be gone on with.
    `numbers` are the trials it may be of; None is all.
    """
    dense_macs, kept = events[0]["dense"]["macs"], storage.names(checkpoints)
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        if numbers is None or trial.number in numbers:
            mine = [event for event in events if _number(event) == trial.number]
            ended = any(event["event"] == "trajectory" for event in mine)
            if ended or not _is_kept(trial.number, kept):
                values = outcome(space, dense_macs, mine) if ended else None
                state = TrialState.FAIL if values is None else TrialState.COMPLETE
                study.tell(trial.number, values, state)


def going_on(
    study: optuna.Study, space: SearchSpace, events: list[Event], checkpoints: Path
) -> list[Point]:
    """Points of the trials that have a folder in `checkpoints` and no end in the journal.

    The study may have the end of one: of a lost driver's journal the last seconds are missing.
    """
    ended, kept = _numbers(events, "trajectory"), storage.names(checkpoints)
    trials = study.get_trials(deepcopy=False)
    return [
        propose(space, trial)
        for trial in trials
        if trial.number not in ended and _is_kept(trial.number, kept)
    ]


def cut_off(
    study: optuna.Study, space: SearchSpace, events: list[Event], going_on: list[Point]
) -> list[Point]:
    """Points of the journal's trajectories that have begun, not ended and are not gone on with."""
    ended = _numbers(events, "trajectory") | {point.number for point in going_on}
    lost = _numbers(events, "check") - ended
    trials = study.get_trials(deepcopy=False)
    return [propose(space, trial) for trial in trials if trial.number in lost]


def _numbers(events: list[Event], kind: str) -> set[int | None]:
    return {_number(event) for event in events if event["event"] == kind}


def _is_kept(number: int, kept: list[str]) -> bool:
    return any(name.startswith(f"trial{number}-") for name in kept)


def point(event: Event) -> Point:
    """The point that this `trajectory` event tells of."""
    return Point(event["penalty"], event["seed"], _number(event), event["changes"])


def _number(event: Event) -> int | None:
    """Of Optuna's trial, if the event is of a trajectory."""
    found = re.match(r"trial(\d+)-", event.get("trajectory", ""))
    return int(found[1]) if found else None


def figures(space: SearchSpace, sweep: Path) -> dict[str, "Figure"]:
    """Optuna's own figures of the sweep's study by name; none before two trials are complete."""
    if space.optuna is None or not (space.optuna.storage or storage.fetch(_file(sweep)).exists()):
        return {}
    name = study_name(space, read_journal(sweep)[0]["data"]["fingerprint"])
    study = open_study(space, open_storage(space, sweep), name)
    if len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])) < 2:
        return {}
    draw = optuna.visualization
    # It measures what makes a value low, and says so each time; accuracies are negated for it.
    warnings.filterwarnings("ignore", "PedAnovaImportanceEvaluator computes")
    if space.optuna.objective == "hypervolume":
        return {
            "optimization_history": draw.plot_optimization_history(study, target_name=HYPERVOLUME),
            "param_importances": draw.plot_param_importances(study, target_name=HYPERVOLUME),
        }
    return {
        "pareto_front": draw.plot_pareto_front(study, target_names=[ACCURACY, SHARE]),
        "optimization_history_accuracy": draw.plot_optimization_history(
            study, target=lambda trial: trial.values[0], target_name=ACCURACY
        ),
        "optimization_history_macs": draw.plot_optimization_history(
            study, target=lambda trial: trial.values[1], target_name=SHARE
        ),
        "param_importances_accuracy": draw.plot_param_importances(
            study, target=lambda trial: -trial.values[0], target_name=ACCURACY
        ),
        "param_importances_macs": draw.plot_param_importances(
            study, target=lambda trial: trial.values[1], target_name=SHARE
        ),
    }


HYPERVOLUME = "Hypervolume of the tickets"
ACCURACY = "Proof accuracy"
SHARE = "Share of the dense network's MACs"


def settings(space: SearchSpace) -> Settings:
    assert space.optuna is not None
    return space.optuna
