"""A checkpoint whose denoiser is told more: further input channels, zero at first, so that it predicts as before."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from finetune import families
from finetune.errors import Fault
from finetune.families.base import Family


def inpainting(family: Family) -> Family:
    """An inpainting checkpoint that is still to be trained: it draws as the family's own does, and heeds no mask yet.

    As Stable Diffusion's were begun (Rombach et al. 2021, 2112.10752, and the card of stable-diffusion-inpainting):
    input channels for the mask and the masked picture, whose weights are zero. Its other parts are the given one's.
    Raises Fault for a family that has none, and for a checkpoint that is one.
    """
    kind = next((kind for kind, known in families.INPAINTING.items() if isinstance(family, known)), None)
    if kind is None or families.takes_mask(family):
        given = type(family.pipeline).__name__
        raise Fault(f"an inpainting checkpoint is made of a plain one of SD 1.x, 2.x or XL; this is a {given}.")
    pipeline: Any = family.pipeline
    unet = _widened(pipeline.unet, 1 + family.latents()[0])
    parts = {**pipeline.components, "unet": unet}
    made = families.wrap(families.sibling(_Parts(pipeline, parts), getattr(diffusers, kind)))
    families.freeze(made)
    return made


class _Parts:
    """The components and the settings that a pipeline is made of."""

    def __init__(self, pipeline: Any, components: dict[str, Any]) -> None:
        self.config, self.components = pipeline.config, components


def _widened(unet: Any, more: int) -> Any:
    """The same UNet with so many further input channels, whose weights are zero."""
    with torch.device("meta"):
        made = type(unet).from_config(unet.config, in_channels=unet.config.in_channels + more)
    weights = dict(unet.state_dict())
    old = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([old, old.new_zeros(old.shape[0], more, *old.shape[2:])], dim=1)
    made.load_state_dict(weights, assign=True)
    return made
