"""What was found in each picture file, remembered by the file's content: a second look at 20,000 pictures decodes none.

A file that cannot be decoded is not remembered: a decoder may be installed meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

import PIL
from PIL import features

from finetune.data.ahead import ahead
from finetune.data.notebook import Notebook
from finetune.data.reading import pictures
from finetune.data.reading.pictures import BadPicture, Facts

NAME = "facts"
Found: TypeAlias = tuple[bytes | None, Facts]
"""What was found, and the key under which it is to be remembered; None where it was."""


def facts(path: Path, background: str = "white") -> Facts:
    """What `pictures.decode` finds in a file: looked up where the same bytes were decoded before.

    Raises as `pictures.decode` does.
    """
    pictures.colour(background)
    with Notebook(NAME) as known:
        return _noted(known, _look(path, background, known))


def facts_of(
    paths: Iterable[Path], background: str = "white", workers: int | None = None
) -> Iterator[Facts | BadPicture]:
    """The facts of each file in order, or why it cannot be used; in `workers` threads (one a core, at most 4)."""
    pictures.colour(background)

    def look(path: Path) -> Found | BadPicture:
        try:
            return _look(path, background, known)
        except BadPicture as bad:
            return BadPicture(bad.path, bad.reason)  # the one that was raised holds on to frames, and they to pixels

    with Notebook(NAME) as known:
        for found in ahead(look, paths, workers or min(4, os.cpu_count() or 1)):
            yield found if isinstance(found, BadPicture) else _noted(known, found)


def _noted(known: Notebook, found: Found) -> Facts:
    key, seen = found
    if key is not None:
        known.add(key, json.dumps(asdict(seen), separators=(",", ":")).encode())
    return seen


def _look(path: Path, background: str, known: Notebook) -> Found:
    before = _state(path)
    key = _key(path, background) if before else None
    if key and (remembered := _recall(known, key)):
        return None, remembered
    found = pictures.decode(path, background)[1]
    return (key if _state(path) == before else None), found  # not one file's bytes and another one's pixels


def _recall(known: Notebook, key: bytes) -> Facts | None:
    with suppress(ValueError, TypeError, KeyError):
        fields = json.loads(known.get(key) or b"null")
        return Facts(**{**fields, "notes": tuple(fields["notes"])})
    return None


def _state(path: Path) -> tuple[int, ...] | None:
    """Changes when a file does; None for what is no regular file."""
    with suppress(OSError):
        if path.is_file():
            stat = path.stat()
            return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    return None


def _key(path: Path, background: str) -> bytes | None:
    try:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None  # to decode it will say why
    return hashlib.sha256(json.dumps([content, background, _readers()]).encode()).digest()


@cache
def _readers() -> list[str]:
    """All that decides what a file's pixels are besides its bytes."""
    ours = hashlib.sha256(Path(pictures.__file__).read_bytes()).hexdigest()
    codecs = [f"{name} {features.version(name)}" for name in ("libjpeg_turbo", "jpg", "jpg_2000", "webp", "littlecms2")]
    plug_ins = []
    for name in ("pillow-heif", "pillow-jxl-plugin", "pillow-avif-plugin"):
        with suppress(PackageNotFoundError):
            plug_ins.append(f"{name} {version(name)}")
    return [ours, f"pillow {PIL.__version__}", *codecs, *plug_ins]
