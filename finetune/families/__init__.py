"""Model families, known by the checkpoint's own pipeline class.

Adding one: write its file, add its line to `FAMILIES` (see CONTRIBUTING.md).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline

from finetune import offload
from finetune.errors import Fault
from finetune.families import quantized
from finetune.families.base import (
    BESIDE,
    Conditions,
    Family,
    TakesTokens,
    aside,
    beside,
    blocks,
    chunks,
    denoiser,
    encode_sources,
    freeze,
    keys_values,
    modules,
    sibling,
    takes_mask,
    takes_source,
    text_encoders,
    tokenizers,
    zeroed,
)
from finetune.families.flux import Flux
from finetune.families.flux2_klein import Flux2Klein
from finetune.families.sd import StableDiffusion
from finetune.families.sd3 import StableDiffusion3
from finetune.families.sdxl import StableDiffusionXL
from finetune.families.source import Source
from finetune.families.z_image import ZImage

__all__ = [
    "BESIDE",
    "EDITING",
    "FAMILIES",
    "INPAINTING",
    "KNOWN",
    "Conditions",
    "Family",
    "Source",
    "TakesTokens",
    "aside",
    "beside",
    "blocks",
    "chunks",
    "denoiser",
    "encode_sources",
    "freeze",
    "keys_values",
    "known",
    "load",
    "modules",
    "quantized",
    "release",
    "restore",
    "sibling",
    "takes_mask",
    "takes_source",
    "text_encoders",
    "tokenizers",
    "wrap",
    "zeroed",
]

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "Flux2KleinPipeline": Flux2Klein,
    "ZImagePipeline": ZImage,
}
INPAINTING: dict[str, type[Family]] = {
    "StableDiffusionInpaintPipeline": StableDiffusion,
    "StableDiffusionXLInpaintPipeline": StableDiffusionXL,
}
"""Checkpoints whose denoiser takes a mask and the masked picture beside the noise. Their adapters fit the family's."""
EDITING: dict[str, type[Family]] = {
    "StableDiffusionInstructPix2PixPipeline": StableDiffusion,
    "StableDiffusionXLInstructPix2PixPipeline": StableDiffusionXL,
}
"""Checkpoints that are told a picture, and change it as a prompt says."""
KNOWN = {**FAMILIES, **INPAINTING, **EDITING}


def wrap(pipeline: DiffusionPipeline) -> Family:
    """The family of a pipeline that is in memory already."""
    made: Any = known(type(pipeline).__name__)
    family: Family = made(pipeline)
    return family


def load(source: Source, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Family:
    """The base model on the device, frozen, every weight finite, in the given precision (the VAE in float32), or
    quantised where the source says so.

    Raises Fault when it cannot be found or read, is of an unknown family, or holds NaN or infinite weights.
    """
    _require_reading(known(source.pipeline_class()), source)
    family = wrap(source.load(dtype))
    _set_reading(family, source)
    if source.quantize:
        quantized.quantize(family, source.quantize, device)
    if source.offload_blocks:
        offload.put_on(denoiser(family), blocks(family), device)
    if source.cache_kv:
        offload.rest(keys_values(family), device)
    family.pipeline.to(device)
    freeze(family)
    return family


def _require_reading(made: type[Family], source: Source) -> None:
    """Refuse what the family's text encoders are not asked. Needs no weights."""
    own: int | None = getattr(made, "own_layer", None)
    for flag, value in (("clip-skip", source.clip_skip), ("text-chunks", source.text_chunks)):
        if value is not None and own is None:
            raise Fault(
                f"--{flag} {value}: {made.title} has no such thing: its text encoders read sentences of one length. "
                "Stable Diffusion 1.x, 2.x and XL have. Leave it out."
            )
    if own is not None and source.clip_skip is not None and source.clip_skip < own:
        raise Fault(
            f"--clip-skip {source.clip_skip}: {made.title} is made for layer {own} of its text encoders, counted "
            f"from the end: {own} skips nothing, {own + 1} one layer more."
        )
    if source.text_chunks is not None and source.text_chunks < 1:
        raise Fault(f"--text-chunks {source.text_chunks}: at least 1; 3 is kohya's --max_token_length 225.")


def _set_reading(family: Family, source: Source) -> None:
    """Raises Fault where the text encoders do not have so many layers."""
    if isinstance(family, TakesTokens):
        encoders: dict[str, Any] = text_encoders(family)
        layers = min(encoder.config.num_hidden_layers for encoder in encoders.values())
        if (source.clip_skip or 1) > layers + 1:  # before the first layer there are the embeddings
            raise Fault(f"--clip-skip {source.clip_skip}: the model's text encoders have {layers} layers.")
        family.clip_skip = source.clip_skip or family.own_layer
        family.chunks = source.text_chunks or 1


def release(family: Family, *names: str) -> None:
    """Drop parts of the pipeline from memory; `restore` brings them back from the source."""
    family.pipeline.register_modules(**{name: None for name in names})


def restore(family: Family, source: Source, dtype: torch.dtype = torch.float32) -> None:
    """Load again, frozen, the parts that were released; what is held (and may have been trained) stays as it is."""
    parts = family.pipeline.components
    missing = [name for name, part in parts.items() if part is None]
    if set(missing) <= set(family.pipeline._optional_components):
        return
    fresh = source.load(dtype, {name: part for name, part in parts.items() if part is not None})
    family.pipeline.register_modules(**{name: fresh.components[name] for name in missing})
    if source.quantize:
        quantized.quantize(family, source.quantize, next(denoiser(family).parameters()).device, missing)
    for name in missing:
        if isinstance(fresh.components[name], torch.nn.Module):
            fresh.components[name].requires_grad_(False).eval()


def known(pipeline_class: str) -> type[Family]:
    """The family of pipelines of this class. Raises Fault for those that are of none."""
    try:
        return KNOWN[pipeline_class]
    except KeyError:
        raise Fault(
            f"the model is a {pipeline_class}, which this version cannot train. Known are: {', '.join(FAMILIES)}."
        ) from None
