"""What an inpainting checkpoint is to draw anew: masks drawn from keys, in whole pixels of the latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from finetune import keys

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = 0.25
"""Share of the masks that cover all of a picture, as Stable Diffusion's inpainting checkpoints were trained."""
SIDES = 0.2, 0.7
"""Of a shape, as shares of the picture's; there are one to three, rectangles and ellipses."""


def hole(size: tuple[int, int], *place: keys.Index) -> Tensor:
    """1 where the picture is drawn anew, else 0: (1, h, w), at least one pixel. `place`: what it follows from."""
    import torch

    draw = keys.rng(0, "hole", *place, *size)
    if draw.random() < WHOLE:
        return torch.ones(1, *size)
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    mask = np.zeros(size, dtype=np.float32)
    for _ in range(draw.integers(1, 4)):
        (height, width), (y, x) = draw.uniform(*SIDES, 2) * size / 2, draw.uniform(0, 1, 2) * size
        down, across = abs(rows - y) / max(height, 1), abs(columns - x) / max(width, 1)
        inside = np.maximum(down, across) if draw.random() < 0.5 else np.hypot(down, across)
        mask[inside <= 1] = 1
    return torch.from_numpy(mask)[None] if mask.any() else torch.ones(1, *size)
