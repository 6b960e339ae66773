"""Retraining: how many workers, and going on from a checkpoint after one is lost."""

import dataclasses

import pytest
import torch

from raytickets.config import Data, InputError, Network, Retraining, SearchSpace, Training
from raytickets.data import load_data
from raytickets.models import build_network
from raytickets.retrain import Job, retrain, worker_count
from raytickets.shrink import channel_groups, shrink
from raytickets.sweep import select
from raytickets.ticket import group_masks, load_ticket, save_ticket

SPACE = SearchSpace(
    name="tiny",
    network=Network("cifar_vgg", {"depth": 9, "width": 0.125}),
    data=Data("digits", limit=128),
    penalties=(1e-3,),
    prune_ratios=(0.5,),
    training=Training(epochs=10),
    retraining=Retraining(epochs=3, batch_size=24, num_workers=2),
)


@pytest.mark.parametrize(
    ("asked", "batch", "available", "workers"),
    [(None, 64, 2, 2), (None, 64, 6, 4), (None, 30, 8, 6), (None, 7, 4, 1), (3, 24, 4, 3)],
)
def test_the_most_workers_that_divide_a_batch(asked, batch, available, workers):
    retraining = Retraining(epochs=3, batch_size=batch, num_workers=asked)
    space = dataclasses.replace(SPACE, retraining=retraining)
    assert worker_count(space, available) == workers


def test_more_workers_than_there_is_room_for_are_refused():
    with pytest.raises(InputError, match=r"retraining\.num_workers: 2 .* room for 1"):
        worker_count(SPACE, 1)


FRAGILE = """
from pathlib import Path
from torch import nn
from raytickets.models import cifar_vgg

class Fragile(nn.Module):
    def __init__(self, inner, step, flag):
        super().__init__()
        self.inner, self.step, self.flag, self.steps = inner, step, flag, 0

    def forward(self, images):
        self.steps += self.training
        if self.flag and self.steps == self.step and not Path(self.flag).exists():
            Path(self.flag).touch()
            raise RuntimeError("lost on purpose")
        return self.inner(images)

def network(num_classes, in_channels, step=0, flag=""):
    inner = cifar_vgg(num_classes=num_classes, in_channels=in_channels, depth=9, width=0.125)
    return Fragile(inner, step, flag)
"""


def ticket_of(space, dataset, folder):
    network = build_network(space.network, in_channels=1, num_classes=10, seed=0)
    groups = channel_groups(network, dataset.shape.example())
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(sum(group.width for group in groups), generator=generator) < 0.6
    manifest = {
        "network": {
            "name": space.network.name,
            "options": dict(space.network.options),
            "in_channels": 1,
            "num_classes": 10,
            "image_size": 8,
        },
        "groups": group_masks(groups, mask, mask),
        "seed": 0,
    }
    return save_ticket(folder / "tickets", shrink(network, groups, mask), manifest)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_instance")
def test_a_lost_worker_costs_nothing_but_time(tmp_path):
    """Final weights after a failure in the last epoch are those of an undisturbed run."""
    import ray

    (tmp_path / "fragile.py").write_text(FRAGILE)
    dataset = load_data(SPACE.data)
    data, steps = ray.put(dataset), 128 // 24
    flag = tmp_path / "lost"
    weights, epochs = [], []
    for name, options in (("calm", {}), ("lost", {"step": 2 * steps + 2, "flag": str(flag)})):
        network = Network(f"{tmp_path}/fragile.py:network", options)
        space = dataclasses.replace(SPACE, network=network)
        ticket = ticket_of(space, dataset, tmp_path / name)
        events = []
        jobs = [Job(ticket.id, ticket.path)]
        retrain(space, jobs, data, tmp_path / name, 2, events.append)
        (done,) = select(events, "retrained")
        retrained = load_ticket(tmp_path / name / done["path"], trust_code=True)
        weights.append(retrained.network().state_dict())
        epochs.append([event["epoch"] for event in select(events, "epoch")])
    assert flag.exists()
    assert epochs == [[1, 2, 3], [1, 2, 3]]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
