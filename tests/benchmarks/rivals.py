"""What the three rivals share: their settings and command line.

They take from raytickets the networks and nothing else.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from raytickets.config import Network
from raytickets.models import build_network


@dataclass(frozen=True)
class Settings:
    data: str
    network: str
    options: dict
    limit: int
    validation: int
    penalties: tuple[float, ...]
    ratios: tuple[float, ...]
    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    seed: int
    out: Path

    @property
    def digits(self) -> bool:
        return self.data == "digits"

    @property
    def padding(self) -> int:
        """Pixels of zeros around training images for random crops, as in the built-in spaces."""
        return 1 if self.digits else 4

    @property
    def size(self) -> int:
        return 8 if self.digits else 32


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all rivals take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Plain)
    add = parser.add_argument
    add("data", help="`digits`, or a folder with train/<class>/<image>")
    add("--network", default="cifar_vgg")
    add("--options", type=json.loads, default={}, help="of the network, as JSON")
    add("--limit", type=int, required=True, help="training images, as many of each class")
    add("--validation", type=int, required=True, help="validation images; 0 for none")
    add("--penalties", type=float, nargs="+", default=[1e-4])
    add("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    add("--epochs", type=int, required=True, help="the budget of a trajectory")
    add("--batch-size", type=int, default=64)
    add("--learning-rate", type=float, default=0.05)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=1e-4)
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, help="folder for what it writes")
    return parser


class _Plain(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def settings(parsed: argparse.Namespace) -> Settings:
    """What was typed, with the output folder made."""
    values = {name: getattr(parsed, name) for name in Settings.__dataclass_fields__}
    values |= {"penalties": tuple(parsed.penalties), "ratios": tuple(parsed.ratios)}
    values["out"] = parsed.out.resolve()
    values["out"].mkdir(parents=True, exist_ok=True)
    return Settings(**values)


def build(settings: Settings) -> nn.Module:
    channels = 1 if settings.digits else 3
    network = Network(settings.network, settings.options)
    return build_network(network, in_channels=channels, num_classes=10, seed=settings.seed)
