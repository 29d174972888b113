"""The adapter that a pipeline carries through PEFT, as what a file would hold of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.ia3 import IA3Layer
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.oft import OFTLayer
from torch import Tensor

from finetune.adapters import INITIAL, NAME
from finetune.export import naming
from finetune.export.change import MAGNITUDE
from finetune.export.content import Adapter, Layer, held
from finetune.export.reading import adaptable, layers
from finetune.families import Family

Told = tuple[dict[str, Tensor], float | None]
"""A layer's tensors by LyCORIS's names, and its alpha"""


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


def _layer(part: str, path: str, layer: Any, name: str) -> Layer:
    tensors, alpha = next(tell for kind, tell in TOLD.items() if isinstance(layer, kind))(layer, name)
    return held(part, path, {key: tensor.detach() for key, tensor in tensors.items()}, alpha)


def _lora(layer: Any, name: str) -> Told:
    """PEFT keeps what it multiplies with, alpha / rank or alpha / sqrt(rank): a file's alpha is that times the rank."""
    halves = {"lora_down.weight": layer.lora_A[name].weight, "lora_up.weight": layer.lora_B[name].weight}
    if name == NAME and INITIAL in layer.r:  # B A - B0 A0 is (B, -B0) (A; A0)
        for key, begun, axis in (("lora_down.weight", layer.lora_A, 0), ("lora_up.weight", layer.lora_B, 1)):
            halves[key] = torch.cat([halves[key], begun[INITIAL].weight], axis)
    alpha = layer.scaling[name] * halves["lora_down.weight"].shape[0]
    if layer.use_dora.get(name):
        lengths = layer.lora_magnitude_vector[name].weight
        halves[MAGNITUDE] = lengths.reshape(-1, *[1] * (halves["lora_down.weight"].ndim - 1))
    return halves, alpha


def _lycoris(layer: Any, name: str) -> Told:
    """By the same names. Where both factors are whole every program but PEFT scales by 1: it goes into the first."""
    kept = {key: getattr(layer, key) for key in layer.adapter_layer_names}
    tensors = {key: tensors[name] for key, tensors in kept.items() if name in tensors}
    if {"lokr_w1", "lokr_w2"} <= tensors.keys():
        return {**tensors, "lokr_w1": layer.scaling[name] * tensors["lokr_w1"]}, None
    return tensors, layer.scaling[name] * layer.r[name]


def _ia3(layer: Any, name: str) -> Told:
    """PEFT keeps the factors, LyCORIS what they are above 1."""
    return {"weight": layer.ia3_l[name].flatten() - 1, "on_input": torch.tensor(int(layer.is_feedforward))}, None


def _oft(layer: Any, name: str) -> Told:
    return {"oft_R.weight": layer.oft_R[name].weight}, None


def _boft(layer: Any, name: str) -> Told:
    return {"boft_R": layer.boft_R[name], "boft_s": layer.boft_s[name]}, None


TOLD: dict[type, Callable[[Any, str], Told]] = {
    LoraLayer: _lora,
    LoHaLayer: _lycoris,
    LoKrLayer: _lycoris,
    IA3Layer: _ia3,
    OFTLayer: _oft,
    BOFTLayer: _boft,
}
