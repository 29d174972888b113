"""diffusers' and PEFT's names: `unet.<layer>.lora_A.weight`. Rank and alpha stand in the header.

Only diffusers reads such a file whole; the older spellings of diffusers' own scripts are read too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from finetune.errors import Fault
from finetune.export.change import MAGNITUDE
from finetune.export.content import Adapter, File, Layer
from finetune.export.naming import LEVEL
from finetune.export.stream import Entry
from finetune.families import Family

HEADER = "lora_adapter_metadata"
"""The header's key: the fields of PEFT's LoraConfig as JSON, each with its part before it ("unet.r")."""
OURS = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    MAGNITUDE: "lora_magnitude_vector.weight",  # without `.weight` transformers 5 leaves it out of text encoders
}
TENSORS = {
    **{new: old for old, new in OURS.items()},
    "lora_magnitude_vector": MAGNITUDE,
    **{f"{middle}.{way}.weight": f"lora_{way}.weight"
       for middle in ("lora", "lora_linear_layer") for way in ("down", "up")},
}  # fmt: skip
"""What stands behind a layer's path, in any of the spellings, and what LyCORIS calls the tensor."""
KNOWN = re.compile(rf"(?:base_model\.model\.)?(?P<layer>.+?)\.(?P<tensor>{'|'.join(map(re.escape, TENSORS))})")
OLDEST = re.compile(r"(?P<layer>.+?)(?:\.processor)?\.to_(?P<which>q|k|v|out)_lora\.(?P<way>down|up)\.weight")
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def knows(names: Iterable[str]) -> bool:
    return any(KNOWN.fullmatch(name) or OLDEST.fullmatch(name) for name in names)


def read(file: File) -> Adapter:
    """Raises Fault that lists the names that are no layer's."""
    modules: dict[tuple[str, str], dict[str, str]] = {}
    wrong = []
    for key in file.shapes:
        try:
            part, path, tensor = place(key)
        except KeyError:
            wrong.append(f"{key}: no layer of a model that is known")
            continue
        modules.setdefault((part, path), {})[tensor] = key
    if wrong:
        raise Fault(f"{file.path}: {len(wrong)} of its names are not understood:", wrong)
    told = fields(file)
    layers = [file.layer(*place, keys, alpha(file, told, *place, keys)) for place, keys in modules.items()]
    return Adapter(layers, file.metadata)


def entries(adapter: Adapter, family: type[Family], dtype: torch.dtype | None) -> dict[str, Entry]:
    """The file's tensors. Raises Fault for kinds that diffusers does not load on these models."""
    made = {}
    for layer in adapter:
        if layer.kind != "lora" or "lora_mid.weight" in layer.shapes:
            core, others = (" with a core", "kohya") if layer.kind == "lora" else ("", "kohya or peft")
            raise Fault(
                f"{layer.name}: diffusers loads LoRA and DoRA only, not {layer.title}{core}. Take the format {others}, "
                "or make a plain LoRA of it: `finetune convert FILE OUT --format diffusers --to-lora RANK`."
            )
        for tensor, shape in layer.shapes.items():
            if tensor == MAGNITUDE:
                if shape[0] == 1 and len(shape) == 2:
                    raise Fault(
                        f"{layer.name}: DoRA of columns; diffusers knows DoRA of rows only. Make a plain LoRA of it: "
                        "`finetune convert FILE OUT --format diffusers --to-lora RANK --model BASE`."
                    )
                shape = (1, shape[0], 1, 1) if len(shape) == 4 else (shape[0],)
            made[f"{layer.name}.{OURS[tensor]}"] = layer.entry(tensor, shape, dtype)
    return made


def told(adapter: Adapter) -> Adapter:
    return adapter


def metadata(adapter: Adapter, family: type[Family]) -> dict[str, str]:
    """The least of PEFT's configuration that gives the same adapter; a field that a reader's PEFT lacks is refused."""
    fields: dict[str, Any] = {}
    for part in adapter.parts:
        own = [layer for layer in adapter if layer.part == part]
        fields |= {f"{part}.{name}": value for name, value in _part_fields(own).items()}
    return {HEADER: json.dumps(fields, sort_keys=True)}


def _part_fields(layers: list[Layer]) -> dict[str, Any]:
    """Layers are named without `text_model.`: PEFT compares the ends of names, so they fit with and without it."""
    ranks = {layer.path.removeprefix(LEVEL): layer.rank or 0 for layer in layers}
    alphas = {layer.path.removeprefix(LEVEL): _tidy(layer.scale * (layer.rank or 0)) for layer in layers}
    rank, alpha = (Counter(told.values()).most_common(1)[0][0] for told in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: own for name, own in sorted(ranks.items()) if own != rank},
        "alpha_pattern": {name: own for name, own in sorted(alphas.items()) if own != alpha},
        "use_dora": any(MAGNITUDE in layer.shapes for layer in layers),
        "lora_bias": False,
    }


def place(key: str) -> tuple[str, str, str]:
    """Part, path and tensor of a name. Raises KeyError when it is none."""
    if found := KNOWN.fullmatch(key):
        name, tensor = found["layer"], TENSORS[found["tensor"]]
    elif found := OLDEST.fullmatch(key):
        text = found["layer"].startswith("text_encoder")
        own = f"{found['which']}_proj" if text else f"to_{found['which']}" + (".0" if found["which"] == "out" else "")
        name, tensor = f"{found['layer']}.{own}", f"lora_{found['way']}.weight"
    else:
        raise KeyError(key)
    return *parted(name), tensor


def parted(name: str) -> tuple[str, str]:
    """Part and path of a layer's name."""
    part, _, path = name.partition(".")
    if part not in PARTS:
        part, path = "unet", name
    if part.startswith("text_encoder") and not path.startswith((LEVEL, "text_projection")):
        path = LEVEL + path
    return part, path


def fields(file: File) -> dict[str, Any]:
    """What the header says of alphas. Raises Fault when it cannot be read."""
    try:
        fields = json.loads(file.metadata.get(HEADER, "{}"))
        return dict(fields)
    except (ValueError, TypeError) as error:
        raise Fault(f"{file.path}: its header's {HEADER} cannot be read ({error}).") from error


def alpha(file: File, told: Mapping[str, Any], part: str, path: str, keys: Mapping[str, str]) -> float | None:
    """As PEFT takes it: by the pattern that fits the end of the layer's name, else the one for all."""
    if f"{part}.lora_alpha" not in told or "lora_down.weight" not in keys:
        return None
    patterns: Mapping[str, float] = told.get(f"{part}.alpha_pattern") or {}
    own = next((value for end, value in patterns.items() if re.fullmatch(rf"(.*\.)?({end})", path)), None)
    found = float(told[f"{part}.lora_alpha"] if own is None else own)
    rank = file.shapes[keys["lora_down.weight"]][0]
    return found * rank**0.5 if told.get(f"{part}.use_rslora") else found


def _tidy(alpha: float) -> float | int:
    """Whole numbers as such, and without the rounding error of alpha / rank * rank."""
    alpha = round(alpha, 9)
    return int(alpha) if alpha == int(alpha) else alpha
