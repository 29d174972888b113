"""From a picture to the training square: scaled to cover it, cropped, and what of that is told to SDXL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


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

    def tensor(self) -> Tensor:
        """(6,) float32: original, crop, target, the order of SDXL's `time_ids` (Podell et al. 2023, section 2.2)."""
        import torch

        return torch.tensor([*self.original, *self.crop, *self.target], dtype=torch.float32)


def centre(original: tuple[int, int], target: tuple[int, int]) -> Geometry:
    """Scaled to cover the target, what is too long cropped evenly at both ends."""
    whole = Geometry(original, (0, 0), target)
    top, left = ((outer - inner) // 2 for outer, inner in zip(whole.scaled, target, strict=True))
    return Geometry(original, (top, left), target)


def crop(picture: Image.Image, geometry: Geometry) -> Image.Image:
    """The pixels of the crop, by Lanczos: the same as to scale all and then crop, but only the crop is computed.

    So a strip of 80,000 x 2 pixels takes no more memory than any other picture.
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
