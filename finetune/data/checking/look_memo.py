"""The looks of many pictures, measured in several threads and remembered by what the pictures show."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import PIL

from finetune.data.ahead import ahead
from finetune.data.checking import looks
from finetune.data.checking.looks import Look
from finetune.data.notebook import Notebook
from finetune.data.reading import pictures
from finetune.data.reading.pictures import BadPicture

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Goes through pictures and shows how far it is"""
NAME = "looks"
WORKERS = 2
"""Threads that decode and measure"""
LAYOUT = struct.Struct("<dQ192s")


def looks_of(
    paths: Mapping[str, Path], side: int, background: str = "white", track: Track = lambda items, _: items
) -> dict[str, Look]:
    """The look of each picture at training size `side`, by its digest. One that cannot be read any more has none."""

    def measure(digest: str) -> tuple[str, Look | None]:
        with suppress(BadPicture):
            return digest, looks.look(pictures.decode(paths[digest], background)[0], side)
        return digest, None

    with Notebook(NAME) as known:
        found = {digest: look for digest in paths if (look := _recall(known, _key(digest, side)))}
        missing = [digest for digest in paths if digest not in found]
        for digest, look in ahead(measure, track(missing, "look at pictures") if missing else (), WORKERS):
            if look is not None:
                found[digest] = look
                known.add(_key(digest, side), LAYOUT.pack(look.sharpness, look.hash, look.thumb))
    return {digest: found[digest] for digest in paths if digest in found}


def _recall(known: Notebook, key: bytes) -> Look | None:
    with suppress(struct.error):
        note = known.get(key)
        return Look(*LAYOUT.unpack(note)) if note else None
    return None


def _key(digest: str, side: int) -> bytes:
    return hashlib.sha256(f"{digest} {side} {_measures()}".encode()).digest()


@cache
def _measures() -> str:
    """All that decides what a picture's look is besides its pixels."""
    ours = hashlib.sha256(Path(looks.__file__).read_bytes()).hexdigest()
    return f"{ours} pillow {PIL.__version__}"
