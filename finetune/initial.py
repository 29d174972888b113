"""What a picture is drawn from besides noise: a picture, and which part of it is drawn anew."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image as Images
from PIL import ImageFilter
from PIL.Image import Image

from finetune.data.reading import pictures
from finetune.errors import Fault

WHOLE, PART = 0.6, 1.0
"""Strengths where none is said: of the whole picture, and of the part under a mask."""
PICTURE = 1.5
"""Guidance by the picture (Brooks et al. 2022, 2211.09800, section 3.2.1)"""
OVERLAP = 8
"""Pixels of the picture that are drawn anew with what it grows by, so that both meet"""


@dataclass(frozen=True)
class Initial:
    """A picture to begin with. It keeps its shape."""

    picture: Image
    """RGB"""
    strength: float
    """0: as it is; 1: from noise alone."""
    mask: Image | None = None
    """L, of the picture's size: 255 is drawn anew, 0 stays."""
    guidance: float | None = None
    """How strictly an instruct-pix2pix checkpoint, which knows no strength, keeps to the picture: 1 or more."""

    def fitted(self, side: int, factor: int) -> Initial:
        """As large as a square of `side` pixels, its sides multiples of `factor`."""
        scale = side / math.sqrt(self.picture.width * self.picture.height)
        width, height = (max(1, round(length * scale / factor)) * factor for length in self.picture.size)
        if (width, height) == self.picture.size:
            return self
        picture = self.picture.resize((width, height), Images.Resampling.LANCZOS)
        mask = self.mask and _hard(self.mask.resize((width, height), Images.Resampling.BILINEAR))
        return replace(self, picture=picture, mask=mask)

    def in_cells(self, factor: int) -> Image:
        """The mask of all latent pixels of which a part is masked. The picture must be fitted."""
        assert self.mask is not None
        rows, columns = self.mask.height // factor, self.mask.width // factor
        cells = np.asarray(self.mask).reshape(rows, factor, columns, factor).max((1, 3))
        return Images.fromarray(cells.repeat(factor, 0).repeat(factor, 1))

    def kept(self, drawn: Image, edge: int) -> Image:
        """The drawn picture with this one's own pixels outside the mask; `edge` pixels lead over from one to other."""
        assert self.mask is not None
        wide = self.mask.filter(ImageFilter.MaxFilter(2 * (edge // 2) + 1))
        soft = np.maximum(np.asarray(wide.filter(ImageFilter.BoxBlur(edge // 2))), np.asarray(self.mask))
        return Images.composite(drawn, self.picture, Images.fromarray(soft))


def read(
    picture: Path, mask: Path | None = None, strength: float | None = None, extend: tuple[int, ...] = ()
) -> Initial:
    """From files. `extend`: pixels by which the picture grows to the left, top, right and bottom.

    Raises Fault for what is no picture, and for a mask that does not belong to it.
    """
    found, _ = pictures.decode(picture)
    area = _mask(mask, picture, found)
    if extend:
        found, area = _extended(found, area, extend)
    chosen = (WHOLE if area is None else PART) if strength is None else strength
    if not 0 <= chosen <= 1:
        raise Fault(f"--strength {chosen:g}: between 0, which leaves the picture as it is, and 1, which ignores it.")
    return Initial(found, chosen, area)


def _mask(path: Path | None, picture: Path, found: Image) -> Image | None:
    if path is None:
        return None
    mask = pictures.decode(path, "black")[0].convert("L")
    if abs(math.log(mask.width * found.height / (mask.height * found.width))) > 0.02:
        raise Fault(
            f"--mask {path}: {mask.width} x {mask.height} pixels, which is another shape than {picture} "
            f"({found.width} x {found.height}) has. It lies over the picture: white is drawn anew, black stays."
        )
    hard = _hard(mask if mask.size == found.size else mask.resize(found.size, Images.Resampling.BILINEAR))
    if not hard.getbbox():
        raise Fault(f"--mask {path}: black all over, so nothing would be drawn. White is drawn anew.")
    return hard


def _extended(picture: Image, mask: Image | None, by: tuple[int, ...]) -> tuple[Image, Image]:
    """The picture grown by its own border's pixels, and a mask of what is new."""
    if len(by) != 4 or min(by) < 0 or not any(by):
        raise Fault(
            f"--extend {' '.join(map(str, by))}: four numbers of pixels: to the left, top, right and bottom, "
            "e.g. 128 0 128 0."
        )
    left, top, right, bottom = by
    sides = (top, bottom), (left, right)
    grown = Images.fromarray(np.pad(np.asarray(picture), (*sides, (0, 0)), mode="edge"))
    inner = np.zeros((picture.height, picture.width), np.uint8) if mask is None else np.array(mask)
    for axis, (before, after) in enumerate(sides):
        lines = np.moveaxis(inner, axis, 0)
        lines[: OVERLAP if before else 0] = 255
        lines[len(lines) - (OVERLAP if after else 0) :] = 255
    return grown, Images.fromarray(np.pad(inner, sides, constant_values=255))


def _hard(mask: Image) -> Image:
    """As diffusers takes it: what is lighter than the middle is drawn anew."""
    return mask.point([0] * 128 + [255] * 128)
