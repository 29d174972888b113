"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import torch
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from finetune.adapters import Group
from finetune.settings import Optim

BETAS = (0.9, 0.999)


def resolve(name: str, device: torch.device) -> str:
    """`auto` is the 8-bit AdamW on a GPU, where it saves memory and costs nothing, and AdamW elsewhere."""
    return {"cuda": "adamw8bit"}.get(device.type, "adamw") if name == "auto" else name


def optimizer(groups: list[Group], settings: Optim, device: torch.device) -> Optimizer:
    """The optimizer over all groups, each at its own rate."""
    rates = [{"params": group.parameters, "lr": group.lr} for group in groups]
    match resolve(settings.optimizer, device):
        case "adamw":
            return torch.optim.AdamW(rates, betas=BETAS, weight_decay=settings.weight_decay, fused=True)
        case "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(rates, betas=BETAS, weight_decay=settings.weight_decay)
        case name:
            raise ValueError(f"unknown optimizer {name!r}")


def schedule(optimizer: Optimizer, settings: Optim, steps: int) -> LRScheduler:
    """The rate over the run: a linear warm-up, then constant, or falling to zero at the last step."""
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=settings.warmup, num_training_steps=steps)
