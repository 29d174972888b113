"""Activations that are computed again in the backward pass instead of kept (Chen et al. 2016, 1604.06174)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune import families
from finetune.errors import Fault
from finetune.families import Family


def check(share: float) -> None:
    if not 0 < share <= 1:
        raise Fault(f"--checkpoint-share {share:g}: more than 0 and at most 1, the share of the denoiser's blocks.")


def put_on(family: Family, share: float = 1.0) -> None:
    """Keep only what goes into a block, of this share of the denoiser's blocks, and of all of the text encoders'.

    The outermost blocks come first: of a UNet those are the largest pictures'; a transformer's are alike.
    """
    denoiser: Any = families.denoiser(family)
    kept = set(_inner(families.blocks(family), share))

    def passed(block: nn.Module, *given: Any) -> Any:
        return block(*given) if block in kept else checkpoint(block, *given, use_reentrant=False)

    denoiser.enable_gradient_checkpointing(passed)
    encoders: list[Any] = list(families.text_encoders(family).values())
    for encoder in encoders:
        encoder.gradient_checkpointing_enable()


def _inner(blocks: list[nn.Module], share: float) -> list[nn.Module]:
    """Those in the middle, which are not of the share."""
    outer = round(len(blocks) * share)
    front = -(-outer // 2)
    return blocks[front : len(blocks) - (outer - front)]
