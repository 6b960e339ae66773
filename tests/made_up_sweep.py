"""A sweep as its journal would tell of it, with round numbers, for tests of what reads it."""

from pathlib import Path
from typing import Any

from raytickets.config import Data, Network, Retraining, SearchSpace, StopRule, Training
from raytickets.journal import Event, Journal

SPACE = SearchSpace(
    name="digits",
    network=Network("cifar_vgg", {"depth": 9, "width": 0.125}),
    data=Data(),
    penalties=(1e-4, 1e-3),
    prune_ratios=(0.3, 0.5),
    training=Training(epochs=20),
    retraining=Retraining(epochs=30),
    stop_rule=StopRule(checks_per_epoch=2),
    winners=2,
)
LOW, HIGH = "penalty0.0001-seed0", "penalty0.001-seed0"
LARGE, MIDDLE, SMALL = "1" * 16, "2" * 16, "3" * 16
GIGA = 10**9

OPENING: Event = {
    "event": "sweep",
    "name": "first",
    "space": SPACE.as_dict(),
    "fingerprint": SPACE.fingerprint,
    "channels": 448,
    "dense": {"macs": 2_000_000, "params": 300_000},
    "data": {"fingerprint": "f" * 64, "train": 1200, "validation": 200, "test": 400},
    "versions": {"raytickets": "0.1.0"},
}


def check(trajectory: str, epoch: float, distances: dict[str, float | None]) -> Event:
    whole = epoch == int(epoch)
    return {
        "event": "check",
        "trajectory": trajectory,
        "check": int(epoch * SPACE.stop_rule.checks_per_epoch),
        "epoch": epoch,
        "loss": 2 / epoch,
        "validation_accuracy": 1 - 0.5 / epoch if whole else None,
        "distances": distances,
        "about_to_draw": any(distance and distance <= 0.4 for distance in distances.values()),
        "train_macs": int(epoch * 10 * GIGA),
        "seconds": float(epoch),
    }


def ticket(
    trajectory: str, id: str, ratio: float, macs: int, accuracy: float, epoch: float = 8.0
) -> Event:
    return {
        "event": "ticket",
        "trajectory": trajectory,
        "ticket": id,
        "path": f"tickets/{id}",
        "method": "early_bird",
        "penalty": 1e-4 if trajectory == LOW else 1e-3,
        "prune_ratio": ratio,
        "learning_rate": 0.1,
        "seed": 0,
        "rule": "corrected",
        "draw_check": int(epoch * SPACE.stop_rule.checks_per_epoch),
        "draw_epoch": epoch,
        "mask_distance": 0.125,
        "macs": macs,
        "params": macs // 10,
        "kept": {"0": [20, 32]},
        "proof_accuracy": accuracy,
        "proof_macs": 20 * GIGA,
    }


def proof(ticket: str, rung: int, accuracy: float) -> Event:
    return {
        "event": "proof",
        "ticket": ticket,
        "rung": rung,
        "proof_accuracy": accuracy,
        "proof_macs": 2 ** (rung - 1) * 20 * GIGA,
        "seconds": 5.0,
    }


def trajectory(id: str, state: str, macs: int, ratios: dict[str, str], reason: str = "") -> Event:
    return {
        "event": "trajectory",
        "trajectory": id,
        "method": "early_bird",
        "penalty": 1e-4 if id == LOW else 1e-3,
        "seed": 0,
        "changes": {},
        "state": state,
        "reason": reason,
        "epochs": macs / (10 * GIGA),
        "train_macs": macs,
        "seconds": 20.0,
        "ratios": ratios,
        "distances_matrix": {"epochs": [], "ratios": {}},
    }


def epoch(run: str, number: int) -> Event:
    return {
        "event": "epoch",
        "run": run,
        "epoch": number,
        "loss": 0.25,
        "validation_accuracy": 0.97,
        "learning_rate": 0.1,
    }


def retrained(run: str, macs: int, train_macs: int, accuracy: float) -> Event:
    return {
        "event": "retrained",
        "run": run,
        "path": None if run == "dense" else f"retrained/{run}",
        "macs": macs,
        "params": macs // 10,
        "epochs": 30,
        "validation_accuracy": accuracy - 0.01,
        "test_accuracy": accuracy,
        "train_macs": train_macs,
        "seconds": 60.0,
        "num_workers": 2,
        "recipe": SPACE.as_dict()["retraining"],
    }


SEARCHED: list[Event] = [
    OPENING,
    check(LOW, 1.0, {"0.3": None, "0.5": None}),
    check(HIGH, 1.0, {"0.3": None, "0.5": None}),
    check(HIGH, 7.5, {"0.3": 0.1, "0.5": 0.25}),
    ticket(HIGH, MIDDLE, 0.3, 900_000, 0.95, epoch=7.5),
    check(LOW, 8.0, {"0.3": 0.125, "0.5": 0.75}),
    ticket(LOW, LARGE, 0.3, 1_000_000, 0.98),
    check(HIGH, 10.0, {"0.3": 0.1, "0.5": 0.2}),
    ticket(HIGH, SMALL, 0.5, 350_000, 0.96, epoch=10.0),
    trajectory(HIGH, "drawn", 100 * GIGA, {"0.3": "drawn", "0.5": "drawn"}),
    check(LOW, 20.0, {"0.3": 0.05, "0.5": 0.5}),
    trajectory(LOW, "not converged", 200 * GIGA, {"0.3": "drawn", "0.5": "not converged"}),
    proof(SMALL, 2, 0.965),
    proof(LARGE, 2, 0.985),
    {"event": "winners", "tickets": [LARGE, SMALL]},
]
"""A search over: 300 GMACs of trajectories, 60 of first proofs and 80 of second ones."""

FINISHED: list[Event] = [
    *SEARCHED,
    epoch("dense", 30),
    retrained("dense", 2_000_000, 1000 * GIGA, 0.99),
    epoch(LARGE, 30),
    retrained(LARGE, 1_000_000, 500 * GIGA, 0.985),
    epoch(SMALL, 30),
    retrained(SMALL, 350_000, 175 * GIGA, 0.9625),
    {"event": "end", "state": "done", "reason": ""},
]


def write(folder: Path, events: list[dict[str, Any]]) -> Path:
    """A sweep's folder with this journal."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    for event in events:
        journal.append(event)
    journal.close()
    return folder


def write_tickets(folder: Path, events: list[Event]) -> None:
    """The files of these events' tickets, which hold nothing that can be loaded."""
    paths = [event.get("path") for event in events if event["event"] in ("ticket", "retrained")]
    for path in filter(None, paths):
        (folder / path).mkdir(parents=True)
        (folder / path / "ticket.safetensors").write_bytes(f"weights of {path}".encode())
        (folder / path / "manifest.json").write_text("{}")
