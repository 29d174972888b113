"""Pictures that belong to others by their names, in a folder of their own: masks, and pictures that are changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from finetune.data.examples import Example
from finetune.data.reading import memo
from finetune.data.reading.folder import look
from finetune.data.reading.pictures import BadPicture, printable

TOLERANCE = 0.01
"""Share by which the aspect ratios of two that belong together may differ: they were scaled and rounded."""


class Partners:
    """A folder's pictures by the stems of those that they belong to, whatever kind of picture they are.

    `a.jpg.png` tells the one of `a.jpg` from that of `a.png`. Raises Fault when the folder cannot be listed.
    """

    def __init__(self, folder: Path | None, examples: Sequence[Example], what: str) -> None:
        """`examples`: those that look for one here. `what` they are called: "mask"."""
        self.what = what
        self.files: dict[str, list[Path]] = {}
        for file in look(folder).pictures if folder is not None else ():
            self.files.setdefault(file.stem, []).append(file)
        self.sharing: dict[str, list[str]] = {}
        for example in examples:
            if example.path.name not in self.files:
                self.sharing.setdefault(example.path.stem, []).append(example.name or example.path.name)

    def of(self, example: Example) -> tuple[Path | None, str | None]:
        """The one of an example, or what is wrong; neither where there is none."""
        name, stem = example.path.name, example.path.stem
        several = self.files.get(name) or self.files.get(stem, [])
        if not several:
            return None, None
        if len(several) > 1:
            return None, f"several {self.what}s: {', '.join(printable(file.name) for file in several)}. Keep one"
        if several[0].stem == stem and len(self.sharing.get(stem, ())) > 1:
            both = ", ".join(printable(one) for one in self.sharing[stem])
            return (
                None,
                f"{printable(several[0].name)} would be the {self.what} of {both}: name it {printable(name)}.png",
            )
        return several[0], None


def with_sources(examples: Sequence[Example], folder: Path | None, background: str) -> tuple[list[Example], list[str]]:
    """The examples with the pictures that they were made of, and what is wrong with those: missing, unreadable, of
    another shape. Raises Fault when the folder cannot be listed.
    """
    if folder is None:
        return list(examples), []
    partners = Partners(folder, examples, "source")
    told = [partners.of(example) for example in examples]
    paths = [path for path, _ in told if path is not None]
    seen = dict(zip(paths, memo.facts_of(paths, background), strict=True))
    found, faults = [], []
    for example, (path, fault) in zip(examples, told, strict=True):
        facts = seen.get(path) if path else None
        if path is None or facts is None:
            fault = fault or f"no source of that name in {printable(folder)}: the picture that it was made of"
        elif isinstance(facts, BadPicture):
            fault = f"its source {printable(path.name)}: {facts.reason}"
        else:
            source = Example(path, example.captions, path.name, facts=facts)
            fault, example = _other_shape(example, source), replace(example, source=source)
        found.append(example)
        if fault:
            faults.append(f"{printable(example.name or example.path.name)}: {fault}")
    return found, faults


def alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two (height, width) have the same aspect ratio, but for rounding to pixels."""
    apart = abs(one[0] * other[1] - one[1] * other[0])
    return apart <= max(TOLERANCE * one[1] * other[0], max(*one, *other))


def _other_shape(example: Example, source: Example) -> str | None:
    one, other = example.facts, source.facts
    assert one is not None and other is not None
    if alike((other.height, other.width), (one.height, one.width)):
        return None
    return (
        f"its source {printable(source.path.name)} has {other.width} x {other.height} pixels, the picture (upright) "
        f"{one.width} x {one.height}: another shape. Both are cropped alike, so save them in one size"
    )
