"""A space as a user would write it, and a stand-in for what would run it."""

import contextlib
import sys
from types import SimpleNamespace

FIELDS = {
    "name": "'mine'",
    "network": "Network('cifar_vgg', {'depth': 9, 'width': 0.125})",
    "data": "Data('folder', 'images')",
    "penalties": "(1e-4,)",
    "prune_ratios": "(0.3, 0.5)",
    "training": "Training(epochs=5, batch_size=8)",
    "proof": "Proof(budget=1, batch_size=8)",
    "retraining": "Retraining(epochs=5, batch_size=8)",
}
IMPORTS = "from raytickets.config import *\n"
NETS = """
from torch import nn

def nothing(num_classes, in_channels):
    return None

def plain(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, num_classes, 8), nn.Flatten())

def headless(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4))

def broken(num_classes, in_channels):
    raise ValueError("no weights\\nat all")

def oddly_named(num_classes, in_channels, **options):
    network = nn.Sequential()
    network.add_module("[1]", nn.Conv2d(in_channels, 4, 3))
    network.add_module("norm", nn.BatchNorm2d(4))
    network.add_module("flatten", nn.Flatten())
    network.add_module("head", nn.Linear(4 * 36, num_classes))
    return network

def narrow(num_classes, in_channels):
    return nn.Sequential(nn.BatchNorm2d(in_channels), nn.Flatten(), nn.Linear(12, num_classes))
"""
FRAGILE = """
import torch
from raytickets.models import cifar_vgg

class Fragile(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        if self.training and self.inner.head.weight.abs().max() > 0.6:
            raise RuntimeError('the wheels came off')
        return self.inner(images)

def network(num_classes, in_channels):
    vgg = cifar_vgg(num_classes=num_classes, in_channels=in_channels, depth=9, width=0.125)
    return Fragile(vgg)
"""
"""It breaks once it is trained in earnest."""


def source(**fields):
    """A space's file, with these expressions for its fields."""
    lines = [f"        {name}={value}," for name, value in (FIELDS | fields).items()]
    return "\n".join([IMPORTS, "def space():", "    return SearchSpace(", *lines, "    )", ""])


class Failed(RuntimeError):
    pass


def stand_in_for_ray(monkeypatch, run):
    """Ray and MLflow take seconds to import: `run` takes the driver's place."""
    driver = SimpleNamespace(
        run=run, retrain_ticket=run, SweepFailed=Failed, interruptible=contextlib.nullcontext
    )
    tracking = SimpleNamespace(
        resolve_uri=str,
        ui_command="mlflow ui {}".format,
        tickets_address="http://{}/{}".format,
    )
    monkeypatch.setitem(sys.modules, "raytickets.driver", driver)
    monkeypatch.setitem(sys.modules, "raytickets.tracking", tracking)
