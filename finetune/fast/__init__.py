"""The fast path: the same loss and gradients in less time and less memory. `--no-fast` goes without.

Layers are given another class, a subclass of their own with another forward pass. Their parameters, their names, and
what PEFT and diffusers do with them stay as they are, so that nothing has to be taken off again.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from finetune import families
from finetune.families import Family
from finetune.fast import allocation, attention, convolution, lora, precision, recompute, rows

FASTER: tuple[Any, ...] = (
    lora.Linear,
    lora.Conv2d,
    convolution.Conv2d,
    attention.Attention,
    rows.BasicTransformerBlock,
    recompute.LayerNorm,
    recompute.GEGLU,
    recompute.ResnetBlock2D,
)
"""Each says by `fits` which layers of the class that it is made of it can stand for."""


def put_on(family: Family) -> None:
    """Let the denoiser and the text encoders that are there compute by the fast path."""
    allocation.keep()
    for part in (families.denoiser(family), *families.text_encoders(family).values()):
        faster(part)


def faster(part: nn.Module) -> None:
    """Let a part compute by the fast path; in its own precision where it carries an adapter."""
    known = {kind.__base__: kind for kind in FASTER}
    for layer in part.modules():
        kind = known.get(type(layer))
        if kind is not None and kind.fits(layer):
            layer.__class__ = kind
    if _is_adapted(part):
        precision.keep(part)


def _is_adapted(part: nn.Module) -> bool:
    """Whether an adapter is on it, all of which is computed by the fast path."""
    adapted = [layer for layer in part.modules() if isinstance(layer, BaseTunerLayer)]
    return bool(adapted) and all(type(layer) in FASTER for layer in adapted)
