"""One example: a picture with a caption, and the pixels that are trained of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from finetune.data import geometry, pictures
from finetune.data.geometry import Geometry
from finetune.data.pictures import Facts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One picture with one caption. Made by `read`, which has decoded it whole once."""

    path: Path
    caption: str
    weight: float = 1.0
    """Of its loss"""
    flip: bool = False
    """Train its mirror image."""
    own_caption: bool = field(default=False, compare=False)
    """The caption comes from the picture's own file, not from the prompt for all."""
    facts: Facts | None = field(default=None, compare=False, repr=False)
    """What was found when the picture was decoded"""


def pixels(example: Example, resolution: int, background: str = "white") -> tuple[Tensor, Geometry]:
    """The example's training square: (3, resolution, resolution) float32 in [-1, 1], and where it comes from.

    A mirror image is mirrored before it is cropped, so its geometry is true as well. Raises BadPicture when the file
    cannot be read (any more).
    """
    picture, facts = pictures.decode(example.path, background)
    if example.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    placed = geometry.centre((facts.height, facts.width), (resolution, resolution))
    return geometry.tensor(geometry.crop(picture, placed)), placed
