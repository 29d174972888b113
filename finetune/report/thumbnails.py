"""Pictures small enough to stand in a page, as data URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from finetune.data.reading import pictures
from finetune.errors import Fault

SIDE = 320
"""Pixels of the longer side, at most"""
EXACT = 160
"""Pictures no larger than this are kept to the bit; others lose what nobody sees (WebP, quality 82)"""


@dataclass(frozen=True)
class Thumbnail:
    uri: str
    width: int
    height: int
    small: bool
    """Whether the picture itself is so small that its pixels are to be seen"""


def thumbnail(path: Path, side: int = SIDE, background: str = "white") -> Thumbnail | None:
    """None where there is no picture that can be read. Nothing but pixels gets into it, no EXIF."""
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        return None
    return _made(path, stamp, side, background)


@lru_cache(maxsize=512)
def _made(path: Path, stamp: int, side: int, background: str) -> Thumbnail | None:
    try:
        picture = pictures.decode_reduced(path, _reduction(path, side), background)
    except (Fault, OSError, Image.DecompressionBombError):
        return None
    small = max(picture.size) <= EXACT
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    picture.save(written, "WEBP", **({"lossless": True} if small else {"quality": 82, "method": 4}))
    coded = base64.b64encode(written.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/webp;base64,{coded}", picture.width, picture.height, small)


def _reduction(path: Path, side: int) -> int:
    """By how much a photo may be smaller when it is decoded: JPEGs are so at a part of the cost."""
    with Image.open(path) as opened:
        largest = max(opened.size)
    return next((by for by in (8, 4, 2) if largest // by >= 2 * side), 1)
