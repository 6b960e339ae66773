"""Rival C, the floor: a bare loop over tensors in memory, without Ray, tracking or masks.

    uv run python tests/benchmarks/rival_bare.py FOLDER --limit 10000 --validation 1000 \
        --penalties 1e-4 1e-3 --epochs 12 --precision bfloat16 --channels-last --out out

With `--processes '[[[1e-4, 9]], [[1e-3, 12]]]'` it trains these [penalty, epochs] side by side,
one list in each process: the script that does a sweep's training and nothing else. The optimizer
is the kernel of torch.optim.SGD(fused=True), without the import of torch._dynamo (5 s in every
process) that comes with torch.optim. Files are decoded once, before the processes fork.
"""

import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import torch
import torch.nn.functional as F
from rival_images import Arrays, decode, picks
from rivals import Settings, arguments, build, settings
from timing import process_age
from torch import Tensor, nn

PLAIN = {"dampening": 0.0, "nesterov": False, "maximize": False, "is_first_step": False}


class Bare:
    """One training run; `epoch` trains one epoch and returns its seconds."""

    def __init__(
        self,
        settings: Settings,
        arrays: Arrays,
        penalty: float,
        bfloat16: bool,
        channels_last: bool,
    ):
        self.settings, self.penalty, self.bfloat16 = settings, penalty, bfloat16
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        torch.manual_seed(settings.seed)
        self.network = build(settings).to(memory_format=self.layout)
        self.params = list(self.network.parameters())
        self.momentum = [torch.zeros_like(parameter) for parameter in self.params]
        self.recipe = {
            "weight_decay": settings.weight_decay,
            "momentum": settings.momentum,
            "lr": settings.learning_rate,
        }
        norms = [m for m in self.network.modules() if isinstance(m, nn.BatchNorm2d)]
        self.scales = [norm.weight for norm in norms]
        images, labels = torch.from_numpy(arrays[0]), torch.tensor(arrays[1])
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
        train, validation = picks(arrays[1], settings)
        self.labels, self.validation = labels[train], (images[validation], labels[validation])
        size, reach = images.shape[-1], (settings.padding,) * 4
        self.windows = F.pad(images[train], reach).unfold(2, size, 1).unfold(3, size, 1)
        pixels = images[train].float()
        self.mean = pixels.mean((0, 2, 3)).view(-1, 1, 1)
        self.deviation = pixels.std((0, 2, 3)).view(-1, 1, 1)

    def inputs(self, images: Tensor) -> Tensor:
        scaled = (images.float() - self.mean) / self.deviation
        return scaled.contiguous(memory_format=self.layout)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch, shuffled, cropped and (but for digits) flipped; a last part is left out."""
        size = self.settings.batch_size
        order = torch.randperm(len(self.labels))
        for start in range(0, len(order) - size + 1, size):
            places = order[start : start + size]
            down, right = torch.randint(2 * self.settings.padding + 1, (2, size))
            images = self.windows[places, :, down, right]
            if not self.settings.digits:
                flipped = torch.rand(size, 1, 1, 1) < 0.5
                images = torch.where(flipped, images.flip(-1), images)
            yield self.inputs(images), self.labels[places]

    def step(self, images: Tensor, labels: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            logits = self.network(images)
        F.cross_entropy(logits.float(), labels).backward()
        with torch.no_grad():
            for scale in self.scales:
                scale.grad.add_(scale.sign(), alpha=self.penalty)
            grads = [parameter.grad for parameter in self.params]
            torch._fused_sgd_(self.params, grads, self.momentum, **self.recipe, **PLAIN)
        for parameter in self.params:
            parameter.grad = None

    def epoch(self) -> float:
        started = time.perf_counter()
        self.network.train()
        for images, labels in self.batches():
            self.step(images, labels)
        return time.perf_counter() - started

    @torch.no_grad()
    def accuracy(self) -> float:
        self.network.eval()
        right = 0
        for images, labels in zip(*(part.split(512) for part in self.validation), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                right += (self.network(self.inputs(images)).argmax(1) == labels).sum().item()
        return right / len(self.validation[1])


def trajectories(settings, arrays, runs, bfloat16, channels_last) -> list[dict]:
    """Train each (penalty, epochs) on one thread, with a validation after every epoch."""
    torch.set_num_threads(1)
    done = []
    for penalty, epochs in runs:
        bare, seconds = Bare(settings, arrays, penalty, bfloat16, channels_last), []
        accuracy, ends = None, []
        for _ in range(epochs):
            seconds.append(bare.epoch())
            accuracy = bare.accuracy() if settings.validation else None
            ends.append(time.time())
        epoch = median(seconds[1:] or seconds)
        found = {"penalty": penalty, "epochs": epochs, "epoch_seconds": epoch, "ends": ends}
        done.append(found | {"validation_accuracy": accuracy})
    return done


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--processes", type=json.loads, help="JSON [[[penalty, epochs], ...], ...]")
    parsed = parser.parse_args()
    chosen, started = settings(parsed), time.perf_counter()
    torch.set_num_threads(1)
    numerics = (parsed.precision == "bfloat16", parsed.channels_last)
    arrays = decode(chosen)
    decoded = time.perf_counter() - started
    lists = parsed.processes or [[(penalty, chosen.epochs) for penalty in chosen.penalties]]
    with ProcessPoolExecutor(len(lists), multiprocessing.get_context("fork")) as pool:
        jobs = [pool.submit(trajectories, chosen, arrays, runs, *numerics) for runs in lists]
        done = [found for job in jobs for found in job.result()]
    ends = [end for found in done for end in found.pop("ends")]
    wall, age = time.perf_counter() - started, process_age()
    bare = Bare(chosen, arrays, 0.0, *numerics)
    began = time.perf_counter()
    sum(1 for _ in bare.batches())
    found = {"rival": "bare", "seconds": wall, "seconds_with_imports": age}
    found["between_seconds"] = max(ends) - min(ends)
    found |= {"decode_seconds": decoded, "data_seconds": time.perf_counter() - began}
    print(json.dumps(found | {"trajectories": done}))


if __name__ == "__main__":
    main()
