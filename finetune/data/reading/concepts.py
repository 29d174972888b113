"""What a run learns, one thing or several: the `[[concepts]]` of its settings, with what they leave out filled in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.reading import captions
from finetune.data.reading.pictures import printable
from finetune.errors import Fault
from finetune.settings import Concept, Data


@dataclass(frozen=True)
class Part:
    """One concept, or all that a run without concepts learns."""

    number: int
    title: str
    """What faults call it; empty where it is the only one."""
    data: Data
    """Where its pictures are and what is made of their captions: `[data]` under the concept's own settings"""
    repeats: int = 1
    weight: float = 1.0
    class_prompt: tuple[str, ...] = ()
    class_data: Path | None = None


def parts(data: Data) -> list[Part]:
    """The concepts in their order, or the one of `[data]`. Raises Fault where there is neither, or both."""
    if data.data is not None and data.concepts:
        raise Fault(
            "--data and [[concepts]] are both given, and each says what to learn. Make the pictures of --data a "
            "[[concepts]] table of their own, or leave one of both out."
        )
    if not data.concepts:
        if not data.data:
            raise Fault("no pictures to learn: give --data FOLDER (or hf:NAME), or [[concepts]] tables in a TOML file.")
        return [Part(0, "", data)]
    return [_part(number, concept, data) for number, concept in enumerate(data.concepts)]


def called(part: Part) -> str:
    """What the user calls a concept: its trigger, or its folder; "all" where it is the only one."""
    return printable(part.data.trigger or (part.data.data if part.title else None) or "all")


def check(part: Part) -> list[str]:
    """What is wrong with a concept's settings, whatever its pictures."""
    faults = []
    if part.repeats < 1:
        faults.append(f"repeats = {part.repeats}: a whole number, 1 or more")
    if not (math.isfinite(part.weight) and part.weight >= 0):
        faults.append(f"weight = {part.weight:g}: a number, 0 or more")
    if not 0 <= part.data.validation < 1:
        faults.append(f"validation = {part.data.validation:g}: a share, 0 or more and less than 1")
    if wrong := captions.check(part.data.trigger, part.data.template):
        faults.append(wrong.rstrip("."))
    return faults


def _part(number: int, concept: Concept, data: Data) -> Part:
    own = {
        name: value
        for name in ("data", "prompt", "trigger", "template", "masks", "alpha_masks", "sources", "validation")
        if (value := getattr(concept, name)) is not None
    }
    filled = replace(data, **own, concepts=())
    return Part(
        number, f"concept {number + 1} ({concept.data})", filled,
        concept.repeats, concept.weight, concept.class_prompt, concept.class_data,
    )  # fmt: skip
