"""From a picture to what is trained of it: mirrored, scaled to cover a size, cropped, and what SDXL is told of that."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from finetune import keys

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.data.reading.pictures import Facts
    from finetune.settings import Framing

APART = 8
"""Pixels for each random place: crops that lie closer are the same to an autoencoder that scales by 8."""


@dataclass(frozen=True)
class Geometry:
    """Where the trained pixels come from. All in pixels, vertical first."""

    original: tuple[int, int]
    """Height and width of the picture, upright, before scaling"""
    crop: tuple[int, int]
    """Top and left of the crop in the scaled picture"""
    target: tuple[int, int]
    """Height and width of the crop: what the model sees"""
    mirrored: bool = False
    """The picture is mirrored first: the crop is one of its mirror image"""

    @property
    def scale(self) -> float:
        """How much the picture is enlarged (> 1) or reduced (< 1): as far as it must be to cover the target."""
        return max(inner / outer for inner, outer in zip(self.target, self.original, strict=True))

    @property
    def scaled(self) -> tuple[int, int]:
        """Height and width of the whole picture after scaling, to the nearest pixel."""
        height, width = (round(side * self.scale) for side in self.original)
        return height, width

    @property
    def kept(self) -> float:
        """Share of the picture that lies inside the crop."""
        return math.prod(self.target) / math.prod(self.scaled)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Top, left, bottom and right of the crop, as shares of the picture (of its mirror image, if mirrored)."""
        (top, left), (height, width), (tall, wide) = self.crop, self.target, self.scaled
        return top / tall, left / wide, (top + height) / tall, (left + width) / wide

    def mirror(self) -> Geometry:
        """The same part of the picture, seen in the mirror."""
        left = self.scaled[1] - self.target[1] - self.crop[1]
        return replace(self, crop=(self.crop[0], left), mirrored=not self.mirrored)

    def tensor(self) -> Tensor:
        """(6,) float32: original, crop, target, the order of SDXL's `time_ids` (Podell et al. 2023, section 2.2)."""
        import torch

        return torch.tensor([*self.original, *self.crop, *self.target], dtype=torch.float32)


def views(
    facts: Facts, target: tuple[int, int], framing: Framing, focus: tuple[float, float] | None = None, seed: int = 0
) -> tuple[Geometry, ...]:
    """What is trained of a picture at one size: the crops of its policy, then the mirror images of all with `flip`.

    `focus` is the point (x, y) for `crop = "focus"`, as shares of width and height; without one the centre is taken.
    Random places follow from the picture's pixels and the seed, not from its name.
    """
    original = facts.height, facts.width
    if framing.crop == "random":
        found = scattered(original, target, framing.crop_variants, seed, facts.digest)
    elif framing.crop == "focus" and focus is not None:
        found = (around(original, target, focus),)
    else:
        found = (centre(original, target),)
    return (*found, *(view.mirror() for view in found)) if framing.flip else found


def centre(original: tuple[int, int], target: tuple[int, int]) -> Geometry:
    """Scaled to cover the target, what is too long cropped evenly at both ends."""
    top, left = (slack // 2 for slack in _slack(original, target))
    return Geometry(original, (top, left), target)


def around(original: tuple[int, int], target: tuple[int, int], focus: tuple[float, float]) -> Geometry:
    """Scaled to cover the target; the point (x, y) as near the middle of the crop as the picture's edges allow."""
    scaled = Geometry(original, (0, 0), target).scaled
    wanted = [round(share * outer - inner / 2) for share, outer, inner in zip(focus[::-1], scaled, target, strict=True)]
    top, left = (min(max(0, at), slack) for at, slack in zip(wanted, _slack(original, target), strict=True))
    return Geometry(original, (top, left), target)


def scattered(
    original: tuple[int, int], target: tuple[int, int], count: int, seed: int, key: str
) -> tuple[Geometry, ...]:
    """Scaled to cover the target; up to `count` random places, one in each of as many equal parts of what there is.

    So every part of the picture is in some crop, if there are enough. No two are the same; fewer where they would be.
    """
    slack = _slack(original, target)
    places = max(slack) + 1  # at most one direction has any
    count = min(count, 1 + max(slack) // APART)
    bounds = [places * part // count for part in range(count + 1)]
    found = []
    for part in range(count):
        at = keys.integer(bounds[part], bounds[part + 1], seed, "crop", key, *target, part)
        found.append(Geometry(original, (at if slack[0] else 0, at if slack[1] else 0), target))
    return tuple(found)


def crop(picture: Image.Image, geometry: Geometry) -> Image.Image:
    """The pixels of the crop, by Lanczos: the same as to scale all and then crop, but only the crop is computed.

    The picture is mirrored already, if it is to be. A strip of 80,000 x 2 pixels takes no more memory than any other.
    """
    (top, left), (height, width) = geometry.crop, geometry.target
    whole_height, whole_width = geometry.scaled
    y, x = picture.height / whole_height, picture.width / whole_width  # pixels of the picture in one scaled pixel
    box = (left * x, top * y, min((left + width) * x, picture.width), min((top + height) * y, picture.height))
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=box)


def tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()


def _slack(original: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """How many pixels of the scaled picture are cropped off, vertically and horizontally: one of them is 0."""
    tall, wide = Geometry(original, (0, 0), target).scaled
    return tall - target[0], wide - target[1]
