"""What a training takes at least: its arithmetic at the most that the device reaches, its tensors by the plan."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune import config, engine, planning, shelf
from finetune.bench.trainers import Trainer, Work
from finetune.planning import rates


@dataclass(frozen=True)
class Floor:
    """Of one training."""

    flops: int
    """Of a step: matrix products, convolutions, attention; what is recomputed too"""
    bytes: int
    """The most that tensors hold"""


def of(trainer: Trainer, work: Work, place: Path) -> Floor | None:
    """By `finetune plan`; None: it is another trainer's."""
    if not trainer.own:
        return None
    _, recipe, *words = trainer.command(work, place).words
    settings = config.parse(shelf.load(recipe).Config, words, "finetune bench")
    taken = planning.make(settings, None, cpu=planning.on_cpu()).found.taken
    return Floor(taken.flops, taken.peak)


def most(precision: str) -> float:
    """FLOP/s that this machine's device reaches at most in a precision; on a CPU, by its processors' time."""
    device = torch.device(engine.device())
    now = time.process_time if device.type == "cpu" else time.perf_counter
    return rates.most(device, engine.DTYPES[precision], now=now)
