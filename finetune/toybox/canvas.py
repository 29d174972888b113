"""A small drawing board: closed shapes with a fill and an outline, in one of the world's styles.

Everything is drawn four times too large and reduced once, which is the cheapest smooth edge there is (Pillow draws
hard edges only).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]

SUPERSAMPLING = 4


@dataclass(frozen=True)
class Ink:
    """How a style draws: the outline's width in 1/64 of the picture, and what becomes of the colours."""

    width: float
    outline: Callable[[RGB], RGB]
    fill: Callable[[RGB], RGB]
    shaded: bool = False


def mix(a: RGB, b: RGB, amount: float) -> RGB:
    """`a` moved towards `b` by `amount` in 0..1."""
    red, green, blue = (round(x + (y - x) * amount) for x, y in zip(a, b, strict=True))
    return red, green, blue


def lighter(colour: RGB, amount: float) -> RGB:
    return mix(colour, (255, 255, 255), amount)


def darker(colour: RGB, amount: float) -> RGB:
    return mix(colour, (10, 10, 20), amount)


def _glowing(colour: RGB) -> RGB:
    """A neon tube has no dark colours: whatever is asked for, its strongest channel is full."""
    strongest = max(colour)
    return (255, 255, 255) if strongest < 70 else mix(colour, lighter(colour, 0.25), 1 - strongest / 400)


INKS = {
    "photo": Ink(1.0, lambda colour: darker(colour, 0.68), lambda colour: colour, shaded=True),
    "cartoon": Ink(2.1, lambda colour: (16, 16, 22), lambda colour: colour),
    "neon": Ink(1.7, _glowing, lambda colour: mix((14, 8, 34), colour, 0.08)),
}


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0, points: int = 36) -> list[Point]:
    """The outline of an ellipse around (x, y), turned by `turn` degrees."""
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    circle = [(math.cos(a), math.sin(a)) for a in (2 * math.pi * i / points for i in range(points))]
    return [(x + rx * u * c - ry * v * s, y + rx * u * s + ry * v * c) for u, v in circle]


def box(left: float, top: float, right: float, bottom: float, radius: float = 0.0) -> list[Point]:
    """The outline of a rectangle with rounded corners."""
    if radius <= 0:
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    corners = [
        (right - radius, top + radius, -90),
        (right - radius, bottom - radius, 0),
        (left + radius, bottom - radius, 90),
        (left + radius, top + radius, 180),
    ]
    return [
        (x + radius * math.cos(math.radians(start + step)), y + radius * math.sin(math.radians(start + step)))
        for x, y, start in corners
        for step in (0, 22.5, 45, 67.5, 90)
    ]


@dataclass
class Canvas:
    """A transparent picture and the place on it: local (-1..1, y down) becomes pixels."""

    size: int
    ink: Ink
    x: float = 0.5
    y: float = 0.5
    scale: float = 0.5
    flip: bool = False
    image: Image.Image = field(init=False)
    _draw: ImageDraw.ImageDraw = field(init=False)

    def __post_init__(self) -> None:
        full = self.size * SUPERSAMPLING
        self.image = Image.new("RGBA", (full, full), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)

    def pixels(self, points: Sequence[Point]) -> list[Point]:
        full = self.size * SUPERSAMPLING
        sign = -1 if self.flip else 1
        return [((self.x + sign * u * self.scale) * full, (self.y + v * self.scale) * full) for u, v in points]

    def shape(self, points: Sequence[Point], colour: RGB, outline: bool = True) -> None:
        """A closed shape."""
        placed = self.pixels(points)
        self._draw.polygon(placed, fill=self.ink.fill(colour))
        if outline:
            self._line([*placed, placed[0], placed[1]], self.ink.outline(colour), self.ink.width)

    def line(self, points: Sequence[Point], colour: RGB, width: float) -> None:
        """An open line, `width` in 1/64 of the picture: whiskers, masts, antennae."""
        self._line(self.pixels(points), colour, width)

    def patterned(self, points: Sequence[Point], colour: RGB, pattern: Sequence[Sequence[Point]], second: RGB) -> None:
        """A closed shape whose inside carries other shapes, cut off at its edge."""
        placed = self.pixels(points)
        mask = Image.new("L", self.image.size, 0)
        ImageDraw.Draw(mask).polygon(placed, fill=255)
        filled = Image.new("RGBA", self.image.size, (*self.ink.fill(colour), 255))
        draw = ImageDraw.Draw(filled)
        for part in pattern:
            draw.polygon(self.pixels(part), fill=self.ink.fill(second))
            if not self.ink.shaded:
                inside = self.pixels(part)
                draw.line([*inside, inside[0]], fill=self.ink.outline(second), width=self._width(0.6 * self.ink.width))
        self.image.paste(filled, (0, 0), mask)
        self._line([*placed, placed[0], placed[1]], self.ink.outline(colour), self.ink.width)

    def _line(self, placed: Sequence[Point], colour: RGB, width: float) -> None:
        self._draw.line(list(placed), fill=colour, width=self._width(width), joint="curve")

    def _width(self, width: float) -> int:
        return max(1, round(width * self.size * SUPERSAMPLING / 64))

    def finished(self) -> Image.Image:
        """The picture at its own size, RGBA."""
        return self.image.reduce(SUPERSAMPLING)
