"""The things of the world: eight nouns, and the toys that are built of parts.

Each thing is drawn around the middle of its place in local coordinates (-1..1, y down) and fills it, so that its
silhouette tells it apart at 16 x 16 latent cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from finetune.toybox.canvas import RGB, Canvas, Point, box, darker, ellipse, lighter

BLACK: RGB = (24, 24, 32)
GLASS: RGB = (190, 225, 245)
CREAM: RGB = (250, 240, 215)
BROWN: RGB = (120, 75, 45)


def draw_car(canvas: Canvas, colour: RGB) -> None:
    canvas.shape([(-0.55, -0.05), (-0.33, -0.58), (0.36, -0.58), (0.66, -0.05)], colour)
    canvas.shape([(-0.36, -0.1), (-0.23, -0.42), (-0.03, -0.42), (-0.03, -0.1)], GLASS)
    canvas.shape([(0.1, -0.1), (0.1, -0.42), (0.28, -0.42), (0.44, -0.1)], GLASS)
    canvas.shape(box(-1.0, -0.12, 1.0, 0.42, 0.18), colour)
    for x in (-0.55, 0.55):
        canvas.shape(ellipse(x, 0.42, 0.28, 0.28), BLACK)
        canvas.shape(ellipse(x, 0.42, 0.11, 0.11), (200, 200, 205), outline=False)


def draw_house(canvas: Canvas, colour: RGB) -> None:
    canvas.shape(box(0.36, -0.86, 0.6, -0.3), darker(colour, 0.3))
    canvas.shape(box(-0.76, -0.2, 0.76, 0.9), colour)
    canvas.shape([(-1.0, -0.18), (0.0, -0.95), (1.0, -0.18)], (92, 62, 58))
    canvas.shape(box(-0.18, 0.3, 0.2, 0.9), BROWN)
    for x in (-0.5, 0.5):
        canvas.shape(box(x - 0.17, 0.05, x + 0.17, 0.4), (255, 245, 170))


def draw_fish(canvas: Canvas, colour: RGB) -> None:
    canvas.shape([(0.38, 0.0), (1.0, -0.56), (0.86, 0.0), (1.0, 0.56)], darker(colour, 0.12))
    canvas.shape([(-0.3, -0.36), (0.06, -0.78), (0.34, -0.3)], darker(colour, 0.12))
    canvas.shape(ellipse(-0.22, 0.0, 0.76, 0.48), colour)
    canvas.shape([(-0.1, 0.08), (0.22, -0.08), (0.2, 0.3)], lighter(colour, 0.45), outline=False)
    canvas.shape(ellipse(-0.6, -0.12, 0.15, 0.15), (255, 255, 255))
    canvas.shape(ellipse(-0.63, -0.12, 0.07, 0.07), BLACK, outline=False)


def draw_cat(canvas: Canvas, colour: RGB) -> None:
    tail: list[Point] = [(0.4, 0.72), (0.78, 0.66), (0.86, 0.2), (0.74, -0.1), (0.94, -0.1), (1.0, 0.3), (0.92, 0.86)]
    canvas.shape([*tail, (0.4, 0.94)], colour)
    canvas.shape(ellipse(0.0, 0.5, 0.55, 0.46), colour)
    for side in (-1, 1):
        canvas.shape([(side * 0.58, -0.2), (side * 0.56, -0.98), (side * 0.08, -0.58)], colour)
    canvas.shape(ellipse(0.0, -0.24, 0.62, 0.5), colour)
    for side in (-1, 1):
        canvas.shape(ellipse(side * 0.26, -0.28, 0.15, 0.17), (240, 255, 200), outline=False)
        canvas.shape(ellipse(side * 0.26, -0.27, 0.06, 0.12), BLACK, outline=False)
        canvas.line([(side * 0.3, -0.02), (side * 0.84, -0.08)], BLACK, 0.8)
    canvas.shape([(-0.09, -0.08), (0.09, -0.08), (0.0, 0.04)], (230, 110, 130))


def draw_boat(canvas: Canvas, colour: RGB) -> None:
    canvas.line([(0.0, 0.4), (0.0, -0.98)], BROWN, 2.2)
    canvas.shape([(0.08, -0.94), (0.84, 0.2), (0.08, 0.2)], CREAM)
    canvas.shape([(-0.08, -0.7), (-0.08, 0.2), (-0.66, 0.2)], CREAM)
    canvas.shape([(-1.0, 0.34), (1.0, 0.34), (0.66, 0.86), (-0.62, 0.86)], colour)


def draw_rocket(canvas: Canvas, colour: RGB) -> None:
    canvas.shape([(-0.22, 0.55), (0.0, 1.08), (0.22, 0.55)], (255, 160, 40))
    for side in (-1, 1):
        canvas.shape([(side * 0.3, 0.0), (side * 0.86, 0.8), (side * 0.28, 0.56)], darker(colour, 0.35))
    side_line = [(0.0, -1.0), (0.24, -0.74), (0.4, -0.36), (0.44, 0.1), (0.32, 0.62)]
    canvas.shape(side_line + [(-x, y) for x, y in reversed(side_line[1:])], colour)
    canvas.shape(ellipse(0.0, -0.22, 0.22, 0.22), GLASS)


def draw_mushroom(canvas: Canvas, colour: RGB) -> None:
    canvas.shape([(-0.24, 0.0), (0.24, 0.0), (0.36, 0.9), (-0.36, 0.9)], CREAM)
    cap = [(math.cos(a), 0.08 - 0.92 * math.sin(a)) for a in (math.pi * i / 24 for i in range(25))]
    canvas.shape([*cap, (-0.7, 0.24), (0.7, 0.24)], colour)
    spot = (170, 170, 180) if min(colour) > 200 else (255, 255, 250)
    for x, y, r in ((-0.45, -0.2, 0.17), (0.08, -0.5, 0.2), (0.52, -0.12, 0.15)):
        canvas.shape(ellipse(x, y, r, r * 0.9), spot, outline=False)


def draw_cup(canvas: Canvas, colour: RGB) -> None:
    canvas.shape(ellipse(0.6, 0.08, 0.4, 0.42), colour)
    canvas.shape(ellipse(0.6, 0.08, 0.2, 0.22), lighter(colour, 0.75))
    canvas.shape([(-0.8, -0.62), (0.56, -0.62), (0.44, 0.8), (-0.68, 0.8)], colour)
    canvas.shape(ellipse(-0.12, -0.62, 0.68, 0.2), (88, 52, 32))


NOUNS: dict[str, Callable[[Canvas, RGB], None]] = {
    "car": draw_car,
    "house": draw_house,
    "fish": draw_fish,
    "cat": draw_cat,
    "boat": draw_boat,
    "rocket": draw_rocket,
    "mushroom": draw_mushroom,
    "cup": draw_cup,
}


@dataclass(frozen=True)
class Build:
    """How a toy is put together: what makes it this toy and no other."""

    body: str
    eyes: str
    top: str
    limbs: str
    pattern: str = "plain"


BODIES = ("round", "square", "bell", "egg", "hexagon")
EYES = ("one", "two", "sleepy")
TOPS = ("none", "antenna", "ears", "horns")
LIMBS = ("feet", "wheels", "arms")
PATTERNS = ("plain", "belly", "stripes", "halves", "spots", "bands")


def _body(kind: str) -> list[Point]:
    match kind:
        case "round":
            return ellipse(0.0, 0.08, 0.66, 0.6)
        case "square":
            return box(-0.62, -0.5, 0.62, 0.66, 0.12)
        case "bell":
            return [(-0.24, -0.58), (0.24, -0.58), (0.42, -0.3), (0.74, 0.66), (-0.74, 0.66), (-0.42, -0.3)]
        case "egg":
            return [(x * (0.9 + 0.22 * y), y) for x, y in ellipse(0.0, 0.05, 0.56, 0.66)]
        case "hexagon":
            return [(-0.72, 0.08), (-0.38, -0.52), (0.38, -0.52), (0.72, 0.08), (0.38, 0.68), (-0.38, 0.68)]
    raise ValueError(f"unknown toy body {kind!r}: one of {', '.join(BODIES)}")


def _pattern(kind: str) -> list[list[Point]]:
    """Shapes of the second colour; each is wider than a latent cell (4 of 64 pixels) at every size of the world."""
    match kind:
        case "plain":
            return []
        case "belly":
            return [ellipse(0.0, 0.46, 0.36, 0.3)]
        case "stripes":
            return [box(x - 0.14, -1.0, x + 0.14, 1.0) for x in (-0.48, 0.0, 0.48)]
        case "bands":
            return [box(-1.0, y, 1.0, y + 0.24) for y in (-0.66, -0.06, 0.36)]
        case "halves":
            return [box(0.0, -1.0, 1.0, 1.0)]
        case "spots":
            return [ellipse(x, y, 0.19, 0.19) for x, y in ((-0.4, 0.36), (0.06, 0.5), (0.46, 0.28), (-0.36, -0.34))]
    raise ValueError(f"unknown toy pattern {kind!r}: one of {', '.join(PATTERNS)}")


def _draw_limbs(canvas: Canvas, kind: str, colour: RGB) -> None:
    for side in (-1, 1):
        if kind == "wheels":
            canvas.shape(ellipse(side * 0.44, 0.74, 0.26, 0.26), BLACK)
            canvas.shape(ellipse(side * 0.44, 0.74, 0.1, 0.1), (215, 215, 220), outline=False)
        else:
            canvas.shape(box(side * 0.3 - 0.16, 0.5, side * 0.3 + 0.16, 0.94, 0.1), darker(colour, 0.2))
        if kind == "arms":
            canvas.shape(ellipse(side * 0.82, 0.02, 0.3, 0.13, side * -38), darker(colour, 0.2))


def _draw_top(canvas: Canvas, kind: str, colour: RGB) -> None:
    if kind == "antenna":
        canvas.line([(0.0, -0.4), (0.0, -0.84)], BLACK, 2.2)
        canvas.shape(ellipse(0.0, -0.86, 0.16, 0.16), colour)
    for side in (-1, 1):
        if kind == "ears":
            canvas.shape(ellipse(side * 0.46, -0.56, 0.26, 0.26), colour)
        if kind == "horns":
            canvas.shape([(side * 0.14, -0.42), (side * 0.52, -0.98), (side * 0.54, -0.24)], colour)


def _draw_eyes(canvas: Canvas, kind: str) -> None:
    white: RGB = (255, 255, 255)
    if kind == "one":
        canvas.shape(ellipse(0.0, -0.08, 0.27, 0.27), white)
        canvas.shape(ellipse(0.0, -0.06, 0.12, 0.12), BLACK, outline=False)
        return
    for side in (-1, 1):
        canvas.shape(ellipse(side * 0.25, -0.1, 0.18, 0.2), white)
        if kind == "two":
            canvas.shape(ellipse(side * 0.22, -0.08, 0.09, 0.1), BLACK, outline=False)
        else:
            canvas.shape(box(side * 0.25 - 0.17, -0.3, side * 0.25 + 0.17, -0.08), BLACK, outline=False)


def draw_toy(canvas: Canvas, build: Build, colour: RGB, second: RGB) -> None:
    """A toy: limbs and top behind, then the body with its pattern, then the eyes."""
    _draw_limbs(canvas, build.limbs, colour)
    _draw_top(canvas, build.top, second if build.pattern != "plain" else colour)
    canvas.patterned(_body(build.body), colour, _pattern(build.pattern), second)
    _draw_eyes(canvas, build.eyes)
