"""Adapters that diffusers does not load, put into a model's weights by their kinds' formulas: W + strength * dW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from finetune.errors import Fault
from finetune.export import naming
from finetune.export.content import Adapter, Layer
from finetune.export.reading import adaptable, listed
from finetune.families import Family, quantized

ABSENT = "the model has no such layer"


@dataclass
class Held:
    """What a pipeline's weights hold."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    """The weights as they were, of the layers that are changed"""


HELD: WeakKeyDictionary[DiffusionPipeline, Held] = WeakKeyDictionary()


def put(family: Family, adapter: Adapter, name: str, path: Path) -> None:
    """Put an adapter into the weights, at strength 1. `path`: what to call it in messages. Raises Fault when it does
    not fit the model."""
    for module, paths in _quantized(family, adapter):
        quantized.open_(module, paths)
    weights = changeable(adaptable(family))
    if wrong := [f"{layer}: {line}" for layer, line in unfit(adapter, weights)]:
        raise Fault(f"{path}: {len(wrong)} of its layers do not belong to this {family.title} model.", listed(wrong))
    held = HELD.setdefault(family.pipeline, Held())
    held.adapters[name], held.strengths[name] = adapter, 1.0
    for layer in adapter:
        held.base.setdefault(layer.name, weights[layer.name].data)
    _renew(family, held)


def remove(family: Family, name: str) -> None:
    held = HELD[family.pipeline]
    del held.adapters[name], held.strengths[name]
    _renew(family, held)


def holds(family: Family, name: str) -> bool:
    return family.pipeline in HELD and name in HELD[family.pipeline].adapters


def set_strengths(family: Family, strengths: Mapping[str, float]) -> None:
    """Of adapters that are held. Costs nothing where they are so already."""
    held = HELD[family.pipeline]
    if any(held.strengths[name] != strength for name, strength in strengths.items()):
        held.strengths |= strengths
        _renew(family, held)


@contextmanager
def changed(family: Family, adapter: Adapter) -> Iterator[None]:
    """Inside, the weights are changed as the adapter's formulas say; afterwards they are as before. (Quantised ones
    must be `opened`.)"""
    weights, kept = changeable(adaptable(family)), {}
    try:
        for layer in adapter:
            kept[layer.name] = weights[layer.name].data
            _set(weights[layer.name], kept[layer.name], [(layer, 1.0)])
        yield
    finally:
        for name, data in kept.items():
            weights[name].data = data


@contextmanager
def opened(family: Family, adapter: Adapter) -> Iterator[None]:
    """Inside, the layers that an adapter changes are not quantised."""
    with ExitStack() as stack:
        for module, paths in _quantized(family, adapter):
            stack.enter_context(quantized.opened(module, paths))
        yield


def _quantized(family: Family, adapter: Adapter) -> Iterator[tuple[nn.Module, list[str]]]:
    """Those of the layers that are quantised, by module."""
    names = {layer.name for layer in adapter}
    for part, module in adaptable(family).items():
        found = [path for path, layer in module.named_modules() if quantized.is_quantized(layer)]
        told = {path: naming.written(module, path.removesuffix(".base_layer")) for path in found}
        yield module, [path for path in found if f"{part}.{told[path]}" in names]


def changeable(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weights that a layer can change, by its name in files: "unet.mid_block.attentions.0.proj_in"."""
    return {
        f"{part}.{naming.written(module, name)}": weight
        for part, module in parts.items()
        for name, child in module.named_modules()
        if isinstance(weight := getattr(child, "weight", None), Tensor) and weight.ndim >= 2
    }


def unfit(adapter: Adapter, expected: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """The layers whose change is for no weight of these, and why."""
    for layer in adapter:
        weight = expected.get(layer.name)
        if weight is None:
            yield layer.name, ABSENT
            continue
        shape = tuple(weight.flatten(1).shape)
        if any(mine not in (None, own) for mine, own in zip(layer.extent, shape, strict=True)):
            yield layer.name, f"its change is of shape {layer.extent}, the model's weight of {shape}"


def _renew(family: Family, held: Held) -> None:
    """W + the sum of strength * dW, each of the base's own weight; and what no adapter changes any more as it was."""
    weights, terms = changeable(adaptable(family)), {name: [] for name in held.base}  # type: ignore[var-annotated]
    for name, adapter in held.adapters.items():
        for layer in adapter:
            terms[layer.name].append((layer, held.strengths[name]))
    for name, own in terms.items():
        _set(weights[name], held.base[name] if own else held.base.pop(name), own)


def _set(weight: Any, base: Tensor, terms: list[tuple[Layer, float]]) -> None:
    total = base.to(weight.device, torch.float32, copy=True)
    for layer, strength in terms:
        total += strength * layer.change(base.cpu()).reshape(base.shape).to(total)
    weight.data = total.to(weight.dtype)
