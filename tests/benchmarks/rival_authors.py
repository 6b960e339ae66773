"""Rival B, the authors' way: one process trains one penalty after the other to the last epoch.

    uv run python tests/benchmarks/rival_authors.py FOLDER --limit 10000 --validation 1000 \
        --penalties 1e-4 1e-3 --ratios 0.3 0.5 0.7 --epochs 40 --out out

Built as main.py of https://github.com/RICE-EIC/Early-Bird-Tickets (You et al., ICLR 2020): PIL
images from arrays in memory, as its CIFAR-10 has them (`--files` decodes the files in every epoch
instead, as its ImageNet does), a DataLoader with one worker, before every epoch one look at the
masks of each ratio by an object of its own, the initial mask included, and an evaluation after
every epoch. In its favour: no checkpoint but those of the draws (theirs writes two more in every
epoch), no gradients while evaluating, and none of its filters that do nothing by default. Torch
takes one thread and the loader's worker the other core: on a busy machine of two cores two threads
took many times as long as one. `--threads` gives another number. On a GPU (`--device
cuda`) batches come in page-locked memory, as theirs do.
"""

import json
import time
from statistics import median

import torch
import torch.nn.functional as F
from authors_rule import EarlyBird
from rival_images import datasets, decode
from rivals import arguments, build, settings
from timing import process_age
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader
from torchvision import transforms


def loaders(settings, arrays, workers: int, device: str = "cpu") -> tuple[DataLoader, DataLoader]:
    """For training and for evaluation."""
    crop = [transforms.Pad(settings.padding), transforms.RandomCrop(settings.size)]
    train, validation = datasets(settings, crop, arrays)
    how = {"num_workers": workers, "pin_memory": device != "cpu"}
    return (
        DataLoader(train, settings.batch_size, shuffle=True, drop_last=True, **how),
        DataLoader(validation, 256, **how),
    )


def update_bn(model: nn.Module, penalty: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.grad.data.add_(penalty * torch.sign(module.weight.data))


def count_right(output: Tensor, target: Tensor) -> tuple[float, float]:
    """Percentages of labels that are the first, and among the first five."""
    _, places = output.topk(5, 1)
    right = places.eq(target.view(-1, 1))
    return tuple(right[:, :k].float().sum().item() * 100 / len(target) for k in (1, 5))


def train(
    model: nn.Module,
    optimizer: optim.SGD,
    loader: DataLoader,
    penalty: float,
    device: str = "cpu",
) -> float:
    """Train one epoch; its seconds."""
    started, loss_sum, right = time.perf_counter(), 0.0, 0.0
    model.train()
    for data, target in loader:
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = model(data)
        loss = F.cross_entropy(output, target)
        loss_sum += loss.item()
        right += count_right(output.data, target)[0]
        loss.backward()
        update_bn(model, penalty)
        optimizer.step()
    return time.perf_counter() - started


@torch.no_grad()
def test(model: nn.Module, loader: DataLoader, device: str) -> float:
    model.eval()
    loss, right = 0.0, 0.0
    for data, target in loader:
        data, target = data.to(device), target.to(device)
        output = model(data)
        loss += F.cross_entropy(output, target, reduction="sum").item()
        right += count_right(output, target)[0]
    return right / max(len(loader), 1)


def start(settings, device: str = "cpu") -> tuple[nn.Module, optim.SGD]:
    torch.manual_seed(settings.seed)
    model, rate = build(settings).to(device), settings.learning_rate
    decay = {"momentum": settings.momentum, "weight_decay": settings.weight_decay}
    return model, optim.SGD(model.parameters(), lr=rate, **decay)


def trajectory(
    settings, penalty: float, training: DataLoader, validation: DataLoader, device: str = "cpu"
) -> dict:
    """Train to the last epoch and save the checkpoint of each ratio's draw.

    `stops` are the epochs that were trained before a draw; they never look after the last.
    """
    model, optimizer = start(settings, device)
    watchers = {ratio: EarlyBird(ratio) for ratio in settings.ratios}
    stops: dict[str, int | None] = dict.fromkeys(f"{ratio:g}" for ratio in settings.ratios)
    seconds, accuracy = [], 0.0
    for epoch in range(settings.epochs):
        for ratio, watcher in watchers.items():
            if watcher.early_bird_emerge(model) and stops[f"{ratio:g}"] is None:
                stops[f"{ratio:g}"] = epoch
                state = {
                    "epoch": epoch,
                    "mask": watcher.masks[-1],
                    "state_dict": model.state_dict(),
                }
                state["optimizer"] = optimizer.state_dict()
                torch.save(state, settings.out / f"EB-{penalty:g}-{ratio:g}-{epoch}.pth.tar")
        seconds.append(train(model, optimizer, training, penalty, device))
        accuracy = test(model, validation, device)
    found = {"penalty": penalty, "epochs": settings.epochs, "stops": stops}
    return found | {"epoch_seconds": median(seconds[1:] or seconds), "accuracy": accuracy}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=1, help="of each DataLoader")
    parser.add_argument("--files", action="store_true", help="decode the files in every epoch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parsed = parser.parse_args()
    chosen, began = settings(parsed), time.perf_counter()
    torch.set_num_threads(parsed.threads)
    arrays = None if parsed.files and not chosen.digits else decode(chosen)
    both = loaders(chosen, arrays, parsed.workers, parsed.device)
    done = [trajectory(chosen, penalty, *both, parsed.device) for penalty in chosen.penalties]
    wall, age, began = time.perf_counter() - began, process_age(), time.perf_counter()
    for _ in both[0]:
        pass
    found = {"rival": "authors", "seconds": wall, "seconds_with_imports": age}
    found["data_seconds"] = time.perf_counter() - began
    print(json.dumps(found | {"trajectories": done}))


if __name__ == "__main__":
    main()
