"""Ray Tune as its PyTorch tutorial uses it: a function trial, a checkpoint in every epoch, and
Ray's own MLflow callback. Run again in the same folder it goes on with `Tuner.restore`.

    uv run python tests/faults/stock.py FOLDER TRACKING_URI EPOCHS
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import ray
import torch
import torch.nn.functional as F
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from raytickets.config import Network
from raytickets.models import build_network

IMAGES = 1439
"""To train on, as many as raytickets does beside it: the rest is for validation and testing."""


def train(config: dict, folder: Path, epochs: int) -> None:
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:IMAGES, None] / 16
    labels = torch.tensor(digits.target)[:IMAGES]
    loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True, drop_last=True)
    options = Network("cifar_vgg", {"depth": 9, "width": 0.5})
    network = build_network(options, in_channels=1, num_classes=10, seed=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=config["rate"], momentum=0.9)
    first = 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as saved:
            state = torch.load(Path(saved) / "state.pt")
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    for epoch in range(first + 1, epochs + 1):
        for some, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(some), labels)
            loss.backward()
            optimizer.step()
        with (folder / "epochs").open("a") as file:
            file.write(f"{config['rate']} {epoch}\n")
        with tempfile.TemporaryDirectory() as scratch:
            state = {
                "epoch": epoch,
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state, Path(scratch) / "state.pt")
            checkpoint = tune.Checkpoint.from_directory(scratch)
            tune.report({"epoch": epoch, "loss": loss.item()}, checkpoint=checkpoint)


def main() -> int:
    folder, uri, epochs = Path(sys.argv[1]).resolve(), sys.argv[2], int(sys.argv[3])
    ray.init("local", log_to_driver=False)
    trial = tune.with_parameters(train, folder=folder, epochs=epochs)
    if tune.Tuner.can_restore(str(folder / "tune")):
        tuner = tune.Tuner.restore(str(folder / "tune"), trial, resume_errored=True)
    else:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space={"rate": tune.grid_search([0.01, 0.02])},
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(folder),
                callbacks=[MLflowLoggerCallback(tracking_uri=uri, experiment_name="stock")],
            ),
        )
    return int(bool(tuner.fit().errors))


if __name__ == "__main__":
    sys.exit(main())
