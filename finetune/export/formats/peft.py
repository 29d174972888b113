"""PEFT's own names of kinds that are no LoRA: `unet.<layer>.hada_w1_a`. What PEFT must be told stands in the header.

diffusers' `load_lora_weights` does not read such a file; PEFT does, part by part: docs/methods.md shows the lines.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTLayer

from finetune.errors import Fault
from finetune.export.change import MAGNITUDE, block_side
from finetune.export.content import Adapter, File, Layer
from finetune.export.formats import diffusers
from finetune.export.formats.kohya import FOLDED
from finetune.export.naming import LEVEL
from finetune.export.stream import Entry
from finetune.families import Family

HEADER = "peft_config"
"""The header's key: for each part the fields of PEFT's configuration, as JSON."""
FACTORS = "ia3_l"
FINE = ("boft_s",)
"""Factors near 1, kept in float32: half-precision numbers are too coarse there for what was learned"""
TENSORS = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1_a", "lokr_w1_b", "lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_w2", "lokr_t2"),
    *("oft_R.weight", "boft_R", "boft_s", FACTORS),
)
KNOWN = re.compile(rf"(?:base_model\.model\.)?(?P<layer>.+)\.(?P<tensor>{'|'.join(map(re.escape, TENSORS))})")


def knows(names: Iterable[str]) -> bool:
    return any(KNOWN.fullmatch(name) for name in names)


def read(file: File) -> Adapter:
    """Raises Fault that lists the names that are no layer's."""
    layers: dict[tuple[str, str], dict[str, str]] = {}
    wrong = []
    for key in file.shapes:
        try:
            part, path, tensor = place(key)
        except KeyError:
            wrong.append(f"{key}: no layer of a model that is known")
            continue
        layers.setdefault((part, path), {})[tensor] = key
    if wrong:
        raise Fault(f"{file.path}: {len(wrong)} of its names are not understood:", wrong)
    made = [
        _factors(file, *place, keys[FACTORS]) if FACTORS in keys else file.layer(*place, keys, None)
        for place, keys in layers.items()
    ]
    return Adapter(made, file.metadata)


def place(key: str) -> tuple[str, str, str]:
    """Part, path and tensor of a name. Raises KeyError when it is none."""
    found = KNOWN.fullmatch(key)
    if found is None:
        raise KeyError(key)
    part, path = diffusers.parted(found["layer"])
    return part, path, found["tensor"]


def entries(adapter: Adapter, family: type[Family], dtype: torch.dtype | None) -> dict[str, Entry]:
    """The file's tensors, each layer's scale in its weights: PEFT is told a scale of 1. Raises Fault for LoRA, DoRA and
    whole differences, and for LoKr in shapes that PEFT does not make."""
    made = {}
    metadata(adapter, family)  # raises what cannot be told
    for layer in adapter:
        if layer.kind == "ia3":
            made[f"{layer.name}.{FACTORS}"] = _factors_entry(layer)
            continue
        folded = next((tensor for tensor in FOLDED if tensor in layer.shapes), None)
        for tensor, shape in layer.shapes.items():
            times = layer.scale if tensor == folded else 1.0
            kept = torch.float32 if tensor in FINE else dtype
            made[f"{layer.name}.{tensor}"] = layer.entry(tensor, shape, kept, times)
    return made


def told(adapter: Adapter) -> Adapter:
    return replace(adapter, layers=[replace(layer, alpha=None) for layer in adapter])


def metadata(adapter: Adapter, family: type[Family]) -> dict[str, str]:
    """Raises Fault for kinds that have no place here, and when PEFT cannot be told the shapes."""
    for layer in adapter:
        if layer.kind not in CONFIGS or MAGNITUDE in layer.shapes:
            raise Fault(f"{layer.name}: the format peft is for LoHa, LoKr, OFT, BOFT and (IA)3, not for {layer.said}.")
    configs = {}
    for part in adapter.parts:
        layers = [layer for layer in adapter if layer.part == part]
        kind = layers[0].kind
        if any(layer.kind != kind for layer in layers):
            raise Fault(f"{part}: layers of several kinds, where PEFT has one for all of a model.")
        targets = [layer.path.removeprefix(LEVEL) for layer in layers]
        configs[part] = {"target_modules": targets, **CONFIGS[kind](layers)}
    return {HEADER: json.dumps(configs, sort_keys=True)}


def _factors(file: File, part: str, path: str, key: str) -> Layer:
    """PEFT keeps the factors themselves, (1, in) or (out, 1); LyCORIS what they are above 1."""
    first, second = file.shapes[key]
    load: dict[str, Callable[[], torch.Tensor]] = {
        "weight": lambda: file.load(key).flatten() - 1,
        "on_input": lambda: torch.tensor(int(first == 1)),
    }
    return Layer(part, path, {"weight": (first * second,), "on_input": ()}, lambda name: load[name]())


def _factors_entry(layer: Layer) -> Entry:
    """As `FINE` says."""
    size = layer.shapes["weight"][-1]
    shape = (1, size) if layer.load("on_input").item() else (size, 1)
    return Entry(shape, torch.float32, lambda: 1 + layer.load("weight").float().reshape(shape))


def _loha(layers: Sequence[Layer]) -> dict[str, Any]:
    cores = any("hada_t1" in layer.shapes for layer in layers)
    return {"peft_type": "LOHA", **_ranks({layer.path: layer.rank or 1 for layer in layers}),
            "use_effective_conv2d": cores}  # fmt: skip


def _lokr(layers: Sequence[Layer]) -> dict[str, Any]:
    """Of two whole factors any rank will do that is too high to part them."""
    ranks = {layer.path: layer.rank or max(layer.shapes["lokr_w2"]) for layer in layers}
    return {
        "peft_type": "LOKR",
        **_ranks(ranks),
        "decompose_both": any("lokr_w1_a" in layer.shapes for layer in layers),
        "decompose_factor": _factor(layers),
        "use_effective_conv2d": any("lokr_t2" in layer.shapes for layer in layers),
    }


def _factor(layers: Sequence[Layer]) -> int:
    """What PEFT divides the sides of all weights by, such that the first factors have the shapes that are there."""
    wanted: set[tuple[int, int]] = set()  # (side, side of its first factor)
    for layer in layers:
        shapes = layer.shapes
        first = shapes.get("lokr_w1") or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
        rows, _ = layer.extent
        core = "lokr_t2" in shapes
        second = shapes.get("lokr_w2") or (shapes["lokr_w2_b"][-1], shapes["lokr_w2_b"][-1])
        assert rows is not None
        wanted.add((rows, first[0]))
        if not core and len(second) == 2 and "lokr_w2" in shapes:
            wanted.add((first[1] * second[1], first[1]))
    for factor in (-1, *sorted({side for _, side in wanted}, reverse=True)):
        if all(factorization(whole, factor)[0] == part for whole, part in wanted):
            return factor
    raise Fault(f"{layers[0].name}: LoKr in shapes that PEFT does not make. Take the format kohya.")


def _oft(layers: Sequence[Layer]) -> dict[str, Any]:
    shapes = {layer.shapes["oft_R.weight"] for layer in layers}
    sides = {(count * block_side(size), block_side(size)) for count, size in shapes}
    for block in range(1, max(whole for whole, _ in sides) + 1):
        if all(_block(whole, block) == side for whole, side in sides):
            return {"peft_type": "OFT", "r": 0, "oft_block_size": block, "use_cayley_neumann": False}
    raise Fault(f"{layers[0].name}: OFT in blocks that PEFT does not make.")


def _boft(layers: Sequence[Layer]) -> dict[str, Any]:
    shapes = {(layer.shapes["boft_R"][0], layer.shapes["boft_R"][2]) for layer in layers}
    if len(shapes) > 1:
        raise Fault(f"{layers[0].name}: BOFT in blocks of several sizes, where PEFT has one for all of a model.")
    [(factors, side)] = shapes
    return {"peft_type": "BOFT", "boft_block_size": side, "boft_n_butterfly_factor": factors}


def _block(whole: int, block: int) -> int:
    """The side of the blocks that PEFT takes where it is told another one."""
    fits = block <= whole and whole % block == 0
    return block if fits else int(OFTLayer.adjust_oft_parameters(None, whole, block))


def _ia3(layers: Sequence[Layer]) -> dict[str, Any]:
    inputs = [layer.path.removeprefix(LEVEL) for layer in layers if layer.load("on_input").item()]
    return {"peft_type": "IA3", "feedforward_modules": inputs}


def _ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """A scale of 1 everywhere."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    other = {re.escape(path.removeprefix(LEVEL)): rank for path, rank in ranks.items() if rank != usual}
    return {"r": usual, "alpha": usual, "rank_pattern": other, "alpha_pattern": other}


CONFIGS: dict[str, Callable[[Sequence[Layer]], dict[str, Any]]] = {
    "loha": _loha,
    "lokr": _lokr,
    "oft": _oft,
    "boft": _boft,
    "ia3": _ia3,
}
