"""What a picture looks like, in 204 bytes: how sharp it is, and a fingerprint that its near copies share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TILES = 4
"""Sharpness is that of the sharpest of TILES x TILES parts: a background out of focus is no fault."""
BLURRED = 100.0
"""Pictures less sharp than this are said to be blurred.

Measured on 40 photographs of eight subjects and 18 drawn pictures, scaled to 64, 512 and 1024 pixels: as they are, the
least sharp has 333 (1024), 492 (512), 2636 (64). Blurred by a Gaussian of 1.5 pixels, the sharpest has 71 (1024) and
81 (512); at 64 pixels, where 1.5 pixels take more of the structure with them, it takes 2 pixels: 104. A blur of one
pixel is found in half of them; less is not.
"""
NEAR_BITS = 6
"""Pictures whose perceptual hashes differ in at most so many of 64 bits may be near copies.

Measured on the same pictures, of which no two are copies: the two nearest photographs are 14 apart, the two nearest
drawings 10. Copies saved as JPEG at quality 50, at half size, 2 % cropped, with 20 % more brightness or 30 % more
contrast are 2 apart at the median, 6 or less for nine of ten. Copies cropped by 5 % are at 10: not found.
"""
NEAR_COLOURS = 40.0
"""... and whose 8 x 8 thumbnails differ by at most so much (root mean square, of 255): the hash knows no colours.

The copies above differ by up to 34.
"""
WAVES = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1))
"""The lowest of the cosines in 32 pixels, (8, 32)"""


@dataclass(frozen=True)
class Look:
    """One picture's measures."""

    sharpness: float
    """Variance of the Laplacian of the grey values 0 .. 255 at training size, in the sharpest tile"""
    hash: int
    """64 bits, see `_hash`"""
    thumb: bytes
    """8 x 8 pixels RGB"""


def look(picture: Image.Image, side: int) -> Look:
    """Measure an RGB picture as it is when trained on the area of a square of `side` pixels; it is never enlarged."""
    scale = min(1.0, side / (picture.width * picture.height) ** 0.5)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    small = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    thumb = small.resize((8, 8), Image.Resampling.BOX)
    return Look(sharpness(small.convert("L")), _hash(small), thumb.tobytes())


def _hash(picture: Image.Image) -> int:
    """64 bits: which of the 8 x 8 lowest frequencies of the picture at 32 x 32 pixels, by the cosine transform, are
    above their median. The same as imagehash.phash, for which scipy would be imported."""
    pixels = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    lowest = (WAVES @ pixels @ WAVES.T).round(6)  # of a picture of one colour they are zero
    return int("".join("1" if above else "0" for above in (lowest > np.median(lowest)).ravel()), 2)


def sharpness(grey: Image.Image) -> float:
    """The largest variance of the Laplacian (Pech-Pacheco et al. 2000) among the tiles; 0 below 3 pixels a side."""
    a = np.asarray(grey, dtype=np.float32)
    if min(a.shape) < 3:
        return 0.0
    laplacian = a[:-2, 1:-1] + a[2:, 1:-1] + a[1:-1, :-2] + a[1:-1, 2:] - 4 * a[1:-1, 1:-1]
    rows = np.array_split(laplacian, TILES, axis=0)
    tiles = [tile for row in rows for tile in np.array_split(row, TILES, axis=1) if tile.size]
    return float(max(tile.var() for tile in tiles))


def near(looks: Sequence[Look], block: int = 256) -> list[list[int]]:
    """Groups of two or more pictures that look alike, by number: each is near to at least one other of its group.

    All are compared with all, `block` at a time: 20,000 pictures need 90 MB and seconds.
    """
    alike = defaultdict(list)
    for number, one in enumerate(looks):
        alike[one.hash, one.thumb].append(number)
    firsts = [numbers[0] for numbers in alike.values()]
    groups = _Groups(len(looks))
    for numbers in alike.values():
        groups.join((numbers[0], other) for other in numbers[1:])
    hashes = np.array([looks[i].hash for i in firsts], dtype=np.uint64)
    thumbs = np.frombuffer(b"".join(looks[i].thumb for i in firsts), dtype=np.uint8).reshape(len(firsts), 192)
    for start in range(0, len(firsts), block):
        groups.join((firsts[i], firsts[j]) for i, j in _pairs(hashes, thumbs, start, block))
    return groups.found()


def _pairs(hashes: NDArray[np.uint64], thumbs: NDArray[np.uint8], start: int, block: int) -> Iterable[tuple[int, int]]:
    """Near pairs (i, j), i < j, with i among `block` pictures from `start` on."""
    distance = np.bitwise_count(hashes[start : start + block, None] ^ hashes[None, start:])
    for row, column in np.argwhere(distance <= NEAR_BITS):
        if row < column:
            difference = thumbs[start + row].astype(np.float32) - thumbs[start + column]
            if float(np.sqrt((difference**2).mean())) <= NEAR_COLOURS:
                yield int(start + row), int(start + column)


class _Groups:
    """Sets that grow together (union-find)."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def join(self, pairs: Iterable[tuple[int, int]]) -> None:
        for a, b in pairs:
            low, high = sorted((self._root(a), self._root(b)))
            self.parent[high] = low

    def found(self) -> list[list[int]]:
        members = defaultdict(list)
        for one in range(len(self.parent)):
            members[self._root(one)].append(one)
        return [group for group in members.values() if len(group) > 1]

    def _root(self, one: int) -> int:
        while self.parent[one] != one:
            self.parent[one] = one = self.parent[self.parent[one]]
        return one
