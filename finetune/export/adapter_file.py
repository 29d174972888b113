"""An adapter as one safetensors file in the diffusers/PEFT layout, loaded back by diffusers before it is believed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor

from finetune import families, provenance, weights
from finetune.adapters import NAME
from finetune.errors import Failure, Fault
from finetune.export import naming
from finetune.export.compare import REPEATED, difference, encoding, prediction, rounded_alike
from finetune.export.reading import adaptable, adapter_tensors, attach, detach, layers, listed
from finetune.families import Family

LOADED = "verify"
"""Name under which a file is put beside the live adapter for a moment."""


def adapter(family: Family, path: Path, *, settings: Mapping[str, Any]) -> None:
    """Write the live adapter, verified; the same adapter and settings give the same bytes.

    Tensors: `unet.<layer>.lora_A.weight`, `text_encoder.text_model...`, in the precision they trained in. Header:
    `lora_adapter_metadata`, what diffusers needs for alpha != rank; `finetune`, the settings that may be told.
    Parts that do not train may be out of memory. Raises Failure, and leaves what was at `path`, when the file does
    not load back equal.
    """
    tensors = {_written(family, name): tensor for name, tensor in adapter_tensors(family, NAME).items()}
    if not tensors:
        raise ValueError(f"no part of the pipeline carries an adapter named {NAME!r}")
    told = {
        **provenance.public(settings),
        "pipeline": type(family.pipeline).__name__,
        "software": provenance.software(),
    }
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": provenance.dumps(_peft_fields(family)),
        "finetune": provenance.dumps(told),
    }
    unverified = path.with_name(f".unverified-{path.name}")
    try:
        weights.save_tensors(unverified, tensors, metadata)
        verify_adapter(family, unverified)
        os.replace(unverified, path)
    finally:
        unverified.unlink(missing_ok=True)


def verify_adapter(family: Family, path: Path) -> None:
    """Load the file through diffusers beside the live adapter and compare: tensors, scales, encodings, prediction.

    The live model is the same afterwards. Raises Failure that lists what differs.
    """
    with _undisturbed(family):
        live = {name: tensor.clone() for name, tensor in adapter_tensors(family, NAME).items()}
        try:
            attach(family, path, LOADED)
        except Fault as fault:
            raise Failure(f"the adapter does not load back: {fault.message}", fault.details) from fault
        try:
            wrong = [*_other_tensors(live, adapter_tensors(family, LOADED)), *_other_scales(family)]
            wrong = wrong or _other_answers(family)
        finally:
            detach(family, LOADED)
    if wrong:
        raise Failure("the adapter does not load back as it was written:", listed(wrong))


def _other_answers(family: Family) -> list[str]:
    """Ask with each of the two adapters alone, the live one rounded as diffusers rounds it to the base's precision."""
    for module in adaptable(family).values():
        parameters = dict(module.named_parameters())
        for name, parameter in parameters.items():
            if f".{NAME}." in name:
                parameter.data = parameter.data.to(parameters[name.replace(f".{NAME}.", f".{LOADED}.")].dtype)
    one, other = (_answers(family, adapter) for adapter in (NAME, LOADED))
    denoiser: Any = families.denoiser(family)
    gaps = {what: difference(answer, other[what]) for what, answer in one.items()}
    return [
        f"the {what} differs by {gap:.1e} of its norm"
        for what, gap in gaps.items()
        if not gap <= REPEATED[denoiser.dtype]
    ]


def _answers(family: Family, adapter: str) -> dict[str, Tensor]:
    for part in adaptable(family).values():
        for layer in layers(part, adapter).values():
            layer.set_adapter(adapter)
    answers = {"prediction": prediction(family)}
    if any(layers(module, adapter) for module in families.text_encoders(family).values()):
        answers["text encoding"] = encoding(family)
    return answers


def _other_tensors(live: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> list[str]:
    both = sorted(live.keys() & loaded.keys())
    return [f"{name}: only in one of the two" for name in live.keys() ^ loaded.keys()] + [
        f"{name}: other values" for name in both if not rounded_alike(live[name], loaded[name], loaded[name].dtype)
    ]


def _other_scales(family: Family) -> list[str]:
    return [
        f"{part}.{name}: scaled by {layer.scaling[LOADED]:g} instead of {layer.scaling[NAME]:g}"
        for part, module in adaptable(family).items()
        for name, layer in layers(module, LOADED).items()
        if NAME in layer.scaling and abs(layer.scaling[LOADED] - layer.scaling[NAME]) > 1e-6 * abs(layer.scaling[NAME])
    ]


@contextmanager
def _undisturbed(family: Family) -> Iterator[None]:
    """Afterwards the live adapter is active as it was, and every parameter has the values, precision and flag it had.

    (Loading another adapter activates it, freezes the others, and casts a whole text encoder to the base's precision.)
    """
    parts = list(adaptable(family).values())
    active = [
        (layer, layer.active_adapters) for part in parts for layer in part.modules() if isinstance(layer, LoraLayer)
    ]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    held = [(parameter, parameter.data, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    try:
        yield
    finally:
        for layer, names in active:
            layer.set_adapter(names)
        for module, mode in modes:
            module.training = mode
        for parameter, data, trains in held:
            parameter.data = data
            parameter.requires_grad_(trains)


def _written(family: Family, name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{part}.{naming.written(adaptable(family)[part], rest)}"


def _peft_fields(family: Family) -> dict[str, Any]:
    """The least of PEFT's configuration that gives the same adapter; a field that a reader's PEFT lacks is refused."""
    fields: dict[str, Any] = {}
    for part, module in adaptable(family).items():
        carrying = layers(module, NAME)
        if carrying:
            fields |= {f"{part}.{name}": value for name, value in _part_fields(module, carrying).items()}
    return fields


def _part_fields(module: Any, carrying: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """Layers are named without `text_model.`: PEFT compares the ends of names, so they fit with and without it."""
    config = module.peft_config[NAME]
    ranks = {name.removeprefix(naming.LEVEL): layer.r[NAME] for name, layer in carrying.items()}
    alphas = {name: layer.scaling[NAME] * ranks[name.removeprefix(naming.LEVEL)] for name, layer in carrying.items()}
    alphas = {name.removeprefix(naming.LEVEL): _tidy(alpha) for name, alpha in alphas.items()}
    alpha = _tidy(config.lora_alpha * (config.r**0.5 if config.use_rslora else 1))
    return {
        "r": config.r,
        "lora_alpha": alpha,
        "target_modules": _targets(module, set(carrying)),
        "rank_pattern": {name: rank for name, rank in sorted(ranks.items()) if rank != config.r},
        "alpha_pattern": {name: own for name, own in sorted(alphas.items()) if own != alpha},
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
    }


def _targets(module: Any, carrying: set[str]) -> list[str]:
    """The ends of names that the adapter was made with, if they still mean these layers, else all their names."""
    ends = module.peft_config[NAME].target_modules
    if not isinstance(ends, str):
        meant = {name for name, _ in module.named_modules() if any(f".{name}".endswith(f".{end}") for end in ends)}
        if meant == carrying:
            return sorted(ends)
    return sorted(name.removeprefix(naming.LEVEL) for name in carrying)


def _tidy(alpha: float) -> float | int:
    """Whole numbers as such, and without the rounding error of alpha / rank * rank."""
    alpha = round(alpha, 9)
    return int(alpha) if alpha == int(alpha) else alpha
