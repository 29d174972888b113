"""finetune explain: how a picture comes to be: noised, denoised, and where each word of the prompt is looked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.commands import drawing
from finetune.commands.drawing import Drawing
from finetune.errors import Fault

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from finetune.families import Family

FAINT = 0.2
"""Of the light that is left where a word is not attended to"""


@dataclass(frozen=True)
class Config(Drawing):
    """Draw a film strip: a picture and how noise covers it; how the model finds it in noise; and, for each word of the
    prompt, where the model attends to it while it does (lit)."""

    prompt: str = ""
    """What to draw."""
    scale: tuple[float, ...] = (1.0,)
    """Strength of the adapters: one number for all, or one each."""
    seed: int = 0
    """Seed of the picture."""
    steps: int = 30
    """Denoising steps."""
    columns: int = 8
    """How many of them are shown."""
    guidance: float = 5.0
    """How strictly the prompt is followed."""
    output: Path = Path("explain.png")
    """PNG file to write."""
    overwrite: bool = False
    """Write over a picture that is there."""


def main(config: Config) -> None:
    # What can be refused is refused before a model is loaded.
    _require_sense(config)
    scales = config.scale * len(config.adapter) if len(config.scale) == 1 else config.scale
    adapters = drawing.told(config.adapter, scales)
    drawing.require_words(config, [config.prompt])

    from finetune import families
    from finetune.pictures import grid, save_png, stacked

    family = drawing.load(config)
    if families.beside(family):
        raise Fault(
            f"the model is a {type(family.pipeline).__name__}, which draws from a picture; a film strip is of one that "
            "is drawn from noise alone, by the base that it was made of."
        )
    drawing.set_scales(family, scales)
    shown = sorted({round(i * (config.steps - 1) / (config.columns - 1)) for i in range(config.columns)})
    picture, given, words = _watch(family, config, shown)
    times, noised = _noised(family, picture, len(shown) + 1)
    above = grid([noised], ["noise is added"], [f"t = {time}" for time in times], config.prompt)
    rows = [[*given, picture], *words.values()]
    labels = [*(f"step {step + 1}" for step in shown), "picture, mean"]
    below = grid(rows, ["noise is taken away", *words], labels)
    facts = {**drawing.facts(config, family), "prompt": config.prompt, "seed": config.seed, "steps": config.steps}
    save_png(stacked([above, below]), config.output, {**facts, "guidance": config.guidance, "adapters": adapters})
    print(config.output)


def _watch(family: Family, config: Config, shown: Sequence[int]) -> tuple[Image, list[Image], dict[str, list[Image]]]:
    """The picture; what the model was given at the shown steps; by word, where it was attended to, and in the mean."""
    import torch

    from finetune import prompting, sampling
    from finetune.watching import watched

    read = prompting.read(family, config.prompt), prompting.read(family, config.negative)
    side = config.size or family.resolution()
    with sampling.drawing(family):
        words = prompting.arguments(family, [read[0]], read[1])
        with watched(family, shown) as seen:
            [picture] = family.pipeline(
                **words,
                generator=[torch.Generator("cpu").manual_seed(config.seed)],
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                height=side,
                width=side,
            ).images
        given = [_decoded(family, seen.given[step]) for step in shown]
    maps = torch.stack([seen.attention[step] for step in shown])
    lit = {}
    for number, (word, tokens) in enumerate(prompting.places(family, config.prompt)):
        heat = maps[:, tokens].sum(1)
        heat = torch.cat([heat, heat.mean(0, keepdim=True)])
        lit[f"{number + 1}. {word}"] = [_lit(picture, one) for one in heat]
    return picture, given, lit


def _noised(family: Family, picture: Image, count: int) -> tuple[list[int], list[Image]]:
    """Timesteps from the picture to noise, and what the VAE makes of its latents there."""
    import torch
    from diffusers import DDPMScheduler

    from finetune import keys, sampling

    schedule = DDPMScheduler.from_config(family.pipeline.scheduler.config)
    times = torch.linspace(0, len(schedule.alphas_cumprod) - 1, count).round().long()
    with sampling.drawing(family):
        pixels = family.pipeline.image_processor.preprocess(picture)
        latents, _ = family.encode_pictures(pixels)
        noise = keys.normal(tuple(latents.shape), 0, "explain").to(latents.device)
        noised = [schedule.add_noise(latents, noise, time[None]) for time in times]
        return times.tolist(), [picture, *(_decoded(family, one) for one in noised[1:])]


def _decoded(family: Family, latents: Tensor) -> Image:
    """What the VAE makes of latents in the scale that the denoiser works in."""
    vae: Any = family.pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    pixels = vae.decode(latents / vae.config.scaling_factor + shift).sample
    [picture] = family.pipeline.image_processor.postprocess(pixels, "pil")
    return picture


def _lit(picture: Image, heat: Tensor) -> Image:
    """The picture, light where there is most of the heat and dim where least."""
    import numpy as np
    from PIL import Image as Images

    low, high = heat.min(), heat.max()
    share = ((heat - low) / (high - low).clamp(min=1e-12)).cpu().numpy()
    light = np.asarray(Images.fromarray(share.astype(np.float32)).resize(picture.size, Images.Resampling.BICUBIC))
    pixels = np.asarray(picture) * (FAINT + (1 - FAINT) * light.clip(0, 1)[..., None])
    return Images.fromarray(pixels.round().astype(np.uint8))


def _require_sense(config: Config) -> None:
    drawing.require_sense(config, [config.prompt] if config.prompt else [], config.scale)
    if config.init is not None:
        raise Fault("--init: a film strip is of a picture that is drawn from noise.")
    if config.output.suffix.lower() != ".png":
        raise Fault(f"--output {config.output}: a PNG file to write, e.g. explain.png.")
    if config.output.exists() and not config.overwrite:
        raise Fault(f"{config.output}: it is there already. Name another --output, or give --overwrite.")
    for name in ("steps", "columns"):
        if getattr(config, name) < 2:
            raise Fault(f"--{name} {getattr(config, name)}: at least 2.")
    if config.seed < 0:
        raise Fault(f"--seed {config.seed}: a seed is 0 or more.")
