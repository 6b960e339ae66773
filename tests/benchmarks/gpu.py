"""What needs a GPU: VGG16 on CIFAR-10 at batch 256, in at most 10 minutes and without Ray.

    uv run python tests/benchmarks/gpu.py --cifar FOLDER
    PYTHONPATH=. python tests/benchmarks/gpu.py --cifar FOLDER     # in an environment of yours

The CUDA parts have not been run yet: written on a machine without a GPU, where
`--device cpu --tiny` proves the rest (1/16 width, 256 images; its figures mean nothing) and
`--check` only that fusion is exact.

It compares an epoch of a trajectory (bfloat16, data on the device) with the time that the GPU's own
matrix products would take for its MACs, and with rival B there; 4 penalties fused into one network
with 4 networks one after the other and with processes side by side; training shrunk networks with
training the dense one, with CUDA graphs and without; and it reads the energy that whole phases
take. A part that fails costs its own rows only. Shrinking needs torch-pruning. `--autotune` lets
cuDNN try its algorithms, which raytickets does not.
"""

import argparse
import ctypes
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from statistics import median

import gpu_fused
import rival_authors
import torch
from gpu_lab import PENALTY, Lab, load, part
from rivals import Settings
from timing import HEADER, interleave, machine, process_age, ratio, row
from torch import nn

from raytickets.cost import macs, training_macs
from raytickets.masks import cut, widen

GRAPH_GOALS = {0.5: 0.6, 0.7: 0.35}
PLAIN, GRAPHED = "without graphs", "with CUDA graphs"
PHASE = 10.0
"""Seconds, at least, that energy is read over."""
BUDGET = 560.0
"""Seconds of the whole script, by which the number of energy readings is cut."""


def matrix_products(lab: Lab) -> Callable[[], float]:
    """A function that returns the seconds of an epoch's MACs at the rate of matrix products now."""
    size, repeats = (8192, 40) if lab.cuda else (512, 4)
    one, other = (torch.randn(size, size, device=lab.device).bfloat16() for _ in range(2))
    out = torch.empty_like(one)
    forward = macs(lab.network(), lab.dataset.shape.example())
    scale = training_macs(forward, lab.steps * lab.batch) / (size**3 * repeats)

    def multiply(number: int) -> None:
        for _ in range(number):
            torch.mm(one, other, out=out)

    def floor() -> float:
        multiply(repeats // 2)
        return scale * lab.clocked(lambda: multiply(repeats))()

    return floor


def against_floor(lab: Lab) -> Iterator[str]:
    """The epoch of a trajectory against the matrix products of its MACs."""
    epoch = lab.clocked(lab.trajectory(lab.network()))
    seconds = interleave({"epoch": epoch, "floor": matrix_products(lab)}, lab.runs)
    times, floor = ratio(seconds["epoch"], seconds["floor"]), median(seconds["floor"])
    forward = macs(lab.network(), lab.dataset.shape.example())
    operations = 2 * training_macs(forward, lab.steps * lab.batch) / 1e12
    note = f"an epoch takes {median(seconds['epoch']):.3g} s, its {operations:.3g} TFLOP as matrix"
    note += f" products {floor:.3g} s ({operations / floor:.3g} TFLOP/s)"
    yield row(f"{lab.title}: epoch over matmul floor", "<= 4", times, times.n, note)


def against_authors(lab: Lab) -> Iterator[str]:
    """The epoch of a trajectory against rival B's, on the same device."""
    images = lab.dataset.train
    labels, device = images.labels.tolist(), str(lab.device)
    limit = 10 * min(labels.count(label) for label in range(10))
    settings = Settings(
        data="cifar",
        network="cifar_vgg",
        options=lab.options,
        limit=limit,
        validation=0,
        penalties=(PENALTY,),
        ratios=(0.5,),
        epochs=1,
        batch_size=lab.batch,
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=1e-4,
        seed=0,
        out=Path(),
    )
    loader, _ = rival_authors.loaders(settings, (images.images, labels), 1, device)
    model, optimizer = rival_authors.start(settings, device)
    functions = {
        "ours": lab.clocked(lab.trajectory(lab.network())),
        "authors": lab.clocked(
            lambda: rival_authors.train(model, optimizer, loader, PENALTY, device)
        ),
    }
    seconds = interleave(functions, lab.runs)
    times = ratio(seconds["authors"], seconds["ours"])
    both = [f"{median(seconds[name]):.3g}" for name in ("authors", "ours")]
    note = "seconds of an epoch: {} theirs, float32 with one loader worker; {} ours".format(*both)
    yield row(f"{lab.title}: epoch of B over ours", ">= 15", times, times.n, note)


def shrunk(lab: Lab, prune_ratio: float) -> nn.Module:
    """VGG16 shrunk by random scores, widths rounded up to 16."""
    from raytickets.shrink import channel_groups, shrink

    dense = lab.network()
    groups = channel_groups(dense, lab.dataset.shape.example())
    widths = [group.width for group in groups]
    scores = torch.rand(sum(widths), generator=torch.Generator().manual_seed(0))
    return shrink(dense, groups, widen(cut(scores, prune_ratio), scores, widths, multiple=16))


def graphs(lab: Lab) -> Iterator[str]:
    """Retraining the dense and the shrunk networks, with CUDA graphs and without."""
    ways = {PLAIN: lab.trajectory} | ({GRAPHED: lab.graphed} if lab.cuda else {})
    forward, epochs, losses = {}, {}, {}
    for p in (0.0, *GRAPH_GOALS):
        for way, start in ways.items():
            network = shrunk(lab, p) if p else lab.network()
            forward[p] = macs(network, lab.dataset.shape.example())
            epochs[p, way] = start(network, 0.0)
            # Both ways go from the same weights over the same batches.
            losses[p, way] = epochs[p, way]()
    functions = {str(key): lab.clocked(epoch) for key, epoch in epochs.items()}
    measured = interleave(functions | {"floor": matrix_products(lab)}, lab.runs)
    seconds = {key: measured[str(key)] for key in epochs}
    for p, goal in GRAPH_GOALS.items():
        for way in ways:
            times, gain = ratio(seconds[0.0, way], seconds[p, way]), forward[0.0] / forward[p]
            note = f"{times.value:.2f} times as fast for {gain:.2f} times fewer MACs"
            if way == GRAPHED:
                plain = median(seconds[0.0, PLAIN]) / median(seconds[p, way])
                note += f", {plain:.2f} times as fast as dense {PLAIN}; {_agreement(losses, p)}"
            title = f"time gain over MACs gain at {p:.0%}, rounded to 16, both {way}"
            figures = [f"{value / gain:.3g}" for value in (times.value, times.low, times.high)]
            spread = "{} ({} to {})".format(*figures)
            yield row(title, f">= {goal}" if way == GRAPHED else "", spread, times.n, note)
    if lab.cuda:
        times = ratio(seconds[0.0, GRAPHED], measured["floor"])
        note = f"not what raytickets runs; {_agreement(losses, 0.0)}"
        title = f"{lab.title}: epoch {GRAPHED}, without penalty, over matmul floor"
        yield row(title, "", times, times.n, note)
    else:
        yield row(f"the same {GRAPHED}", ">= 0.6 / 0.35", "not measured", 0, "no GPU")


def _agreement(losses: dict[tuple[float, str], float], p: float) -> str:
    return f"first epoch's mean loss {losses[p, GRAPHED]:.4f}, {PLAIN} {losses[p, PLAIN]:.4f}"


class Nvml:
    """The GPU's energy counter and the driver's version, of NVIDIA's management library.

    Through ctypes: nvidia-ml-py, which does the same, is not always there. Raises OSError if the
    library or a reading is not to be had.
    """

    def __init__(self, uuid: str):
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._gpu = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._gpu))

    def joules(self) -> float:
        """Since the driver was loaded."""
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._gpu, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    def driver(self) -> str:
        text = ctypes.create_string_buffer(80)
        self._call("nvmlSystemGetDriverVersion", text, ctypes.c_uint(80))
        return text.value.decode()

    def _call(self, name: str, *args: object) -> None:
        code = getattr(self._library, name)(*args)
        if code:
            raise OSError(f"{name} returned {code}")


def open_nvml() -> Nvml:
    return Nvml(f"GPU-{torch.cuda.get_device_properties(0).uuid}")


def energy(lab: Lab) -> Iterator[str]:
    """Joules of an epoch, dense and shrunk, over whole phases; of idling beside them."""
    title = "energy of an epoch"
    if not lab.cuda:
        yield row(title, "", "not measured", 0, "no GPU")
        return
    try:
        nvml = open_nvml()
        nvml.joules()
    except (OSError, AttributeError) as error:
        yield row(title, "", "unavailable", 0, f"NVML: {error}")
        return
    epochs = {
        "a trajectory, without graphs": lab.trajectory(lab.network()),
        "retraining shrunk at 50%, without graphs": lab.trajectory(shrunk(lab, 0.5), 0.0),
        "retraining shrunk at 50%, with CUDA graphs": lab.graphed(shrunk(lab, 0.5), 0.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in epochs}

    def idle() -> float:
        before, started = nvml.joules(), time.perf_counter()
        time.sleep(PHASE)
        return (nvml.joules() - before) / (time.perf_counter() - started)

    def train(name: str) -> float:
        epochs[name]()
        lab.wait()
        before, started, done = nvml.joules(), time.perf_counter(), 0
        while time.perf_counter() < started + PHASE:
            epochs[name]()
            done += 1
        lab.wait()
        seconds[name].append((time.perf_counter() - started) / done)
        return (nvml.joules() - before) / done

    functions = {name: lambda name=name: train(name) for name in epochs}
    runs = min(lab.runs, int((BUDGET - process_age()) / (PHASE + 1) / (len(functions) + 1)))
    if runs < 1:
        yield row(title, "", "not measured", 0, "no time was left")
        return
    found = interleave({"idle": idle} | functions, runs, warm_up=False)
    watts = median(found["idle"])
    for name in epochs:
        joules, lasts = median(found[name]), median(seconds[name])
        note = f"J, of which {watts * lasts:.3g} J would be drawn idling ({watts:.0f} W);"
        note += f" {lasts:.3g} s, {joules / lasts:.0f} W; phases of {PHASE:.0f} s"
        if name.startswith("a trajectory"):
            note += "; a draw takes as many times this as it takes epochs"
        yield row(f"{title} of {name}", "", f"{joules:.4g}", runs, note)


def hardware(lab: Lab) -> str:
    """The GPU, its driver, the date and the rest of the machine, as one line."""
    if not lab.cuda:
        return f"no GPU, {date.today()}, {machine()}"
    try:
        driver = open_nvml().driver()
    except (OSError, AttributeError) as error:
        driver = f"unknown ({error})"
    gpu = f"{torch.cuda.get_device_name(0)}, driver {driver}, CUDA {torch.version.cuda}"
    tuned = ", cuDNN autotuned" if torch.backends.cudnn.benchmark else ""
    return f"{gpu}, cuDNN {torch.backends.cudnn.version()}{tuned}, {date.today()}, {machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar", help="a folder with train/<class>/<image>, 32x32 pixels")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--autotune", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    parsed = parser.parse_args()
    if not parsed.check and not parsed.cifar:
        parser.error("--cifar is needed for all but --check")
    print(HEADER, flush=True)
    for line in gpu_fused.exactness():
        print(line, flush=True)
    if parsed.check:
        return
    if parsed.device == "cuda" and not torch.cuda.is_available():
        print(row("everything else on a GPU", "", "not measured", 0, "there is none here"))
        return
    torch.backends.cudnn.benchmark = parsed.autotune
    if parsed.device == "cpu":
        torch.set_num_threads(1)
    dataset, width, batch = load(parsed.cifar), 1.0, 256
    if parsed.tiny:
        dataset, width, batch = part(dataset, 256), 1 / 16, 32
    lab = Lab.make(parsed.device, dataset, width, batch, parsed.runs)
    parts = (against_floor, against_authors, gpu_fused.fusion, gpu_fused.co_residents)
    for measure in (*parts, graphs, energy):
        try:
            for line in measure(lab):
                print(line, flush=True)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(row(str(measure.__doc__), "", "failed", 0, reason), flush=True)
        if lab.cuda:
            torch.cuda.empty_cache()
    print("\n" + hardware(lab))
    print(f"{process_age():.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
