"""The training pictures on disk: drawn once by worker processes, kept as plain arrays, read through memory maps."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.toybox import world
from finetune.toybox.clutter import clutter

CHUNK = 500

Draw = Callable[[int, int], np.ndarray]


def draw_world(seed: int, index: int) -> np.ndarray:
    return np.asarray(world.render(world.spec_at(seed, index)))


def draw_motley(seed: int, index: int) -> np.ndarray:
    return np.asarray(world.render(world.motley_spec(np.random.default_rng([seed, index, 1]))))


def draw_clutter(seed: int, index: int) -> np.ndarray:
    return np.asarray(clutter(np.random.default_rng([seed, index, 2])))


def _chunk(draw: Draw, seed: int, start: int, stop: int) -> np.ndarray:
    return np.stack([draw(seed, index) for index in range(start, stop)])


def drawn(path: Path, draw: Draw, seed: int, count: int, workers: int = 2) -> np.ndarray:
    """`count` pictures, (count, 64, 64, 3) uint8; drawn now if the file is not there or has fewer."""
    if path.exists() and len(pictures := np.load(path, mmap_mode="r")) >= count:
        return pictures[:count]
    beside = path.with_suffix(".partial")
    starts = range(0, count, CHUNK)
    stops = [min(count, start + CHUNK) for start in starts]
    array = np.lib.format.open_memmap(beside, mode="w+", dtype=np.uint8, shape=(count, 64, 64, 3))
    with ProcessPoolExecutor(workers) as pool:
        for start, stop, part in zip(starts, stops, pool.map(partial(_chunk, draw, seed), starts, stops), strict=True):
            array[start:stop] = part
    array.flush()
    del array
    os.replace(beside, path)
    return np.load(path, mmap_mode="r")


def sheet(pictures: list[Image.Image], columns: int, zoom: int = 2) -> Image.Image:
    """Pictures side by side, for looking at."""
    size = pictures[0].width * zoom + 4
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * size, rows * size), "white")
    for i, picture in enumerate(pictures):
        big = picture.resize((size - 4, size - 4), Image.Resampling.NEAREST)
        page.paste(big, (i % columns * size, i // columns * size))
    return page
