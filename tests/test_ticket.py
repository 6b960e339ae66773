"""A ticket is whole or not there, says when it was altered, and rebuilds the same network."""

import os
import resource
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from torch import nn

from raytickets import storage
from raytickets.config import Network
from raytickets.masks import from_text
from raytickets.models import build_network
from raytickets.shrink import channel_groups, shrink
from raytickets.ticket import (
    MANIFEST,
    WEIGHTS,
    DamagedTicket,
    group_masks,
    kept_channels,
    load_ticket,
    save_retrained,
    save_ticket,
)

VGG = Network("cifar_vgg", {"depth": 9, "width": 0.125})


def shrunk_network(spec=VGG, seed=0):
    network = build_network(spec, in_channels=1, num_classes=10, seed=seed)
    groups = channel_groups(network, torch.zeros(1, 1, 8, 8))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(sum(group.width for group in groups), generator=generator) < 0.6
    return shrink(network, groups, mask), groups, mask


def manifest_of(groups, mask, spec=VGG, cut=None):
    return {
        "network": {
            "name": spec.name,
            "options": dict(spec.options),
            "in_channels": 1,
            "num_classes": 10,
            "image_size": 8,
        },
        "groups": group_masks(groups, mask, mask if cut is None else cut),
        "min_channels": {"least": 1, "acted_on": []},
        "round_to": 1,
        "penalty": 1e-3,
        "prune_ratio": 0.5,
        "learning_rate": 0.1,
        "seed": 0,
        "precision": "float32",
        "stop_rule": {"rule": "corrected", "window": 5, "threshold": 0.2, "distances": [0.1] * 4},
        "draw": {"check": 8, "epoch": 8},
        "space": {"name": "digits", "fingerprint": "f" * 16},
        "macs": 350_000,
        "params": 35_000,
    }


def saved_ticket(folder, spec=VGG, seed=0):
    network, groups, mask = shrunk_network(spec, seed)
    return save_ticket(folder, network, manifest_of(groups, mask, spec))


@pytest.fixture
def ticket(tmp_path):
    return saved_ticket(tmp_path / "tickets")


def test_the_network_comes_back_bit_for_bit(tmp_path):
    network, groups, mask = shrunk_network()
    images = torch.randn(16, 1, 8, 8)
    network(images)  # moves the running statistics
    saved = save_ticket(tmp_path, network, manifest_of(groups, mask))
    loaded = load_ticket(saved.path)
    assert torch.equal(loaded.network()(images), network.eval()(images))
    assert torch.equal(loaded.mask, mask)
    assert sum(kept for kept, _ in kept_channels(loaded.manifest).values()) == mask.sum()


def test_a_ticket_keeps_its_mask_and_the_cut_that_was_rounded_up_to_it(tmp_path):
    network, groups, mask = shrunk_network()
    cut = mask.clone()
    cut[mask.nonzero()[::3]] = False
    saved = save_ticket(tmp_path, network, manifest_of(groups, mask, cut=cut))
    loaded = load_ticket(saved.path)
    masks, cuts = (
        "".join(group[of] for group in loaded.manifest["groups"]) for of in ("mask", "cut")
    )
    assert torch.equal(from_text(masks), mask)
    assert torch.equal(from_text(cuts), cut)
    # The network is the mask's, not the cut's.
    assert torch.equal(loaded.mask, mask)
    kept = [kept for kept, _ in kept_channels(loaded.manifest).values()]
    assert kept == [group["mask"].count("1") for group in loaded.manifest["groups"]]
    assert sum(kept) == mask.sum()


def test_fresh_weights_have_the_ticket_shape_and_follow_the_seed(ticket):
    first, again, other = (ticket.fresh_network(seed) for seed in (1, 1, 2))
    shapes = {name: tensor.shape for name, tensor in ticket.network().state_dict().items()}
    assert {name: tensor.shape for name, tensor in first.state_dict().items()} == shapes
    weight = "features.0.weight" if "features.0.weight" in shapes else next(iter(shapes))
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_the_same_ticket_has_the_same_id_and_another_has_not(tmp_path, ticket):
    assert saved_ticket(tmp_path / "b").id == ticket.id
    assert saved_ticket(tmp_path / "tickets") == ticket
    assert saved_ticket(tmp_path / "b", seed=1).id != ticket.id


def test_only_whole_tickets_lie_in_the_folder(ticket):
    assert [path.name for path in ticket.path.parent.iterdir()] == [ticket.id]
    assert sorted(path.name for path in ticket.path.iterdir()) == [MANIFEST, WEIGHTS]


def test_a_damaged_ticket_is_written_again(ticket):
    (ticket.path / WEIGHTS).write_bytes(b"")
    assert load_ticket(saved_ticket(ticket.path.parent).path).id == ticket.id


def test_a_module_with_two_names_is_saved_under_both(tmp_path):
    network, groups, mask = shrunk_network()
    network.again = next(module for module in network.modules() if isinstance(module, nn.Linear))
    saved = save_ticket(tmp_path, network, manifest_of(groups, mask))
    weights = safetensors.torch.load_file(saved.path / WEIGHTS)
    assert weights.keys() == network.state_dict().keys()
    assert torch.equal(weights["again.weight"], network.again.weight)


def test_a_manifest_that_could_not_be_read_again_is_not_written(tmp_path):
    network, groups, mask = shrunk_network()
    manifest = manifest_of(groups, mask) | {"macs": "many"}
    with pytest.raises(ValueError, match=r"manifest\.macs cannot be 'many'"):
        save_ticket(tmp_path, network, manifest)
    assert not [*tmp_path.iterdir()]


def test_what_a_killed_writer_left_goes_at_a_later_save_if_it_is_old(ticket):
    young, old = (ticket.path.parent / f".writing-{name}" for name in ("young", "old"))
    for path in (young, old):
        path.mkdir()
        (path / WEIGHTS).write_bytes(b"half")
    yesterday = time.time() - 2 * 86_400
    os.utime(old, (yesterday, yesterday))
    saved_ticket(ticket.path.parent, seed=1)
    assert young.is_dir()
    assert not old.exists()


def test_a_full_disk_leaves_nothing_and_is_named(ticket):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            saved_ticket(ticket.path.parent, seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in ticket.path.parent.iterdir()] == [ticket.id]


def test_a_ticket_is_kept_once_it_is_in_place_and_fetched_before_it_is_read(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(storage, "keep", lambda path: told.append(("keep", load_ticket(path).id)))
    monkeypatch.setattr(
        storage, "fetch", lambda path, **_: told.append(("fetch", path.name)) or path
    )
    saved = saved_ticket(tmp_path)
    assert told == [("fetch", saved.id), ("keep", saved.id)]
    saved_ticket(tmp_path)  # its upload may have been cut off
    assert told[-1] == ("keep", saved.id)


@pytest.mark.parametrize("spec", [Network("resnet18"), Network("regnet_x_400mf"), VGG])
def test_a_network_is_put_together_without_its_dense_weights(tmp_path, spec):
    dense = build_network(spec, in_channels=3, num_classes=10, seed=0)
    groups = channel_groups(dense, torch.zeros(1, 3, 32, 32))
    mask = torch.tensor([place % 2 == 0 for group in groups for place in range(group.width)])
    manifest = manifest_of(groups, mask, spec)
    manifest["network"] |= {"in_channels": 3, "image_size": 32}
    shrunk = shrink(dense, groups, mask)
    loaded = save_ticket(tmp_path, shrunk, manifest).network()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), shrunk.eval()(images))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.train()(images).sum().backward()


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_flipped_bit_is_noticed(ticket, name, place):
    content = bytearray((ticket.path / name).read_bytes())
    if name == MANIFEST and place == -1:
        place = -3  # the file ends in a line break, which JSON does not read
    content[place] ^= 4
    (ticket.path / name).write_bytes(content)
    with pytest.raises(DamagedTicket, match=ticket.id):
        load_ticket(ticket.path)


@pytest.mark.slow
def test_no_pickle_is_opened_on_the_ticket_path(ticket):
    watched = """
import sys
seen = []
sys.addaudithook(lambda event, _: seen.append(event) if event.startswith("pickle.") else None)
from raytickets import load_ticket
start = len(seen)
load_ticket(sys.argv[1]).network()
sys.exit(len(seen) - start)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", watched, str(ticket.path)], env=environment, check=True)


def test_a_retrained_ticket_is_the_same_mask_with_other_weights(ticket, tmp_path):
    retrained = ticket.fresh_network(seed=5)
    told = {"epochs": 3, "num_workers": 1, "validation_accuracy": 0.5, "test_accuracy": 0.25}
    event = {"event": "retrained", "run": ticket.id, "seconds": 1.0, **told}
    saved = save_retrained(tmp_path / "retrained", ticket.path, retrained, event)
    again = load_ticket(saved.path)
    assert torch.equal(again.mask, ticket.mask)
    assert again.manifest["retrained"] == {"from": ticket.id, **told}
    weights = again.network().state_dict()
    assert all(torch.equal(weights[name], t) for name, t in retrained.state_dict().items())
    unchanged = ("network", "groups", "round_to", "precision", "seed")
    assert all(again.manifest[name] == ticket.manifest[name] for name in unchanged)
