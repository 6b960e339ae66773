"""What masks and the stop rule cost for 16 prune ratios at the 4,224 channels of VGG16.

    uv run python tests/benchmarks/masks.py

One check of a trajectory, from the network's BatchNorm scales to the channels' scores and the
verdicts, against one look by 16 objects of the authors' class, interleaved, on one thread and with
full windows.
"""

import argparse

import torch
from authors_rule import EarlyBird
from timing import HEADER, clocked, interleave, machine, ratio, row
from torch import nn

from raytickets.config import Network, StopRule
from raytickets.earlybird import MaskWindow
from raytickets.models import build_network
from raytickets.shrink import channel_groups, gammas, scorer

RATIOS = tuple(place / 20 for place in range(2, 18))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    vgg16 = Network("cifar_vgg", {"depth": 16})
    network = build_network(vgg16, in_channels=3, num_classes=10, seed=0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    score = scorer(network, channel_groups(network, torch.zeros(1, 3, 32, 32)))
    windows = {rule: MaskWindow(StopRule(rule), RATIOS) for rule in ("paper", "corrected")}
    watchers = [EarlyBird(ratio) for ratio in RATIOS]

    def check(window: MaskWindow):
        # Ten at a time, as one is near the clock's resolution.
        for _ in range(10):
            scores = score()
            window.check(gammas(network).cpu() if window.rule.rule == "paper" else scores)

    def authors():
        for watcher in watchers:
            watcher.early_bird_emerge(network)

    functions = {rule: clocked(lambda rule=rule: check(windows[rule])) for rule in windows}
    functions["authors"] = clocked(authors)
    interleave(functions, runs=5, warm_up=False)  # Fills the windows.
    seconds = interleave(functions, runs)
    print(HEADER)
    for rule in windows:
        ours = [value / 10 for value in seconds[rule]]
        times, share = ratio(seconds["authors"], ours), ratio(ours, [1.0] * runs)
        title, note = f"masks + stop rule (`{rule}`), 16 ratios", f"{share.value * 1e3:.2f} ms"
        print(
            row(f"{title}: share of an epoch of 1 s", "< 0.1 %", f"{share.value:.3%}", runs, note)
        )
        print(row(f"{title}: the authors' class against it", ">= 20", times, runs))
    print("\n" + machine())


if __name__ == "__main__":
    main()
