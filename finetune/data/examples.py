"""One example: a picture with a caption, and the pixels that are trained of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from finetune.data.framing import geometry
from finetune.data.framing.geometry import Geometry
from finetune.data.reading import pictures
from finetune.data.reading.pictures import Facts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One picture with its captions. Made by `read`, which has decoded it whole once."""

    path: Path
    """A file that can be read."""
    captions: tuple[str, ...]
    """What it may be trained with, one or more: trigger and template are applied, tags not yet shuffled."""
    name: str = ""
    """What the user calls it: the file's name, or "row 17"."""
    weight: float = 1.0
    """Of its loss"""
    concept: int = 0
    """Number of the concept that it belongs to."""
    repeats: int = 1
    """How often an epoch sees it."""
    focus: tuple[float, float] | None = None
    """The point (x, y) that a crop keeps in view, as shares of width and height."""
    mask: Path | None = None
    """A picture whose white is trained; the example's own file where its alpha channel is the mask."""
    source: Example | None = None
    """The picture that it was made of, for a model that changes pictures."""
    taught: bool = False
    """Its target is not the noise but what the frozen base predicts: prior preservation without class pictures."""
    leaning: tuple[tuple[str, float], ...] = ()
    """Taught with these as well: further prompts, and by how much what the base predicts for each is added."""
    strength: float = 1.0
    """Of the adapter while this is trained. At -1 what it is taught leans the other way."""
    lesson: int | None = None
    """Taught from one noise and timestep, number so and so, at which the base was asked before the training."""
    own_caption: bool = field(default=False, compare=False)
    """The captions are the picture's own, not the prompt for all."""
    facts: Facts | None = field(default=None, compare=False, repr=False)
    """What was found when the picture was decoded"""

    @property
    def files(self) -> tuple[Path, ...]:
        """The picture and those that belong to it."""
        return (self.path, *([self.mask] if self.mask else []), *([self.source.path] if self.source else []))


@dataclass(frozen=True)
class Item:
    """What an epoch goes through: an example at one base resolution."""

    example: Example
    views: tuple[Geometry, ...]
    """Crops and mirror images, all of one target size; each is encoded once."""
    captions: tuple[str, ...]
    """What it is trained with, after shuffling and dropping of tags; each is encoded once."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.views[0].target


def pixels(example: Example, view: Geometry, background: str = "white") -> Tensor:
    """What a view shows of the example's picture: (3, H, W) float32 in [-1, 1].

    A large JPEG is decoded at a part of its size where that loses nothing (`pictures.reduction`). Raises BadPicture
    when the file cannot be read (any more).
    """
    reduced = pictures.reduction(example.facts, view.scaled) if example.facts else 1
    if reduced > 1:
        picture = pictures.decode_reduced(example.path, reduced, background)
    else:
        picture, _ = pictures.decode(example.path, background)
    if view.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return geometry.tensor(geometry.crop(picture, view))
