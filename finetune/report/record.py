"""`pictures.json`: the pictures that a run trains on and their crops, told when it begins, as folders change later."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune import disk
from finetune.data.examples import Item

FILE = "pictures.json"
MOST = 2000
"""Pictures that are told, the first; a page shows far fewer"""
Box = tuple[float, float, float, float]
"""Top, left, bottom and right, as shares of the picture"""


@dataclass(frozen=True)
class Picture:
    """One of the data set."""

    name: str
    path: str
    captions: Sequence[str]
    concept: int
    held: bool
    """Held out of the training, to measure on"""
    crops: Sequence[Box]
    sizes: Sequence[str]
    """What is trained of it, in pixels: "512 x 512" """


@dataclass(frozen=True)
class Record:
    pictures: Sequence[Picture] = ()
    count: int = 0
    """Of all pictures"""
    held: int = 0
    """Of those that are held out"""


def write(run: Path, subjects: Iterable[Item], held: Iterable[Item]) -> None:
    out = _pictures(held, True)
    told = [*_pictures(subjects, False), *out]
    table = {"count": len(told), "held": len(out), "pictures": [asdict(one) for one in told[:MOST]]}
    disk.write_text(run / FILE, json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def read(run: Path) -> Record:
    """Empty where nothing was told, or nothing that can be read."""
    try:
        told = json.loads((run / FILE).read_text(encoding="utf-8"))
        pictures = [Picture(**{**one, "crops": [_box(crop) for crop in one["crops"]]}) for one in told["pictures"]]
        return Record(pictures, int(told["count"]), int(told["held"]))
    except (OSError, ValueError, TypeError, KeyError):
        return Record()


def _pictures(items: Iterable[Item], held: bool) -> list[Picture]:
    """A picture that is trained at several sizes is one."""
    found: dict[tuple[str, int], list[Item]] = {}
    for item in items:
        found.setdefault((str(item.example.path.absolute()), item.example.concept), []).append(item)
    return [_picture(same, held) for same in found.values()]


def _picture(items: Sequence[Item], held: bool) -> Picture:
    example = items[0].example
    views = [view.mirror() if view.mirrored else view for item in items for view in item.views]
    return Picture(
        example.name or example.path.name,
        str(example.path.absolute()),
        example.captions,
        example.concept,
        held,
        list(dict.fromkeys(view.box for view in views)),
        list(dict.fromkeys(f"{view.target[1]} x {view.target[0]}" for view in views)),
    )


def _box(told: Sequence[float]) -> Box:
    top, left, bottom, right = map(float, told)
    return top, left, bottom, right
