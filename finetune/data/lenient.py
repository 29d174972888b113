"""What can be read of a data set that training would refuse: the doctor goes on where `read` stops."""

from __future__ import annotations

from pathlib import Path

from finetune.data import folder, looks, pictures
from finetune.data.examples import Example
from finetune.data.looks import Look
from finetune.data.pictures import BadPicture
from finetune.errors import Fault
from finetune.settings import Data

HUB = "hf:"


def folders(data: Data) -> list[Path]:
    """The folders that pictures are read from."""
    given = [one.data for one in data.concepts] or [data.data or ""]
    return [Path(name) for name in given if name and not name.startswith(HUB)]


def names(data: Data) -> list[str]:
    """The names of all files in them, for telling which one a fault's line is about."""
    found = []
    for path in folders(data):
        try:
            found += sorted(folder.look(path).names)
        except Fault:
            continue
    return found


def read(data: Data) -> list[Example]:
    """The pictures that can be read, with those of their captions that can be."""
    found = []
    for number, path in enumerate(folders(data)):
        concept = data.concepts[number] if data.concepts else data
        try:
            listing = folder.look(path)
        except Fault:
            continue
        files = folder.caption_files(listing.pictures, listing.captions)
        for picture in listing.pictures:
            own = _caption(files.get(picture))
            prompt = concept.prompt or data.prompt or ""
            facts = None if picture.name in data.skip else _facts(picture, data.background)
            if facts is not None:
                found.append(
                    Example(picture, (own or prompt,), picture.name, concept=number, own_caption=bool(own), facts=facts)
                )
    return found


def look(path: Path, side: int, background: str) -> Look | None:
    """The picture's look; None when it cannot be read."""
    try:
        return looks.look(pictures.decode(path, background)[0], side)
    except BadPicture:
        return None


def _facts(path: Path, background: str) -> pictures.Facts | None:
    try:
        return pictures.decode(path, background)[1]
    except Fault:
        return None


def _caption(file: Path | None) -> str | None:
    try:
        return folder.read_caption(file) if file else None
    except Fault:
        return None
