"""What trains: a method put on a family's denoiser and text encoders, as groups of parameters with their rates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import nn

from finetune import engine, families, keys
from finetune.errors import Fault
from finetune.families import Family
from finetune.settings import Adapter

NAME = "default"
"""PEFT's name of the adapter that trains."""


@dataclass(frozen=True)
class Group:
    """The parameters of one part of the pipeline, trained at one learning rate."""

    part: str
    """The pipeline's name of the module: "unet", "text_encoder"."""
    parameters: list[nn.Parameter]
    lr: float

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)


def lora(family: Family, adapter: Adapter, lr: float, text_encoder_lr: float | None, seed: int) -> list[Group]:
    """Inject a LoRA (Hu et al. 2021, 2106.09685) through PEFT; nothing else of the pipeline trains.

    The thin matrices are float32 whatever the base's precision: their steps are smaller than bf16 can add up.
    """
    if adapter.rank < 1:
        raise Fault(f"rank {adapter.rank}: an adapter's rank is at least 1; 4 to 64 is usual.")
    families.freeze(family)
    targets = {family.denoiser_name: family.adapter_targets}
    targets |= dict.fromkeys(family.text_encoder_names, family.text_adapter_targets)
    for part in _rates(family, lr, text_encoder_lr):
        module = getattr(family.pipeline, part)
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.rank if adapter.alpha is None else adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=list(targets[part]),
        )
        with keys.seeded(seed, "adapter", part):
            module.add_adapter(config, NAME)
        cast_training_params(module, torch.float32)
    return groups(family, lr, text_encoder_lr)


def adapted(family: Family) -> list[Any]:
    """The parts that carry an adapter."""
    return [part for part in families.modules(family).values() if getattr(part, "peft_config", None)]


@contextmanager
def off(family: Family) -> Iterator[None]:
    """Inside, the adapter does nothing: the model is the frozen base."""
    parts = adapted(family)
    for part in parts:
        part.disable_adapters()
    try:
        yield
    finally:
        for part in parts:
            part.enable_adapters()


def full(family: Family, lr: float, text_encoder_lr: float | None, weights: str = "fp32") -> list[Group]:
    """Train all weights of the denoiser (Ruiz et al. 2022, 2208.12242), and of the text encoders where asked.

    `weights`: the precision that they are held in, fp32 or bf16.
    """
    families.freeze(family)
    for part in _rates(family, lr, text_encoder_lr):
        getattr(family.pipeline, part).to(engine.DTYPES[weights]).requires_grad_(True)
    return groups(family, lr, text_encoder_lr)


def _rates(family: Family, lr: float, text_encoder_lr: float | None) -> dict[str, float]:
    """The parts of the pipeline that train, with their rates."""
    rates = {family.denoiser_name: lr}
    if text_encoder_lr is not None:
        if not family.trained_text_encoders:
            raise Fault(f"--text-encoder-lr: the text encoders of {family.title} are not trained. Leave it out.")
        rates |= dict.fromkeys(family.trained_text_encoders, text_encoder_lr)
    return rates


def groups(family: Family, lr: float, text_encoder_lr: float | None) -> list[Group]:
    """What trains of a family that was prepared by one of these."""
    return [
        Group(part, [p for p in getattr(family.pipeline, part).parameters() if p.requires_grad], rate)
        for part, rate in _rates(family, lr, text_encoder_lr).items()
    ]
