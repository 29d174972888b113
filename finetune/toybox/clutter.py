"""Pictures of nothing in particular: what the autoencoder must also be able to hold.

A user's subject has shapes, patterns and colours that the world never shows. The autoencoder must not be what loses
them, so a part of its training pictures are random polygons, stripes, two-coloured patterns and glowing lines in random
colours.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from finetune.toybox.canvas import SUPERSAMPLING

Random = np.random.Generator
RGB = tuple[int, int, int]


def _colour(random: Random) -> RGB:
    """Any colour, more often a strong one than uniform draws would give."""
    red, green, blue = (int(c) for c in 255 * random.beta(0.6, 0.6, 3))
    return red, green, blue


def _ground(random: Random, full: int) -> Image.Image:
    """A plain ground, or one colour running into another."""
    one, other = np.array(_colour(random)), np.array(_colour(random))
    if random.random() < 0.4:
        return Image.new("RGB", (full, full), tuple(int(c) for c in one))
    axis = np.linspace(0, 1, full)
    angle = random.uniform(0, 2 * np.pi)
    t = np.cos(angle) * axis[:, None] + np.sin(angle) * axis[None, :]
    t = (t - t.min()) / (t.max() - t.min())
    return Image.fromarray((one + (other - one) * t[..., None]).astype(np.uint8))


def _stripes(random: Random, full: int) -> Image.Image:
    """Two colours in turn, bands 3 to 14 of 64 pixels wide, at any angle; or spots, or a chessboard."""
    one, other = np.array(_colour(random)), np.array(_colour(random))
    y, x = np.mgrid[0:full, 0:full] / full * 64
    angle, width = random.uniform(0, np.pi), random.uniform(3, 14)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    kind = random.integers(3)
    if kind == 0:
        inside = np.floor(u / width) % 2 < 1
    elif kind == 1:
        inside = (np.floor(u / width) + np.floor(v / width)) % 2 < 1
    else:
        inside = ((u % (2 * width) - width) ** 2 + (v % (2 * width) - width) ** 2) < (0.65 * width) ** 2
    return Image.fromarray(np.where(inside[..., None], one, other).astype(np.uint8))


def _blob(random: Random, full: int) -> list[tuple[float, float]]:
    """A polygon, from a spiky star to almost a circle."""
    corners = int(random.integers(3, 14))
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + random.uniform(0, 2 * np.pi)
    radius = full * random.uniform(0.08, 0.42) * (1 - random.uniform(0, 0.5) * random.random(corners))
    x, y = random.uniform(0.1 * full, 0.9 * full, 2)
    return list(zip((x + radius * np.cos(angles)).tolist(), (y + radius * np.sin(angles)).tolist(), strict=True))


def clutter(random: Random, size: int = 64) -> Image.Image:
    """One picture, RGB, `size` x `size`."""
    full = size * SUPERSAMPLING
    glowing = random.random() < 0.2
    picture = Image.new("RGB", (full, full), (12, 8, 28)) if glowing else _ground(random, full)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(random.integers(2, 8))):
        points = _blob(random, full)
        edge, width = _colour(random), int(random.uniform(0.6, 3.0) * SUPERSAMPLING * size / 64)
        if not glowing and random.random() < 0.45:
            mask = Image.new("L", picture.size, 0)
            ImageDraw.Draw(mask).polygon(points, fill=255)
            picture.paste(_stripes(random, full), (0, 0), mask)
        elif not glowing:
            draw.polygon(points, fill=_colour(random))
        if glowing or random.random() < 0.6:
            draw.line([*points, *points[:2]], fill=edge, width=width, joint="curve")
    picture = picture.reduce(SUPERSAMPLING)
    if glowing:
        halo = np.asarray(picture.filter(ImageFilter.GaussianBlur(size / 28)), dtype=np.float32)
        picture = Image.fromarray(np.clip(np.asarray(picture) + 0.6 * halo, 0, 255).astype(np.uint8))
    return picture
