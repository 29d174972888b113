"""The places of the world: six backgrounds, each with colours and large shapes of its own.

A scene is drawn in picture coordinates (0..1, y down). Its small details (clouds, flowers, bubbles) come from the
generator that is handed in.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from finetune.toybox.canvas import INKS, RGB, Canvas, box, ellipse

Random = np.random.Generator


def beach(canvas: Canvas, random: Random) -> None:
    sea, sand = 0.36 + random.uniform(-0.04, 0.04), 0.56 + random.uniform(-0.04, 0.04)
    canvas.shape(box(-0.1, -0.1, 1.1, 1.1), (150, 210, 250), outline=False)
    canvas.shape(ellipse(random.uniform(0.1, 0.9), random.uniform(0.1, 0.18), 0.09, 0.09), (255, 225, 90))
    canvas.shape(box(-0.1, sea, 1.1, 1.1), (30, 120, 190))
    canvas.shape(box(-0.1, sand, 1.1, 1.1), (238, 206, 140))


def snow(canvas: Canvas, random: Random) -> None:
    canvas.shape(box(-0.1, -0.1, 1.1, 1.1), (176, 192, 214), outline=False)
    for x in (random.uniform(0.02, 0.14), random.uniform(0.86, 0.98)):
        canvas.shape([(x - 0.13, 0.62), (x, random.uniform(0.1, 0.24)), (x + 0.13, 0.62)], (60, 105, 95))
    canvas.shape(ellipse(random.uniform(0.2, 0.8), 1.12, 1.1, 0.56), (240, 245, 252))
    for x, y in random.uniform(0.03, 0.97, (12, 2)):
        canvas.shape(ellipse(x, y * 0.55, 0.016, 0.016, points=8), (255, 255, 255), outline=False)


def meadow(canvas: Canvas, random: Random) -> None:
    canvas.shape(box(-0.1, -0.1, 1.1, 1.1), (196, 232, 250), outline=False)
    for x in (random.uniform(0.0, 0.35), random.uniform(0.6, 1.0)):
        canvas.shape(ellipse(x, random.uniform(0.1, 0.2), 0.16, 0.06), (255, 255, 255))
    canvas.shape(ellipse(random.uniform(0.1, 0.9), 1.0, 1.2, 0.55), (150, 205, 90))
    for x, y in random.uniform(0.04, 0.96, (7, 2)):
        petal: RGB = (255, 240, 120) if x < 0.5 else (255, 250, 250)
        canvas.shape(ellipse(x, 0.68 + 0.3 * y, 0.022, 0.022, points=10), petal, outline=False)


def night(canvas: Canvas, random: Random) -> None:
    canvas.shape(box(-0.1, -0.1, 1.1, 1.1), (22, 26, 66), outline=False)
    moon = random.uniform(0.12, 0.88)
    canvas.shape(ellipse(moon, 0.15, 0.09, 0.09), (250, 246, 205), outline=False)
    for x, y in random.uniform(0.03, 0.97, (14, 2)):
        canvas.shape(ellipse(x, y * 0.6, 0.013, 0.013, points=8), (255, 255, 240), outline=False)
    canvas.shape(ellipse(random.uniform(0.2, 0.8), 1.1, 1.1, 0.42), (40, 46, 58))


def water(canvas: Canvas, random: Random) -> None:
    canvas.shape(box(-0.1, -0.1, 1.1, 1.1), (24, 130, 160), outline=False)
    canvas.shape(box(-0.1, -0.1, 1.1, 0.14), (90, 200, 210), outline=False)
    canvas.shape(ellipse(random.uniform(0.2, 0.8), 1.14, 1.0, 0.34), (176, 160, 120))
    for x in (random.uniform(0.03, 0.14), random.uniform(0.86, 0.97)):
        height = random.uniform(0.35, 0.55)
        canvas.shape([(x - 0.06, 0.92), (x + 0.02, height), (x + 0.06, 0.92)], (20, 100, 70))
    for x, y in random.uniform(0.05, 0.95, (6, 2)):
        canvas.shape(ellipse(x, y * 0.8, 0.028, 0.028, points=12), (150, 225, 235), outline=False)


def room(canvas: Canvas, random: Random) -> None:
    floor = 0.66 + random.uniform(-0.04, 0.04)
    canvas.shape(box(-0.1, -0.1, 1.1, 1.1), (228, 196, 176), outline=False)
    left = random.choice([0.06, 0.64]) + random.uniform(-0.03, 0.03)
    canvas.shape(box(left, 0.08, left + 0.3, 0.42), (140, 200, 245))
    canvas.line([(left + 0.15, 0.08), (left + 0.15, 0.42)], (110, 70, 50), 1.6)
    canvas.line([(left, 0.25), (left + 0.3, 0.25)], (110, 70, 50), 1.6)
    canvas.shape(box(-0.1, floor, 1.1, 1.1), (150, 92, 60))
    for y in (floor + 0.12, floor + 0.24):
        canvas.line([(-0.1, y), (1.1, y)], (118, 70, 46), 1.0)


SCENES: dict[str, Callable[[Canvas, Random], None]] = {
    "on the beach": beach,
    "in the snow": snow,
    "in a meadow": meadow,
    "at night": night,
    "under water": water,
    "in a room": room,
}


def draw_scene(scene: str, style: str, detail: int, size: int) -> Image.Image:
    """A background of `size` pixels, RGB."""
    canvas = Canvas(size, INKS[style], x=0.0, y=0.0, scale=1.0)
    SCENES[scene](canvas, np.random.default_rng(detail))
    picture = canvas.finished().convert("RGB")
    if style != "photo":
        return picture
    # A photo's light falls off towards the bottom; a cartoon's colours are flat.
    light = np.linspace(1.06, 0.84, size, dtype=np.float32)[:, None, None]
    return Image.fromarray(np.clip(np.asarray(picture) * light, 0, 255).astype(np.uint8))
