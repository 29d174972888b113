"""Pictures drawn by a family's pipeline: the same that plain diffusers draws with the same seed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DDIMScheduler
from PIL.Image import Image
from torch import Tensor, nn

from finetune import families, objective
from finetune.errors import Fault
from finetune.families import Family
from finetune.settings import Loss

FROM_NOISE = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Settings of a scheduler that begins at pure noise, where --zero-terminal-snr trains (Lin et al. 2023, 2305.08891)."""


def sample(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative: str = "",
    steps: int,
    guidance: float,
    size: int | None = None,
    batch: int = 4,
) -> list[Image]:
    """One picture for each (prompt, seed) pair, drawn `batch` at a time.

    Each picture's noise comes from a generator of its own, `torch.Generator("cpu").manual_seed(seed)`: it is the
    picture of plain diffusers with that seed, whatever it is drawn together with (to rounding). Adapters act as they
    are set; the modules' modes are put back. Raises Fault when the size does not fit the model.
    """
    _require_whole(family)
    size = _fitting(family, size or family.resolution())
    pairs = list(zip(prompts, seeds, strict=True))
    pictures: list[Image] = []
    with torch.no_grad(), inference(family), _precision(family):
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            pictures += family.pipeline(
                prompt=[prompt for prompt, _ in part],
                # SDXL takes no negative prompt and an empty one differently; no words mean none, as without the option.
                negative_prompt=[negative] * len(part) if negative else None,
                generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in part],
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=size,
                width=size,
            ).images
    return pictures


def as_trained(family: Family, loss: Loss) -> None:
    """From here on the pipeline draws as it is trained, and says so where it is saved.

    Raises Fault when the model cannot be trained with these settings.
    """
    objective.check(loss, family.objective().prediction)
    if loss.zero_terminal_snr:
        begin_at_noise(family)


def begin_at_noise(family: Family) -> None:
    """Draw from pure noise on: with the model's own scheduler, or DDIM where it cannot (PNDM, say)."""
    own = family.pipeline.scheduler
    knows = FROM_NOISE.keys() <= inspect.signature(type(own).__init__).parameters.keys()
    family.pipeline.scheduler = (type(own) if knows else DDIMScheduler).from_config(own.config, **FROM_NOISE)


@contextmanager
def inference(family: Family) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each in the mode it was in."""
    modes = [(part, part.training) for module in families.modules(family).values() for part in module.modules()]
    try:
        for module in families.modules(family).values():
            module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _precision(family: Family) -> Iterator[None]:
    """Autocast when denoiser and text encoders differ (float32 where they train, bf16 where frozen), as in training.

    The VAE decodes in the precision of its own weights, which may be another.
    """
    vae, decode = family.pipeline.vae, family.pipeline.vae.decode

    def in_own_precision(latents: Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast(vae.device.type, enabled=False):
            return decode(latents.to(_dtype(vae)), *args, **options)

    predicting = {_dtype(part) for part in (families.denoiser(family), *families.text_encoders(family).values())}
    lowest = min(predicting, key=lambda dtype: dtype.itemsize)
    vae.decode = in_own_precision
    try:
        with nullcontext() if len(predicting) == 1 else torch.autocast(vae.device.type, dtype=lowest):
            yield
    finally:
        del vae.decode


def _dtype(module: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters())


def _fitting(family: Family, size: int) -> int:
    factor = family.pipeline.vae_scale_factor
    if size < factor or size % factor:
        nearest = max(round(size / factor), 1) * factor
        raise Fault(f"size {size}: this model draws sides that are multiples of {factor}; the nearest is {nearest}.")
    return size


def _require_whole(family: Family) -> None:
    names = ("vae", family.denoiser_name, *family.text_encoder_names)
    released = [name for name in names if getattr(family.pipeline, name) is None]
    if released:
        raise ValueError(f"{', '.join(released)} was released: call families.restore before drawing")
