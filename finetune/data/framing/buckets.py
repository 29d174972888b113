"""Aspect-ratio buckets: the size that a picture is trained at, near its own aspect ratio and never enlarged too far."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from finetune.data.framing import geometry
from finetune.errors import Fault
from finetune.settings import Framing

MAX_ASPECT = 4
"""No bucket is longer than four times its width: SDXL, the widest trained, ends there (Podell et al. 2023, app. I)."""
SHARPNESS = 4
"""How many times more a share that is cropped away weighs than a share of the pixels, where a small picture needs a
smaller bucket."""

Sizes = NDArray[np.int64]
"""(N, 2): heights and widths"""


class Unfit(Fault):
    """A picture that cannot be trained at a resolution, why, and what can be done. The reason names no file."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.advice = advice


def bucket(original: tuple[int, int], resolution: int, multiple: int, framing: Framing) -> tuple[int, int]:
    """Height and width that a picture (height, width) is trained at, each a multiple of `multiple`.

    Of the full-size buckets (`full`) the one that keeps most of the picture. Where that would enlarge it beyond
    `max_upscale`: of all sizes that would not, the one that loses least, up to half the side of the resolution.

    Of a picture no longer than 4:1 a bucket always keeps at least this share (found by going through all aspects; the
    second figure is that of pictures too small for a full-size bucket):

        resolution (multiple)   512 (64)   768 (64)   1024 (64)   1024 (32)   64 (32, the toybox)
        share                   85, 83 %   90, 88 %   92, 91 %    96, 95 %    57, 50 %

    Raises Unfit when the picture is too small for any, or when less than `min_kept` of it would be kept.
    """
    require_multiple(resolution, multiple)
    target = _of_full_size(original, resolution, multiple, framing) or _smaller(original, resolution, multiple, framing)
    if target is None:
        raise _too_small(original, resolution, multiple, framing.max_upscale)
    kept = geometry.centre(original, target).kept
    if kept < framing.min_kept:
        raise _too_little(original, target, kept, framing)
    return target


@lru_cache
def full(resolution: int, multiple: int, square: bool = False) -> tuple[tuple[int, int], ...]:
    """The buckets (height, width) of full size: for each height the widest that has no more pixels than the square,
    and the same turned; none longer than 4:1. With `square`, the square alone."""
    side = resolution // multiple * multiple
    found = {(side, side)}
    for height in range(multiple, resolution**2 // multiple + 1, multiple):
        width = resolution**2 // height // multiple * multiple
        if not square and width and max(height, width) <= MAX_ASPECT * min(height, width):
            found |= {(height, width), (width, height)}
    return tuple(sorted(found))


def require_multiple(resolution: int, multiple: int) -> None:
    """Raise Fault when the model cannot be trained at this resolution."""
    if resolution < multiple or resolution % multiple:
        lower = resolution // multiple * multiple
        near = " or ".join(str(side) for side in (lower, lower + multiple) if side > 0) or str(multiple)
        raise Fault(f"--resolution {resolution}: this model's sides are multiples of {multiple}. Nearest: {near}.")


def _of_full_size(
    original: tuple[int, int], resolution: int, multiple: int, framing: Framing
) -> tuple[int, int] | None:
    """The full-size bucket that keeps most; None when the picture is too small for it."""
    sizes = np.array(full(resolution, multiple, not framing.buckets))
    best = sizes[np.argmax(_kept(original, sizes))]
    return _pair(best) if _filled(original, best[None], framing.max_upscale)[0] else None


def _smaller(original: tuple[int, int], resolution: int, multiple: int, framing: Framing) -> tuple[int, int] | None:
    """The size that loses least of those that the picture fills; None when it would have less than half the side."""
    if math.prod(original) * framing.max_upscale**2 < (resolution / 2) ** 2:
        return None
    sizes = _all(resolution, multiple, not framing.buckets)
    sizes = sizes[_filled(original, sizes, framing.max_upscale)]
    if not len(sizes):
        return None
    return _pair(sizes[np.argmax(_kept(original, sizes) ** SHARPNESS * sizes.prod(1))])


@lru_cache
def _all(resolution: int, multiple: int, square: bool) -> Sizes:
    """Every size with no more pixels than the square, none longer than 4:1."""
    sides = np.arange(1, MAX_ASPECT * resolution // multiple + 1) * multiple
    sizes = np.stack(np.meshgrid(sides, sides, indexing="ij"), -1).reshape(-1, 2)
    known = (sizes.prod(1) <= resolution**2) & (sizes.max(1) <= (1 if square else MAX_ASPECT) * sizes.min(1))
    return sizes[known]


def _kept(original: tuple[int, int], sizes: Sizes) -> NDArray[np.float64]:
    """(N,): the share of the picture that each size keeps."""
    longer = original[1] / original[0] * sizes[:, 0] / sizes[:, 1]
    return np.minimum(longer, 1 / longer)


def _filled(original: tuple[int, int], sizes: Sizes, max_upscale: float) -> NDArray[np.bool_]:
    """(N,): whether the picture covers each size when it is enlarged no further than `max_upscale`."""
    fits: NDArray[np.bool_] = np.all(sizes <= np.array(original) * (max_upscale * (1 + 1e-9)), axis=1)
    return fits


def _pair(size: NDArray[np.int64]) -> tuple[int, int]:
    return int(size[0]), int(size[1])


def _too_small(original: tuple[int, int], resolution: int, multiple: int, max_upscale: float) -> Unfit:
    height, width = original
    least = max(resolution / 2 / math.sqrt(height * width), multiple / min(original))
    return Unfit(
        f"{width} x {height} pixels are too few for --resolution {resolution}: even at the smallest size they would be "
        f"enlarged x{math.ceil(least * 100) / 100:.2f}, more than --max-upscale {max_upscale:g}",
        "Give larger pictures, a lower --resolution or a higher --max-upscale.",
    )


def _too_little(original: tuple[int, int], target: tuple[int, int], kept: float, framing: Framing) -> Unfit:
    return Unfit(
        f"{original[1]} x {original[0]} pixels cut to {target[1]} x {target[0]} keep {kept:.0%} of the picture, less "
        f"than --min-kept {framing.min_kept:g}",
        f"Crop what is too long{'' if framing.buckets else ', or train with --buckets'}, or give a lower --min-kept.",
    )
