"""A ticket is proved again from its draw, and proving leaves no trace in the training."""

import pytest
import torch
from torch import nn

from raytickets.config import Data, Network, Proof, Retraining, SearchSpace, Training
from raytickets.data import load_data
from raytickets.draw import Trajectory, cut_groups, fine_tune, prove, write_ticket
from raytickets.shrink import shrink
from raytickets.ticket import load_ticket
from raytickets.train import seeded
from raytickets.trajectory import dense_network, prepare


def small(*, num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(12, 16, 3),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


SPACE = SearchSpace(
    name="small",
    network=Network("test_draw:small"),
    data=Data("digits", limit=256),
    penalties=(1e-3,),
    prune_ratios=(0.5,),
    training=Training(epochs=5, learning_rate=0.05, batch_size=32),
    retraining=Retraining(epochs=2, batch_size=32),
    proof=Proof(budget=0.5, batch_size=32),
    round_to=1,
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A setting, the mask of a ticket, its network and its event."""
    folder = tmp_path_factory.mktemp("sweep")
    setting = prepare(SPACE, load_data(SPACE.data), folder)
    trajectory = Trajectory(
        setting, "x", "early_bird", 1e-3, 0, SPACE.training, (0.5,), setting.meter()
    )
    mask, chosen = cut_groups(setting, torch.rand(28, generator=seeded("scores")), 0.5)
    network = shrink(dense_network(SPACE, setting.dataset, 0), setting.groups, mask)
    event = write_ticket(trajectory, "early_bird", 0.5, network, mask, chosen)
    return setting, mask, network, event


def test_a_ticket_on_disk_is_the_network_of_its_mask(drawn):
    setting, mask, network, event = drawn
    ticket = load_ticket(setting.sweep / event["path"], trust_code=True)
    weights = ticket.network().state_dict()
    assert torch.equal(ticket.mask, mask)
    assert all(torch.equal(weights[name], other) for name, other in network.state_dict().items())
    assert sum(kept for kept, _ in event["kept"].values()) == mask.sum() < 28
    assert (event["draw_check"], event["mask_distance"], event["rule"]) == (None, None, None)


def test_a_later_rung_proves_again_from_the_draw_with_twice_the_macs(drawn):
    setting, _, _, event = drawn
    path = setting.sweep / event["path"]
    right, macs = fine_tune(
        setting, load_ticket(path, trust_code=True).network(), event["macs"], 0, rung=1
    )
    torch.rand(5)  # Dropout is the same whatever was drawn before.
    first, second = (prove(setting, path, rung) for rung in (1, 2))
    assert (first["proof_accuracy"], first["proof_macs"]) == (right, macs)
    assert second["proof_macs"] == pytest.approx(2 * macs, rel=0.05)
    assert (second["event"], second["ticket"], second["rung"]) == ("proof", event["ticket"], 2)
