"""An adapter file's names as they stand there, whoever understands them: layers, spellings, and what is neither."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.export import change
from finetune.export.content import File
from finetune.export.formats import diffusers, kohya, peft
from finetune.families import Family

ORIGINAL = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks|time_embed_\d|label_emb|out_\d)")
KOHYA = ("kohya", "original")
PEFT = ("peft", "script", "oldest")
TUNED = {peft.FACTORS: "weight"}
"""What PEFT calls otherwise than LyCORIS"""


@dataclass(frozen=True)
class Module:
    """A layer as the file names it, or a name that is no layer's, without part and path."""

    name: str
    spelling: str
    """kohya; original (kohya's prefix, the original code's path); peft, script, oldest (diffusers' own); tuner (PEFT's
    of kinds that are no LoRA); unknown"""
    part: str | None = None
    path: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    """The file's name of each of its tensors, by LyCORIS's names"""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    alpha: float | None = None

    @property
    def prefix(self) -> str:
        return "_".join(self.name.split("_", 2)[:2]) if self.spelling in KOHYA else self.name.partition(".")[0]

    @property
    def tensors(self) -> frozenset[str]:
        """By LyCORIS's names, without alpha"""
        return frozenset(self.keys) - {"alpha"}

    @property
    def kind(self) -> str | None:
        return change.kind(self.tensors)

    @property
    def text(self) -> bool:
        return (self.part or "").startswith("text_encoder")


@dataclass(frozen=True)
class Content:
    """A file's modules, and the family that it is for."""

    modules: Sequence[Module]
    family: type[Family]
    metadata: Mapping[str, str] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    """Layers ("unet.mid_block...") that the base does not have"""

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules)


def modules(file: File) -> list[Module]:
    """Whatever the file's names are: those that are no layer's have none."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for key in file.shapes:
        name, spelling, tensor = _spelled(key)
        found.setdefault((name, spelling), {})[tensor] = key
    header = diffusers.fields(file)
    return [_module(file, header, name, spelling, keys) for (name, spelling), keys in found.items()]


def _spelled(key: str) -> tuple[str, str, str]:
    """Name, spelling and tensor of a key."""
    if key.startswith("lora_") and not key.startswith(("lora_A", "lora_B")):
        name, _, tensor = key.partition(".")
        return name, "original" if ORIGINAL.match(name) else "kohya", tensor
    if found := diffusers.OLDEST.fullmatch(key):
        return f"{found['layer']}.to_{found['which']}", "oldest", f"lora_{found['way']}.weight"
    if found := diffusers.KNOWN.fullmatch(key):
        spelling = "peft" if found["tensor"].startswith(("lora_A", "lora_B", "lora_mag")) else "script"
        return found["layer"], spelling, diffusers.TENSORS[found["tensor"]]
    if found := peft.KNOWN.fullmatch(key):
        return found["layer"], "tuner", TUNED.get(found["tensor"], found["tensor"])
    return key, "unknown", ""


def _module(file: File, header: Mapping[str, Any], name: str, spelling: str, keys: dict[str, str]) -> Module:
    shapes = {tensor: file.shapes[key] for tensor, key in keys.items()}
    try:
        reader = peft if spelling == "tuner" else diffusers
        part, path = kohya.place(name) if spelling in KOHYA else reader.place(next(iter(keys.values())))[:2]
    except KeyError:
        return Module(name, spelling, None, None, keys, shapes)
    alpha = float(file.load(keys["alpha"])) if "alpha" in keys and not shapes["alpha"] else None
    if spelling in PEFT:
        alpha = diffusers.alpha(file, header, part, path, keys)
    return Module(name, spelling, part, path, keys, shapes, alpha)
