"""Weights in bfloat16 that go on learning: what a step leaves is rounded up or down by chance."""

from __future__ import annotations

import torch
from torch import Tensor

LOW_BITS = 16
"""bfloat16 is float32 without its low bits."""


def stochastic(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, to the neighbour above or below, so that the mean over draws is the value itself.

    Gupta et al. 2015, 1502.02551, section 3; for weights in bfloat16, Zamirai et al. 2020, 2010.06192, section 4.
    Rounded to the nearest, a weight stays where it is when its steps are smaller than half the distance to a neighbour.

    A random number is added to the bits that are cut off, which carries into those that stay as often as it should.
    `generator`: on the values' device. What is no finite number stays what it is; beyond the largest bfloat16 there is
    no neighbour, and values there become that one.
    """
    draws = torch.randint(0, 1 << LOW_BITS, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = draws.add_(values.view(torch.int32)).bitwise_and_(-1 << LOW_BITS)
    largest = torch.finfo(torch.bfloat16).max
    rounded = bits.view(torch.float32).clamp_(-largest, largest)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
