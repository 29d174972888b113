"""A live model with its adapters merged: its tensors one by one as they are written, and compared when loaded back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from finetune import families
from finetune.errors import Failure, Fault
from finetune.export import naming
from finetune.export.compare import REROUNDED, difference, encoding, prediction, rounded_alike
from finetune.export.reading import first_line, listed
from finetune.export.stream import Entry
from finetune.families import Family
from finetune.quiet import quiet

SUMMED = 1e-5
"""Of the largest change in a layer: sums of float32 products in another order differ by less."""
Load = Callable[[str, Mapping[str, Any]], DiffusionPipeline]
"""A part of what was written, loaded into a pipeline to which the other parts are lent as they are."""


def entries(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Entry]]:
    """The module's tensors by their names in files, adapters merged; of tied ones one, as transformers keeps them."""
    tied = getattr(module, "all_tied_weights_keys", {})
    carriers = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, tensor in own_tensors(module).items():
        if name in tied:
            continue
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        layer, _, leaf = name.rpartition(".")
        carrier = carriers.get(layer)
        make = (lambda tensor=tensor: tensor) if carrier is None else (lambda c=carrier, leaf=leaf: _merge(c, leaf))
        yield naming.written(module, name), Entry(tuple(tensor.shape), kept, make)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors without its adapters', by the names that they have without them."""
    carriers = [name for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]
    inside = tuple(f"{name}." for name in carriers)
    base = tuple(f"{name}.base_layer." for name in carriers)
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in module.state_dict().items()
        if not name.startswith(inside) or name.startswith(base)
    }


def verify(family: Family, what: str, precisions: Mapping[str, torch.dtype], load: Load) -> None:
    """Load the parts of these names and precisions back, and compare each with the live one: weights, and answers.

    One part is loaded at a time: no second whole model is in memory. Raises Failure that lists what differs.
    """
    parts: dict[str, Any] = {**families.modules(family)}
    reads: Any = family  # the prompt in the same way
    wrong: list[str] = []
    live = {family.denoiser_name: prediction(family)} | dict.fromkeys(families.text_encoders(family), encoding(family))
    for name, dtype in precisions.items():
        module, lent = parts[name], {other: part for other, part in parts.items() if other != name}
        try:
            with quiet():
                loaded = load(name, lent)
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise Failure(f"the {what} does not load back: {name}: {first_line(error)}") from error
        fresh = loaded.components[name]
        wrong += (other := _other_weights(name, module, fresh, dtype))
        if name in live and not other:
            fresh.to(module.device)
            again = replace(reads, pipeline=loaded)
            answer = prediction(again) if name == family.denoiser_name else encoding(again)
            gap = difference(live[name], answer)
            if not gap <= max(REROUNDED[dtype], REROUNDED[module.dtype]):
                wrong.append(f"{name}: its answer differs by {gap:.1e} of its norm")
    if wrong:
        raise Failure(f"the {what} does not load back as it was written:", listed(wrong))


def require_whole(family: Family) -> None:
    """Raises ValueError when a part of the pipeline is out of memory, Fault when it is held in codes."""
    if families.quantized.there(family):
        raise Fault(
            "a quantised base is not written as a whole model: load it without --quantize, and merge into that."
        )
    optional = {*family.pipeline._optional_components, *family.optional_parts}
    released = [name for name, part in family.pipeline.components.items() if part is None and name not in optional]
    if released:
        raise ValueError(f"{', '.join(released)} was released: call families.restore before writing a whole model")


def _merge(layer: BaseTunerLayer, leaf: str) -> Tensor:
    """The weight (or bias) of a layer with its active adapters in it: a copy's, in float32, on the CPU (no TF32)."""
    alone = copy.deepcopy(layer).cpu().float()
    with torch.no_grad():
        alone.merge()
    return getattr(alone.get_base_layer(), leaf)


def _other_weights(part: str, module: nn.Module, fresh: nn.Module, dtype: torch.dtype) -> list[str]:
    own = own_tensors(module)
    loaded = {
        name: tensor for name, tensor in fresh.state_dict().items() if not tensor.is_meta
    }  # meta: not in the file
    wrong = [f"{part}.{name}: only in one of the two" for name in own.keys() ^ loaded.keys()]
    changed = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name in sorted(own.keys() & loaded.keys()):
        layer, _, leaf = name.rpartition(".")
        expected, slack = own[name].detach().cpu(), 0.0
        if leaf == "weight" and layer in changed:
            change = _change(changed[layer], leaf)
            expected, slack = expected.float() + change, SUMMED * float(change.abs().max())
        rounded = dtype if expected.is_floating_point() else expected.dtype
        if not rounded_alike(expected, loaded[name], rounded, slack):
            wrong.append(f"{part}.{name}: other values")
    return wrong


def _change(layer: Any, leaf: str) -> Tensor:
    """Hu et al. 2021, eq. 3: alpha / rank * B A, summed over the active adapters; of other methods what PEFT says."""
    weight = layer.get_base_layer().weight.detach().cpu()
    if not isinstance(layer, LoraLayer):
        return _merge(layer, leaf).detach() - weight.float()
    total = torch.zeros(weight.shape)
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if layer.use_dora.get(name):
            return _merge(layer, leaf).detach() - weight.float()
        down, up = (half[name].weight.detach().cpu().float() for half in (layer.lora_A, layer.lora_B))
        total += layer.scaling[name] * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return total
