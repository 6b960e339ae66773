"""The stop rule as in the authors' code, part of rival B.

https://github.com/RICE-EIC/Early-Bird-Tickets, main.py, of You et al., ICLR 2020.
"""

import torch
from torch import Tensor, nn


class EarlyBird:
    """Watches one ratio; behaves as the authors' class of this name and does the same work."""

    def __init__(self, percent: float, epoch_keep: int = 5):
        self.percent, self.epoch_keep = percent, epoch_keep
        self.masks: list[Tensor] = []
        self.dists = [1.0] * (epoch_keep - 1)

    def pruning(self, model: nn.Module) -> Tensor:
        """Float [channels of all BatchNorms], 1 for those over the threshold."""
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        total = sum(norm.weight.numel() for norm in norms)
        scales, start = torch.zeros(total), 0
        for norm in norms:
            end = start + norm.weight.numel()
            scales[start:end] = norm.weight.data.abs().clone()
            start = end
        ordered, _ = torch.sort(scales)
        threshold = ordered[int(total * self.percent)]
        mask, start = torch.zeros(total), 0
        for norm in norms:
            end = start + norm.weight.numel()
            mask[start:end] = norm.weight.data.abs().clone().gt(threshold).float()
            start = end
        return mask

    def put(self, mask: Tensor) -> None:
        if len(self.masks) == self.epoch_keep:
            self.masks.pop(0)
        self.masks.append(mask)

    def cal_dist(self) -> bool:
        """Whether there are enough masks; the distances from the newest are then up to date."""
        if len(self.masks) < self.epoch_keep:
            return False
        newest = self.masks[-1]
        for place, mask in enumerate(self.masks[:-1]):
            self.dists[place] = 1 - float(torch.sum(newest == mask)) / mask.size(0)
        return True

    def early_bird_emerge(self, model: nn.Module) -> bool:
        self.put(self.pruning(model))
        return self.cal_dist() and all(dist <= 0.1 for dist in self.dists)
