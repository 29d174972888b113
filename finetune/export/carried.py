"""The adapter that a pipeline carries, as what a file would hold of it."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from finetune.adapters import INITIAL, NAME
from finetune.export import naming
from finetune.export.change import MAGNITUDE
from finetune.export.content import Adapter, Layer, held
from finetune.export.reading import adaptable, layers
from finetune.families import Family


def carried(family: Family, name: str) -> Adapter:
    """Parts that are out of memory carry none. Raises ValueError when no part carries an adapter of that name."""
    found = [
        _layer(part, naming.written(module, path), layer, name)
        for part, module in adaptable(family).items()
        for path, layer in layers(module, name).items()
    ]
    if not found:
        raise ValueError(f"no part of the pipeline carries an adapter named {name!r}")
    return Adapter(found, family=type(family.pipeline).__name__)


def _layer(part: str, path: str, layer: LoraLayer, name: str) -> Layer:
    """PEFT keeps what it multiplies with, alpha / rank or alpha / sqrt(rank): a file's alpha is that times the rank."""
    halves: Any = {"lora_down.weight": layer.lora_A[name].weight, "lora_up.weight": layer.lora_B[name].weight}
    if name == NAME and INITIAL in layer.r:  # B A - B0 A0 is (B, -B0) (A; A0)
        for key, begun, axis in (("lora_down.weight", layer.lora_A, 0), ("lora_up.weight", layer.lora_B, 1)):
            halves[key] = torch.cat([halves[key], begun[INITIAL].weight], axis)
    if layer.use_dora.get(name):
        lengths: Any = layer.lora_magnitude_vector[name].weight
        halves[MAGNITUDE] = lengths.reshape(-1, *[1] * (halves["lora_down.weight"].ndim - 1))
    alpha = layer.scaling[name] * halves["lora_down.weight"].shape[0]
    return held(part, path, {key: value.detach() for key, value in halves.items()}, alpha)
