"""The search space: what a user edits, as frozen dataclasses that refuse bad values by name."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Rule = Literal["corrected", "paper", "epi"]
Precision = Literal["auto", "float32", "bfloat16"]
Source = Literal["digits", "folder", "cifar10", "cifar100", "huggingface"]
Loading = Literal["auto", "memory", "stream"]
Schedule = Literal["constant", "cosine", "multistep"]
Weights = Literal["inherit", "reinit"]
Method = Literal[
    "dense",
    "early_bird",
    "early_bird_reinit",
    "progressive",
    "iterative",
    "lottery_ticket",
    "snip",
    "random",
    "low_precision",
]
Objective = Literal["hypervolume", "pareto"]
Sampler = Literal["tpe", "random"]

PASSWORD = r"(?i:passw(?:or)?d|pwd)(?:=|%3D)"
"""How a URL names a password among its options."""


def masked(value: Any) -> Any:
    """The same without the passwords of the URLs in it; `${NAME}` is none."""
    if isinstance(value, Mapping):
        return {key: masked(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [masked(entry) for entry in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"(://[^\s/:@]*):(?!\$\{\w+\}@)\S*@", r"\1:***@", value)
    value = re.sub(r"(https?://)[^\s/@]+@", r"\1***@", value)  # A token may stand for a user.
    return re.sub(rf"({PASSWORD}|(?:token|secret)=)[^&\s]+", r"\1***", value)


class InputError(ValueError):
    """Something the user gave cannot be used: names the field, the value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str):
        super().__init__(field, value, allowed)

    def __str__(self) -> str:
        """One line, whatever value and reason hold."""
        field, value, allowed = self.args
        return " ".join(f"{field}: {value!r} is not allowed: {allowed}".split())


def _number(name: str, value: object, *, above: float, below: float = math.inf, allowed: str):
    if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < below:
        raise InputError(name, value, allowed)


def expanded(field: str, path: object) -> Path:
    """The path with the home folder in place of `~`; InputError if nobody knows it."""
    try:
        return Path(str(path)).expanduser()
    except RuntimeError as error:
        raise InputError(field, str(path), f"must be a folder ({error})") from error


def _whole(name: str, value: object, least: int):
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(name, value, f"must be a whole number, at least {least}")


def _seed(name: str, value: object):
    _whole(name, value, 0)
    if isinstance(value, int) and value >= 2**63:
        raise InputError(name, value, "must be below 2**63")


def _choice(name: str, value: object, choices: tuple):
    if value not in choices:
        raise InputError(name, value, f"must be one of {', '.join(choices)}")


def _sequence(name: str, value: object, check: Callable[[str, Any], None]):
    if not isinstance(value, tuple) or not value:
        raise InputError(name, value, "must be a tuple of at least one value")
    for entry in value:
        check(name, entry)
    # Trajectories and tickets are told apart by these digits.
    shown = {f"{entry:g}" if isinstance(entry, float) else str(entry) for entry in value}
    if len(shown) != len(value):
        raise InputError(name, value, "each value may occur once, to six digits")


def _share(name: str, value: object):
    _number(name, value, above=0, below=1, allowed="must be a number above 0 and below 1")


def _positive(name: str, value: object):
    _number(name, value, above=0, allowed="must be a finite number above 0")


def _not_negative(name: str, value: object):
    _number(name, value, above=-1e-300, allowed="must be a finite number, at least 0")


def _kind(name: str, value: object, kind: type):
    if not isinstance(value, kind):
        raise InputError(name, value, f"must be a {kind.__name__}")


def _names(part: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(part)}


def _optuna(values: Mapping[str, Any]) -> "Optuna":
    ranges = {
        name: Range(**given) if isinstance(given, Mapping) else tuple(given)
        for name, given in values["ranges"].items()
    }
    return Optuna(**{**values, "ranges": ranges})


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


@dataclass(frozen=True)
class Network:
    """A network by name, with the keyword arguments of its builder.

    `name` is a built-in (`cifar_vgg`, `cifar_resnet`, `cifar_preresnet`), a torchvision
    classification network (`resnet18`, `mobilenet_v2`, ...), one of timm as `timm/resnet18`, or
    the user's own as `package.module:function` or `file.py:function`, called as
    `function(num_classes=..., in_channels=..., **options)`.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise InputError("network.name", self.name, "must be a network's name")
        _kind("network.options", self.options, Mapping)
        try:
            json.dumps(self.options, allow_nan=False)
        except (TypeError, ValueError) as error:
            allowed = f"must hold plain values, as JSON does ({error})"
            raise InputError("network.options", self.options, allowed) from error


@dataclass(frozen=True)
class Data:
    """Labelled images, split three ways.

    `source` is one of
    - `digits`: scikit-learn's 1,797 images of 8x8 pixels;
    - `folder`: the ImageFolder at `path`, either `train/<class>/*` with `test/<class>/*` and
      `validation/<class>/*` (or `val/`, `valid/`) if they are there, or plain `<class>/*`;
    - `cifar10`, `cifar100`: the original 60,000 images of 32x32 pixels, in the folder `path` as
      torchvision keeps them (`cifar-10-batches-py/`, `cifar-100-python/`);
    - `huggingface`: an image data set of Hugging Face, in the folder `path` as `save_to_disk` or
      Parquet files, or by its name on the Hub (the extra `huggingface`).

    Images that come as validation without a test split are the test split: nothing else is there
    to report on. Splits that are still missing are drawn at random, stratified by class, from the
    training images: `validation` and `test` are their shares.
    """

    source: Source = "digits"
    path: str | None = None
    image_size: int | None = None
    """Side in pixels that images are resized and centre-cropped to; None keeps their own size."""
    validation: float = 0.1
    test: float = 0.2
    crop_padding: int = 0
    """Pixels of zero padding for random crops while training."""
    random_resized_crop: bool = False
    """Train as on ImageNet (Szegedy et al. 2015, arXiv 1409.4842, section 6): on a random part of
    each image, 8 to 100% of its area with sides from 3:4 to 4:3, resized to `image_size`. The other
    splits are resized until `image_size` is 87.5% of the shorter side, then centre-cropped. The
    parts are cut from whole images, so that the folder is always streamed."""
    flip: bool = False
    """Random horizontal flips while training."""
    limit: int | None = None
    """Use this many training images at most, and as many for validation and test together."""
    split_seed: int = 0
    loading: Loading = "auto"
    """`memory` decodes every image once and keeps it as bytes, `stream` decodes the files of a
    folder again in every epoch; `auto` streams a folder that would take over a quarter of this
    machine's memory."""
    loader_workers: int = 2
    """Processes that decode for each trajectory that streams."""
    download: bool = False
    """Fetch what is not there: the archive of `cifar10` or `cifar100`, or a data set of the
    Hugging Face Hub."""
    columns: tuple[str, str] | None = None
    """The columns of a Hugging Face data set with the images and the labels; None finds them."""

    def __post_init__(self):
        _choice("data.source", self.source, get_args(Source))
        if self.source != "digits" and not isinstance(self.path, str):
            raise InputError("data.path", self.path, "must be the path of a folder, as a string")
        if self.image_size is not None:
            _whole("data.image_size", self.image_size, 1)
            self._only_for("image_size", "folder", "huggingface")
        _share("data.validation", self.validation)
        _share("data.test", self.test)
        if self.validation + self.test >= 1:
            allowed = f"must be below 1 together with data.test, which is {self.test}"
            raise InputError("data.validation", self.validation, allowed)
        _whole("data.crop_padding", self.crop_padding, 0)
        _kind("data.random_resized_crop", self.random_resized_crop, bool)
        if self.random_resized_crop:
            self._only_for("random_resized_crop", "folder")
            for name, wrong, allowed in (
                ("image_size", self.image_size is None, "must be given"),
                ("crop_padding", self.crop_padding > 0, "must be 0"),
                ("loading", self.loading == "memory", "must be auto or stream"),
            ):
                if wrong:
                    allowed = f"{allowed} with data.random_resized_crop"
                    raise InputError(f"data.{name}", getattr(self, name), allowed)
        _kind("data.flip", self.flip, bool)
        if self.limit is not None:
            _whole("data.limit", self.limit, 10)
        _whole("data.split_seed", self.split_seed, 0)
        _choice("data.loading", self.loading, get_args(Loading))
        if self.loading == "stream" and self.source != "folder":
            raise InputError("data.loading", self.loading, f"{self.source} is always in memory")
        _whole("data.loader_workers", self.loader_workers, 1)
        _kind("data.download", self.download, bool)
        if self.download:
            self._only_for("download", "cifar10", "cifar100", "huggingface")
        if self.columns is not None:
            self._only_for("columns", "huggingface")
            if not isinstance(self.columns, tuple) or list(map(type, self.columns)) != [str, str]:
                allowed = "must be the names of two columns, images and labels"
                raise InputError("data.columns", self.columns, allowed)

    def _only_for(self, name: str, *sources: str):
        if self.source not in sources:
            allowed = f"is for data.source {', '.join(sources)} only"
            raise InputError(f"data.{name}", getattr(self, name), allowed)


@dataclass(frozen=True)
class StopRule:
    """When a mask counts as converged (see `raytickets.earlybird`)."""

    rule: Rule = "corrected"
    window: int = 5
    """How many masks are kept; the newest is compared with each of the others."""
    threshold: float | None = None
    """Largest mask distance that still counts as the same mask; None is the rule's own
    (0.1 of the channels for `paper`, 0.2 of chance for `corrected`, 0.017 for `epi`)."""
    checks_per_epoch: int = 1
    """Looks at the masks in every epoch; the window counts looks."""

    def __post_init__(self):
        _choice("stop_rule.rule", self.rule, get_args(Rule))
        _whole("stop_rule.checks_per_epoch", self.checks_per_epoch, 1)
        _whole("stop_rule.window", self.window, 2)
        if self.threshold is not None:
            _share("stop_rule.threshold", self.threshold)

    @property
    def limit(self) -> float:
        return self.threshold or {"paper": 0.1, "corrected": 0.2, "epi": 0.017}[self.rule]


@dataclass(frozen=True, kw_only=True)
class Training:
    """One recipe of stochastic gradient descent with momentum."""

    epochs: int
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Schedule = "constant"
    """`cosine` falls to 0 over the epochs; `multistep` divides by 10 at each milestone."""
    milestones: tuple[int, ...] = ()
    """Epochs after which `multistep` drops the learning rate."""

    def validate(self, name: str):
        _whole(f"{name}.epochs", self.epochs, 1)
        _steps(name, self)
        _choice(f"{name}.schedule", self.schedule, get_args(Schedule))
        _kind(f"{name}.milestones", self.milestones, tuple)
        for milestone in self.milestones:
            _whole(f"{name}.milestones", milestone, 1)
        if (self.schedule == "multistep") != bool(self.milestones):
            allowed = "`multistep` needs milestones and the other schedules take none"
            raise InputError(f"{name}.milestones", self.milestones, allowed)


@dataclass(frozen=True, kw_only=True)
class Retraining(Training):
    """The full training of a winning ticket, and of the dense reference beside it."""

    schedule: Schedule = "cosine"
    weights: Weights = "inherit"
    """`inherit` goes on from the ticket's weights; `reinit` draws new ones in its shape."""
    num_workers: int | tuple[int, int] | None = None
    """Ray Train workers, which share every batch: its size and the learning rate mean the same for
    any number, but BatchNorm takes mean and variance of each worker's own images. A pair is the
    least and the most, between which the group follows the cluster, going on from its last epoch.
    None is what the cluster has, with at least 32 images of a batch each."""

    def validate(self, name: str):
        super().validate(name)
        _choice(f"{name}.weights", self.weights, get_args(Weights))
        if self.num_workers is None:
            return
        pair = self.num_workers
        if not isinstance(pair, tuple):
            pair = (pair, pair)
        if len(pair) != 2:
            allowed = "must be a whole number, or a pair of the least and the most"
            raise InputError(f"{name}.num_workers", self.num_workers, allowed)
        least, most = pair
        _whole(f"{name}.num_workers", least, 1)
        _whole(f"{name}.num_workers", most, least)
        if most > self.batch_size // 2:
            allowed = f"must leave two images of {name}.batch_size, {self.batch_size}, to each"
            raise InputError(f"{name}.num_workers", self.num_workers, allowed)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The short fine-tunes that rank shrunk tickets, by successive halving (Jamieson and Talwalkar
    2016, arXiv 1502.07943).

    In a rung every ticket is fine-tuned from its draw with the same MACs, under a learning rate
    that falls to 0 as a cosine. The better half goes on to the next rung, which has twice the MACs.
    """

    budget: float = 1.0
    """MACs of the first rung, in epochs of training the dense network."""
    rungs: int = 2
    batch_size: int = 64
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self):
        _positive("proof.budget", self.budget)
        _whole("proof.rungs", self.rungs, 1)
        _steps("proof", self)


def _steps(name: str, recipe: Training | Proof):
    _whole(f"{name}.batch_size", recipe.batch_size, 2)
    _positive(f"{name}.learning_rate", recipe.learning_rate)
    allowed = "must be at least 0 and below 1"
    _number(f"{name}.momentum", recipe.momentum, above=-1e-300, below=1, allowed=allowed)
    _not_negative(f"{name}.weight_decay", recipe.weight_decay)


@dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving of trajectories (ASHA: Li et al. 2020, arXiv 1810.05934).

    After `grace` epochs, and again after each `reduction` times as many, a trajectory ends if its
    validation accuracy is not in the best 1/`reduction` of those that came so far. One that is
    about to draw a ticket goes on.
    """

    grace: int = 5
    reduction: int = 2

    def __post_init__(self):
        _whole("halving.grace", self.grace, 1)
        _whole("halving.reduction", self.reduction, 2)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `raytickets compare` sets side by side (see `raytickets.methods`)."""

    methods: tuple[Method, ...] = get_args(Method)
    penalty: float | None = None
    """Of every method that trains under one; None is the middle one of the space."""
    prune_ratios: tuple[float, ...] | None = None
    """None are those of the space."""
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int = 3
    """How often `iterative` prunes."""
    rewind: int = 0
    """Epochs of training after which `lottery_ticket` finds its weights; 0 is before any."""

    def __post_init__(self):
        _sequence("comparison.methods", self.methods, _method)
        for needed, by in (("dense", "every comparison"), ("early_bird", "random")):
            if needed not in self.methods and (by in self.methods or needed == "dense"):
                raise InputError("comparison.methods", self.methods, f"{by} needs {needed}")
        if self.penalty is not None:
            _not_negative("comparison.penalty", self.penalty)
        if self.prune_ratios is not None:
            _sequence("comparison.prune_ratios", self.prune_ratios, _share)
        _sequence("comparison.seeds", self.seeds, _seed)
        _whole("comparison.rounds", self.rounds, 2)
        _whole("comparison.rewind", self.rewind, 0)


def _method(name: str, value: object):
    _choice(name, value, get_args(Method))


@dataclass(frozen=True)
class Range:
    """Numbers that Optuna may propose, both ends included; whole ones if both ends are ints."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Optuna:
    """Trajectories that Optuna proposes, in place of the grid of penalties.

    `ranges` maps a field of the space to a `Range` or a tuple of choices: `penalty`,
    `training.learning_rate`, `training.epochs`, `network.options.width`, `stop_rule.window`, ...
    (any number in `training`, `stop_rule` and `network.options`). The space's seeds take turns.
    The same `seed` proposes the same with one trial at a time; with several, proposals depend on
    which trajectory ended first.
    """

    trajectories: int
    ranges: Mapping[str, Range | tuple]
    objective: Objective = "hypervolume"
    """`hypervolume`: what the trajectory's tickets dominate in proof accuracy against MACs;
    `pareto`: accuracy and MACs of its best ticket as two objectives."""
    sampler: Sampler = "tpe"
    startup: int = 10
    """Trajectories that are drawn at random before TPE begins."""
    storage: str | None = None
    """The database of the study, as an SQLAlchemy URL; `${NAME}` in it stands for an environment
    variable, as a password must. None is a file in the sweep's folder."""
    seed: int = 0

    def __post_init__(self):
        _whole("optuna.trajectories", self.trajectories, 1)
        _kind("optuna.ranges", self.ranges, Mapping)
        if not self.ranges:
            raise InputError("optuna.ranges", self.ranges, "must name at least one field")
        for field_name, values in self.ranges.items():
            _kind("optuna.ranges", field_name, str)
            name = f"optuna.ranges[{field_name!r}]"
            if isinstance(values, Range):
                _kind(f"{name}.log", values.log, bool)
                allowed = "must have finite numbers with low < high, above 0 if log"
                _number(name, values.low, above=0 if values.log else -math.inf, allowed=allowed)
                _number(name, values.high, above=values.low, allowed=allowed)
            elif not isinstance(values, tuple) or not values:
                raise InputError(name, values, "must be a Range or a tuple of choices")
            else:
                for value in values:
                    if not isinstance(value, None | bool | int | float | str):
                        raise InputError(name, value, "must be a number, a text, a bool or None")
        _choice("optuna.objective", self.objective, get_args(Objective))
        _choice("optuna.sampler", self.sampler, get_args(Sampler))
        _whole("optuna.startup", self.startup, 1)
        if self.storage is not None:
            # The space goes to the journal and to MLflow, where a password has no place.
            shown = re.sub(r".*@", "...", str(self.storage))
            shown = re.sub(rf"({PASSWORD})[^&]*", r"\1...", shown)
            if not re.match(r"\w+(\+\w+)?://", str(self.storage)):
                allowed = "must be a database's URL, as postgresql://user@host/name"
                raise InputError("optuna.storage", shown, allowed)
            if re.search(rf"//.*:(?!\$\{{\w+\}}@).*@|{PASSWORD}", self.storage):
                allowed = "takes its password from a variable: postgresql://me:${NAME}@host/name"
                raise InputError("optuna.storage", shown, allowed)
        _seed("optuna.seed", self.seed)


@dataclass(frozen=True)
class Resources:
    """What one trajectory takes; CPUs are also its torch threads."""

    cpus_per_trial: int = 1
    gpus_per_trial: float | None = None
    """None is one each where the cluster has GPUs or can get machines that have, else none."""
    watts: float | None = None
    """Power that the hardware of one trial draws, from its data sheet or a meter: what energy is
    estimated with where no counter can be read."""

    def __post_init__(self):
        _whole("resources.cpus_per_trial", self.cpus_per_trial, 1)
        if self.gpus_per_trial is not None:
            _not_negative("resources.gpus_per_trial", self.gpus_per_trial)
            if self.gpus_per_trial > 1:
                allowed = "must be at most 1: a trajectory trains on one GPU"
                raise InputError("resources.gpus_per_trial", self.gpus_per_trial, allowed)
        if self.watts is not None:
            _positive("resources.watts", self.watts)


_PARTS: dict[str, Any] = {
    "network": Network,
    "data": Data,
    "training": Training,
    "proof": Proof,
    "retraining": Retraining,
    "stop_rule": StopRule,
    "resources": Resources,
    "comparison": Comparison,
}


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Everything one sweep needs; a function in `search_spaces/` returns it.

    One trajectory is trained for each penalty and seed, for at most `training.epochs`; every
    prune ratio is a cut of the same trajectory. Raises `InputError` on a value that cannot be
    used.
    """

    name: str
    network: Network
    data: Data
    penalties: tuple[float, ...]
    """Weights of the L1 penalty on the BatchNorm scales."""
    prune_ratios: tuple[float, ...]
    """Shares of the channels to drop."""
    training: Training
    """The trajectory's recipe; its epochs are the budget."""
    retraining: Retraining
    proof: Proof = field(default_factory=Proof)
    stop_rule: StopRule = field(default_factory=StopRule)
    min_channels: int = 1
    """Each channel group keeps at least this many, its best ones."""
    round_to: int = 8
    """Each channel group's width is rounded up to a multiple of this, where the group has as many,
    by keeping the best of the channels to drop: processors compute in blocks, so that they take
    next to no time (tests/benchmarks/shrunk_retraining.py). 1 leaves widths as they are cut."""
    precision: Precision = "auto"
    """What convolutions and matrix products compute in; weights are float32 always. `auto` is
    bfloat16 where the processor or the GPU has instructions for it, but on a processor not for
    grouped convolutions (see `raytickets.train.numerics`). Convolutions in float32 on a GPU are
    in TF32, as PyTorch has it."""
    channels_last: bool = True
    """Keep images and weights in memory with the channels innermost."""
    halving: Halving | None = None
    """Ends trajectories early that fall behind the others; None lets all of them draw."""
    optuna: Optuna | None = None
    """Trajectories that Optuna proposes; None trains the grid of penalties."""
    comparison: Comparison = field(default_factory=Comparison)
    seeds: tuple[int, ...] = (0,)
    winners: int = 3
    """How many tickets of the Pareto set are retrained at most."""
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(
            r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name
        ):
            allowed = "must be letters, digits, '-' and '_', and begin with one of the first two"
            raise InputError("name", self.name, allowed)
        for name, kind in _PARTS.items():
            _kind(name, getattr(self, name), kind)
        _sequence("penalties", self.penalties, _not_negative)
        _sequence("prune_ratios", self.prune_ratios, _share)
        _sequence("seeds", self.seeds, _seed)
        _whole("min_channels", self.min_channels, 1)
        _whole("winners", self.winners, 1)
        _whole("round_to", self.round_to, 1)
        _choice("precision", self.precision, get_args(Precision))
        _kind("channels_last", self.channels_last, bool)
        if self.halving is not None:
            _kind("halving", self.halving, Halving)
        if self.optuna is not None:
            _kind("optuna", self.optuna, Optuna)
            if "penalty" not in self.optuna.ranges and len(self.penalties) > 1:
                allowed = "must be one value, or a range of optuna.ranges"
                raise InputError("penalties", self.penalties, allowed)
        self.training.validate("training")
        self.retraining.validate("retraining")
        if self.comparison.rewind >= self.retraining.epochs:
            allowed = f"must be below retraining.epochs, which is {self.retraining.epochs}"
            raise InputError("comparison.rewind", self.comparison.rewind, allowed)
        if self.halving is not None and self.halving.grace > self.most_epochs:
            allowed = f"must be at most training.epochs, which is {self.most_epochs}"
            raise InputError("halving.grace", self.halving.grace, allowed)
        window, checks = self.stop_rule.window, self.stop_rule.checks_per_epoch
        if self.training.epochs * checks < window:
            allowed = f"must be enough for stop_rule.window, which is {window}"
            raise InputError("training.epochs", self.training.epochs, allowed)

    @property
    def trajectories(self) -> int:
        """How many a sweep has."""
        return self.optuna.trajectories if self.optuna else len(self.penalties) * len(self.seeds)

    @property
    def most_epochs(self) -> int:
        """Of training a trajectory: `training.epochs`, or the most that Optuna may propose."""
        given = self.optuna.ranges.get("training.epochs") if self.optuna else None
        if isinstance(given, Range):
            return int(given.high)
        numbers = (value for value in given or () if isinstance(value, int))
        return max(numbers, default=self.training.epochs)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, keys in the order of the fields."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def with_retraining(self, **changes: Any) -> "SearchSpace":
        """The same space with other values for these fields of `retraining`.

        Milestones keep their shares of the epochs.
        """
        before = self.retraining
        if "epochs" in changes and before.milestones:
            scale = changes["epochs"] / before.epochs
            milestones = tuple(max(1, round(scale * epoch)) for epoch in before.milestones)
            changes = {"milestones": milestones} | changes
        retraining = dataclasses.replace(before, **changes)
        retraining.validate("retraining")
        # Of no weight here: it belongs to comparisons.
        rewind = min(self.comparison.rewind, retraining.epochs - 1)
        comparison = dataclasses.replace(self.comparison, rewind=rewind)
        return dataclasses.replace(self, retraining=retraining, comparison=comparison)

    def with_changes(self, changes: Mapping[str, Any]) -> "SearchSpace":
        """The same space with other values for fields named as in `Optuna.ranges`.

        `penalty` stands for `penalties`. Raises InputError on a field that is not one of these and
        on a value that cannot be used.
        """
        parts: dict[str, Any] = {}
        for name, value in changes.items():
            first, _, rest = name.partition(".")
            if name == "penalty":
                parts["penalties"] = (value,)
            elif first == "network" and rest.startswith("options."):
                network = parts.get("network", self.network)
                options = dict(network.options) | {rest.removeprefix("options."): value}
                parts["network"] = dataclasses.replace(network, options=options)
            elif first in ("training", "stop_rule") and rest in _names(getattr(self, first)):
                part = parts.get(first, getattr(self, first))
                parts[first] = dataclasses.replace(part, **{rest: value})
            else:
                allowed = "must be penalty, training.*, stop_rule.* or network.options.*"
                raise InputError("optuna.ranges", name, allowed)
        return dataclasses.replace(self, **parts)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SearchSpace":
        """The space that `as_dict` described; InputError if it does not describe one."""
        parts = dict(_PARTS)
        if values.get("halving") is not None:
            parts["halving"] = Halving
        try:
            built: dict[str, Any]
            built = {name: part(**_tuples(values[name])) for name, part in parts.items()}
            if values.get("optuna") is not None:
                built["optuna"] = _optuna(values["optuna"])
            return cls(**_tuples(values) | built)
        except (AttributeError, KeyError, TypeError) as error:
            allowed = f"does not describe a search space ({error})"
            raise InputError("space", values.get("name"), allowed) from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every field, in hexadecimal."""
        canonical = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Where two spaces differ, each as `SearchSpace.as_dict` gives it; as `training.epochs`."""
    old, new = _fields(before), _fields(now)
    return [name for name in old | new if old.get(name) != new.get(name)]


def _fields(space: Mapping[str, Any]) -> dict[str, Any]:
    """A space's fields with those of its parts, as `training.epochs`."""
    fields = {}
    for name, value in space.items():
        part = value if isinstance(value, Mapping) else {"": value}
        fields |= {f"{name}.{inner}".rstrip("."): entry for inner, entry in part.items()}
    return fields
