"""A ticket is whole or not there, says when it was altered, and rebuilds the same network."""

import json
import os
import subprocess
import sys

import pytest
import torch

from raytickets.config import InputError, Network
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
        "round_to": 1,
        "precision": "float32",
        "seed": 0,
    }


@pytest.fixture
def ticket(tmp_path):
    network, groups, mask = shrunk_network()
    return save_ticket(tmp_path / "tickets", network, manifest_of(groups, mask))


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
    network, groups, mask = shrunk_network()
    assert save_ticket(tmp_path / "b", network, manifest_of(groups, mask)).id == ticket.id
    assert save_ticket(tmp_path / "tickets", network, manifest_of(groups, mask)) == ticket
    network, groups, mask = shrunk_network(seed=1)
    assert save_ticket(tmp_path / "b", network, manifest_of(groups, mask)).id != ticket.id


def test_only_whole_tickets_lie_in_the_folder(ticket):
    assert [path.name for path in ticket.path.parent.iterdir()] == [ticket.id]
    assert sorted(path.name for path in ticket.path.iterdir()) == [MANIFEST, WEIGHTS]


def test_a_damaged_ticket_is_written_again(ticket):
    (ticket.path / WEIGHTS).write_bytes(b"")
    network, groups, mask = shrunk_network()
    again = save_ticket(ticket.path.parent, network, manifest_of(groups, mask))
    assert load_ticket(again.path).id == ticket.id


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


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
def test_a_missing_or_cut_file_is_noticed(ticket, name):
    content = (ticket.path / name).read_bytes()
    (ticket.path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedTicket):
        load_ticket(ticket.path)
    (ticket.path / name).unlink()
    with pytest.raises(DamagedTicket):
        load_ticket(ticket.path)


def altered(ticket, change):
    """The ticket with another manifest whose own checksum is right."""
    from raytickets.ticket import _id

    manifest = json.loads((ticket.path / MANIFEST).read_text())
    del manifest["id"]
    change(manifest)
    (ticket.path / MANIFEST).write_text(json.dumps({"id": _id(manifest), **manifest}))
    return ticket.path


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(schema=2),
        lambda manifest: manifest.update(files={}),
        lambda manifest: manifest.update(files={"../ticket.safetensors": "0" * 64}),
        lambda manifest: manifest.pop("files"),
    ],
)
def test_a_manifest_of_another_form_is_refused(ticket, change):
    with pytest.raises(DamagedTicket):
        load_ticket(altered(ticket, change))


def test_masks_that_do_not_fit_the_network_are_refused(ticket):
    path = altered(ticket, lambda m: m["groups"][0].update(mask=m["groups"][0]["mask"] + "1"))
    with pytest.raises(DamagedTicket, match="channel groups"):
        load_ticket(path).network()


def test_code_named_by_a_ticket_runs_only_when_trusted(ticket, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('the stranger ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = altered(ticket, lambda m: m["network"].update(name="stranger:network", options={}))
    with pytest.raises(InputError, match="trust_code"):
        load_ticket(path).network()
    with pytest.raises(SystemExit, match="the stranger ran"):
        load_ticket(path, trust_code=True).network()


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
