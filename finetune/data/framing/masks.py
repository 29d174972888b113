"""Masks: which part of a picture is trained. White is, black is not, grey in part.

A mask is a picture file of its own (in a folder of masks, or named by the data's table), or the picture's own alpha
channel: an example whose mask is its own file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ImageChops

from finetune.data.examples import Example
from finetune.data.framing.geometry import Geometry
from finetune.data.reading import pictures
from finetune.data.reading.partners import Partners, alike
from finetune.data.reading.pictures import BadPicture, printable

if TYPE_CHECKING:
    from torch import Tensor

Levels = NDArray[np.uint8]
"""(height, width): 255 is trained, 0 is not"""
WHITE = 128
"""The least that a mask's brightest pixel must be: masks of 0 and 1 look black, and are."""


def attach(examples: Sequence[Example], folder: Path | None, alpha: bool) -> tuple[list[Example], list[str]]:
    """The examples with their masks, and what is wrong with those: missing, unreadable, of another shape, all black.

    A mask has its picture's stem, whatever kind of picture it is; `a.jpg.png` tells the one of `a.jpg` from that of
    `a.png`. One that the example has already stays. With `alpha`, what has none otherwise takes its own transparency;
    opaque pictures are trained whole. Raises Fault when the folder cannot be listed.
    """
    partners = Partners(folder, [example for example in examples if example.mask is None], "mask")
    found, faults = [], []
    for example in examples:
        mask, fault = example.mask, None
        if mask is None and folder is not None:
            mask, fault = partners.of(example)
        if mask is None and alpha and _transparent(example):
            mask, fault = example.path, None
        if mask is None and fault is None and folder is not None and not alpha:
            fault = f"no mask of that name in {printable(folder)}; white is trained, all white trains it whole"
        found.append(replace(example, mask=mask))
        if fault := fault or check(found[-1]):
            faults.append(f"{printable(example.name or example.path.name)}: {fault}")
    return found, faults


def check(example: Example) -> str | None:
    """What is wrong with an example's mask, whatever its crop; None when nothing is, or when it has none."""
    return read(example)[1]


def read(example: Example) -> tuple[Levels | None, str | None]:
    """An example's mask, and what is wrong with it; neither where it has none."""
    if example.mask is None:
        return None, None
    what = "its transparency" if example.mask == example.path else f"its mask {printable(example.mask.name)}"
    try:
        found = levels(example)
    except BadPicture as error:
        return None, f"{what}: {error.reason}"
    facts = example.facts or pictures.decode(example.path)[1]
    (height, width), wanted = found.shape, (facts.height, facts.width)
    if not alike((height, width), wanted):
        turned = " The mask seems to be turned by 90 degrees." if alike((width, height), wanted) else ""
        return found, (
            f"{what} has {width} x {height} pixels, the picture (upright) {facts.width} x {facts.height}: another "
            f"shape.{turned} Save it in the picture's own size"
        )
    if (most := int(found.max())) < WHITE:
        said = "is black all over" if most == 0 else f"is nowhere brighter than {most} of 255"
        return found, f"{what} {said}: nothing of the picture would be trained. White (255) is trained"
    return found, None


def levels(example: Example) -> Levels:
    """The mask as it stands in its file, upright. Raises BadPicture when it cannot be read."""
    assert example.mask is not None
    if example.mask != example.path:
        return np.asarray(pictures.decode(example.mask, "black")[0].convert("L"))
    # What shines through is what a change of the background changes: 255 - alpha, exactly.
    on_white, on_black = (pictures.decode(example.path, behind)[0] for behind in ("white", "black"))
    return 255 - np.asarray(ImageChops.difference(on_white, on_black).getchannel("R"))


def middle(found: Levels) -> tuple[float, float]:
    """The mask's centre of mass (x, y), as shares of width and height."""
    height, width = found.shape
    rows, columns = found.sum(1, dtype=np.float64), found.sum(0, dtype=np.float64)
    x = (columns @ (np.arange(width) + 0.5)) / columns.sum() / width
    y = (rows @ (np.arange(height) + 0.5)) / rows.sum() / height
    return float(x), float(y)


def shown(found: Levels, view: Geometry) -> float:
    """The mean of the mask inside a view, 0 (nothing is trained) to 1."""
    return float(averaged(found, view, (1, 1))[0, 0])


def weights(example: Example, view: Geometry, size: tuple[int, int]) -> Tensor:
    """How much each latent pixel of a view is trained: (1, h, w) float32 in [0, 1], `size` = (h, w).

    The mask goes the picture's way (mirrored, scaled, cropped); a latent pixel gets the exact mean of the mask over
    the area that it stands for.
    """
    assert example.mask is not None
    state = example.mask.stat()
    return _weights(example.path, example.mask, (state.st_mtime_ns, state.st_size), view, size)


@lru_cache(maxsize=1024)
def _weights(path: Path, mask: Path, state: tuple[int, int], view: Geometry, size: tuple[int, int]) -> Tensor:
    import torch

    found = averaged(levels(Example(path, ("",), mask=mask)), view, size)
    return torch.from_numpy(found.astype(np.float32)).clamp(0, 1)[None]


def averaged(found: Levels, view: Geometry, size: tuple[int, int]) -> NDArray[np.float64]:
    """The mask's means in [0, 1] over a grid of `size` = (h, w) equal cells that a view is divided into."""
    seen = found[:, ::-1] if view.mirrored else found
    top, left, bottom, right = view.box
    height, width = found.shape
    first, last = int(top * height), -int(-bottom * height // 1)
    rows = seen[first:last] / 255  # only what the view shows, in float64
    rows = _means(rows, np.linspace(top, bottom, size[0] + 1) * height - first)
    return _means(rows.T, np.linspace(left, right, size[1] + 1) * width).T


def _means(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of rows (N, M) -> (len(edges) - 1, M) over the intervals between edges: row i covers [i, i + 1]."""
    sums = np.concatenate([np.zeros((1, values.shape[1])), values.cumsum(0)])
    edges = edges.clip(0, len(values))
    whole = np.minimum(edges.astype(int), len(values) - 1)
    up_to = sums[whole] + (edges - whole)[:, None] * values[whole]
    means: NDArray[np.float64] = np.diff(up_to, axis=0) / np.diff(edges)[:, None]
    return means


def _transparent(example: Example) -> bool:
    return (example.facts or pictures.decode(example.path)[1]).transparent
