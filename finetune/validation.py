"""The loss on held-out pictures: always at the same noise and timesteps, so that only the weights make a difference."""

from __future__ import annotations

from itertools import groupby

import torch
from accelerate import Accelerator
from torch import nn

from finetune.batches import Batches
from finetune.settings import Loss

PLAIN = Loss()
"""The objective itself, without weighting of timesteps and odd noise: runs with other settings can be compared."""
TIMESTEPS = 8
"""For each picture, each in the middle of an equal share of them: a loss varies with its timestep most of all."""


class Validation:
    """Made once for a run. Without held-out pictures there is nothing to measure, and it is false."""

    def __init__(self, batches: Batches, size: int, accelerator: Accelerator) -> None:
        """`size`: pictures a pass."""
        self.batches, self.accelerator = batches, accelerator
        times = [int((number + 0.5) / TIMESTEPS * batches.timesteps) for number in range(TIMESTEPS)]
        items = sorted(batches.data.held, key=lambda item: item.size)
        sizes = [[(item, time) for item in same for time in times] for _, same in groupby(items, lambda i: i.size)]
        self.passes = [same[start : start + size] for same in sizes for start in range(0, len(same), size)]

    def __bool__(self) -> bool:
        return bool(self.passes)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        """Mean of the loss over the pictures and their timesteps, without dropout, by all processes together."""
        world, rank, device = self.accelerator.num_processes, self.accelerator.process_index, self.accelerator.device
        total, training = torch.zeros((), device=device), model.training
        model.eval()
        for number in range(0, len(self.passes), world):
            # Every process predicts equally often, which sharded models need; what is over counts for nothing.
            shown = self.passes[(number + rank) % len(self.passes)]
            loss = model(self.batches.held(shown), PLAIN).sum()
            total += loss if number + rank < len(self.passes) else 0
        model.train(training)
        return float(self.accelerator.reduce(total, "sum")) / sum(map(len, self.passes))
