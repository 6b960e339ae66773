"""Rival A, the recipe a Ray user would write: one Ray Tune trial for each penalty and prune ratio.

    uv run python tests/benchmarks/rival_tune.py FOLDER --limit 10000 --validation 1000 \
        --penalties 1e-4 1e-3 --ratios 0.3 0.5 0.7 --epochs 40 --out out

Ray Tune's tutorial for PyTorch with the published stop rule: a function trial trains from PIL
images under torchvision's transforms in a DataLoader, validates and reports after every epoch, and
ends at its draw with mask and weights as its checkpoint. Ray's own MLflow callback records it.
In its favour: no checkpoint but that of the draw (the tutorial writes one in every epoch), one
torch thread to each trial's one CPU, and with `--decoded` images that were decoded once and come
from Ray's object store. The tutorial's 8 loader workers are 1 here, as two trials run on two cores.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import ray
import torch
import torch.nn.functional as F
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from rival_images import datasets, decode
from rivals import arguments, build, settings
from timing import process_age
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms


def current_mask(network: nn.Module, ratio: float) -> Tensor:
    """The channels over the threshold of the published rule."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    gammas = torch.cat([norm.weight.detach().abs() for norm in norms])
    return gammas > gammas.sort().values[int(len(gammas) * ratio)]


def converged(masks: list[Tensor]) -> bool:
    """Whether the newest of the last five masks is within 0.1 of each of the four before it."""
    if len(masks) < 5:
        return False
    return all((masks[-1] != mask).sum().item() / len(mask) <= 0.1 for mask in masks[-5:-1])


def train_ticket(config: dict, settings, workers: int, arrays=None) -> None:
    """One trial: train until the mask of its ratio has converged, or the budget ends."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    network = build(settings)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    crop = [transforms.RandomCrop(settings.size, padding=settings.padding)]
    train, validation = datasets(settings, crop, arrays)
    batch, masks = {"batch_size": settings.batch_size, "num_workers": workers}, []
    loader = DataLoader(train, shuffle=True, drop_last=True, **batch)
    for epoch in range(1, settings.epochs + 1):
        started, running = time.perf_counter(), 0.0
        network.train()
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(images), labels)
            loss.backward()
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.grad.add_(config["penalty"] * torch.sign(module.weight.detach()))
            optimizer.step()
            running += loss.item()
        seconds, right = time.perf_counter() - started, 0
        network.eval()
        with torch.no_grad():
            for images, labels in DataLoader(validation, **batch):
                right += (network(images).argmax(1) == labels).sum().item()
        masks.append(current_mask(network, config["ratio"]))
        drawn = converged(masks)
        metrics = {
            "epoch": epoch,
            "loss": running / len(loader),
            "accuracy": right / max(len(validation), 1),
            "train_seconds": seconds,
            "drawn": drawn,
        }
        if not drawn:
            tune.report(metrics)
            continue
        with tempfile.TemporaryDirectory() as folder:
            state = {"mask": masks[-1], "network": network.state_dict()}
            torch.save(state, Path(folder) / "ticket.pt")
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
        return


def search(settings, workers: int, decoded: bool, reuse_actors: bool) -> list[dict]:
    """Run the grid; what became of each trial."""
    given = {"arrays": decode(settings)} if decoded or settings.digits else {}
    trainable = tune.with_parameters(train_ticket, settings=settings, workers=workers, **given)
    store = f"sqlite:///{settings.out / 'mlflow.db'}"
    grid = {"penalty": settings.penalties, "ratio": settings.ratios}
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={name: tune.grid_search(list(values)) for name, values in grid.items()},
        tune_config=tune.TuneConfig(reuse_actors=reuse_actors),
        run_config=tune.RunConfig(
            name=f"tickets-{time.time_ns()}",
            storage_path=str(settings.out),
            callbacks=[MLflowLoggerCallback(tracking_uri=store, experiment_name="tickets")],
        ),
    )
    found = []
    for result in tuner.fit():
        if result.error:
            raise result.error
        frame, stop = result.metrics_dataframe, result.metrics["epoch"]
        seconds = frame["train_seconds"].tolist()
        draw = stop if result.metrics["drawn"] else None
        found.append(
            {
                "penalty": result.config["penalty"],
                "epochs": stop,
                "stops": {f"{result.config['ratio']:g}": draw},
                "epoch_seconds": median(seconds[1:] or seconds),
            }
        )
    return found


def main() -> None:
    # Under `uv run` Ray would otherwise build an environment for every worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=1, help="of each DataLoader")
    parser.add_argument("--decoded", action="store_true", help="decode the images only once")
    parser.add_argument("--reuse-actors", action="store_true")
    parsed = parser.parse_args()
    started = time.perf_counter()
    ray.init("local", log_to_driver=False)
    done = search(settings(parsed), parsed.workers, parsed.decoded, parsed.reuse_actors)
    wall, age = time.perf_counter() - started, process_age()
    found = {"rival": "tune", "seconds": wall, "seconds_with_imports": age}
    print(json.dumps(found | {"trajectories": done}))


if __name__ == "__main__":
    main()
