"""The toybox's noise predictor: Stable Diffusion 1.5's UNet at tiny width, trained with its text encoder.

Latent diffusion (Rombach et al. 2022, 2112.10752) predicting the velocity (Salimans & Ho 2022, 2202.00512), with
captions left out at times for classifier-free guidance (Ho & Salimans 2022, 2207.12598).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from finetune import keys
from finetune.objective import Diffusion, loss_per_picture, min_snr_weight
from finetune.toybox import parallel, pictures, stages, text, vae, world
from finetune.toybox.plan import Config

if TYPE_CHECKING:
    from finetune.toybox.judge import Judge

CHANNELS = (48, 64, 72, 72)
LATENT = (4, 16, 16)
SHEET_PROMPTS = [
    f"a {style} of a {colour} {noun} {scene}"
    for i, noun in enumerate(world.ALL_NOUNS)
    for style, colour, scene in (
        ("photo", list(world.COLOURS)[i % 8], world.ALL_SCENES[i % 6]),
        ("cartoon", list(world.COLOURS)[(i + 3) % 8], world.ALL_SCENES[(i + 1) % 6]),
        ("photo", list(world.COLOURS)[(i + 5) % 8], world.ALL_SCENES[(i + 3) % 6]),
        ("cartoon", list(world.COLOURS)[(i + 6) % 8], world.ALL_SCENES[(i + 4) % 6]),
    )
]


def new(seed: int = 0) -> UNet2DConditionModel:
    """An untrained noise predictor with Stable Diffusion 1.5's topology and key names, 4.2 M parameters."""
    with keys.seeded(seed, "toybox/noise/weights"):
        return UNet2DConditionModel(
            sample_size=LATENT[1],
            in_channels=LATENT[0],
            out_channels=LATENT[0],
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            block_out_channels=CHANNELS,
            layers_per_block=2,
            cross_attention_dim=text.WIDTH,
            attention_head_dim=2,  # diffusers' name for the number of heads, kept for old checkpoints
            norm_num_groups=8,
        )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's noise schedule with velocity prediction; sampling begins at the last timestep."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def encoded(folder: Path, config: Config, autoencoder: AutoencoderKL) -> np.ndarray:
    """The world's latents, (N, 4, 16, 16) float16; the file is named after the weights that made it."""
    weights = hashlib.sha256()
    for value in autoencoder.encoder.state_dict().values():
        weights.update(value.numpy().tobytes())
    path = folder / f"latents-{config.pictures}-{weights.hexdigest()[:12]}.npy"
    if not path.exists():
        shown = pictures.drawn(folder / "world.npy", pictures.draw_world, config.seed, config.pictures)
        latents = np.empty((len(shown), *LATENT), np.float16)
        for start in range(0, len(shown), 200):
            batch = vae.as_tensor(shown[start : start + 200])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                latents[start : start + 200] = autoencoder.encode(batch).latent_dist.mode().float().numpy()
        beside = path.with_suffix(".partial")
        with open(beside, "wb") as file:
            np.save(file, latents)
        os.replace(beside, path)
    return np.load(path)


def velocity_weight(diffusion: Diffusion, t: Tensor, gamma: float) -> Tensor:
    """Min-SNR on the weight that the plain velocity loss gives to x0, SNR + 1: min(SNR + 1, gamma) / (SNR + 1).

    The paper's own min(SNR, gamma) / (SNR + 1) all but ignores the noisiest steps, where a small model
    decides what the picture shows.
    """
    return min_snr_weight(diffusion.snr(t) + 1, gamma, "epsilon")


class Sampler:
    """Draws pictures while training goes on: the standard loop with guidance, on latents."""

    def __init__(self, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
        self.autoencoder, self.tokenizer = autoencoder, tokenizer

    @torch.no_grad()
    def draw(self, unet: nn.Module, encoder: nn.Module, prompts: list[str], seed: int, steps: int = 20,
             guidance: float = 4.0) -> list[Image.Image]:  # fmt: skip
        """One picture for each prompt."""
        sampling = scheduler()
        sampling.set_timesteps(steps)
        latents = keys.normal((len(prompts), *LATENT), seed, "toybox/sheet")
        with torch.autocast("cpu", torch.bfloat16):
            ids = text.token_ids(self.tokenizer, [""] * len(prompts) + prompts)
            conditions = encoder(ids).last_hidden_state
            for t in sampling.timesteps:
                plain, told = unet(torch.cat([latents] * 2), t, conditions).sample.float().chunk(2)
                latents = sampling.step(plain + guidance * (told - plain), t, latents).prev_sample
            decoded = self.autoencoder.decode(latents).sample
        return vae.as_pictures(decoded)


def train(
    config: Config,
    folder: Path,
    latents: np.ndarray,
    encoder: CLIPTextModel,
    sampler: Sampler,
    judge: Judge,
    export: Callable[[nn.Module, nn.Module], None],
) -> nn.ModuleDict:
    """The stage; `export(unet, encoder)` is called with the averaged weights at every checkpoint."""
    tokenizer = sampler.tokenizer
    specs = [world.spec_at(config.seed, index) for index in range(len(latents))]
    kept = np.array([i for i, spec in enumerate(specs) if not world.is_held_out_prompt(spec)])
    captions = [world.caption(spec) for spec in specs]
    sampling = scheduler()
    diffusion = Diffusion(sampling.alphas_cumprod, "v_prediction")
    unet = new(config.seed)
    unet.set_attn_processor(AttnProcessor())
    model = nn.ModuleDict({"unet": unet, "encoder": encoder.requires_grad_(True).train()})
    size, mine = config.batch, parallel.mine()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        random = keys.rng(config.seed, "toybox/noise/batch", step)
        chosen = kept[random.integers(len(kept), size=size)]
        told = ["" if random.random() < config.caption_dropout else captions[i] for i in chosen]
        x0 = torch.from_numpy(latents[chosen].astype(np.float32))[mine]
        eps = torch.from_numpy(random.standard_normal((size, *LATENT), dtype=np.float32))[mine]
        # One timestep in each of `size` equal parts: the same distribution, a quieter gradient.
        parts = (np.arange(size) + random.random(size)) / size
        t = torch.from_numpy((parts * diffusion.timesteps).astype(np.int64))[mine]
        with torch.autocast("cpu", torch.bfloat16):
            conditions = model["encoder"](text.token_ids(tokenizer, told[mine])).last_hidden_state
            predicted = model["unet"](diffusion.noised(x0, eps, t), t, conditions).sample
        errors = loss_per_picture(predicted, diffusion.target(x0, eps, t))
        return (errors * velocity_weight(diffusion, t, config.snr_gamma)).mean(), {"v": float(errors.detach().mean())}

    def show(averaged: nn.ModuleDict, step: int) -> None:
        drawn = sampler.draw(averaged["unet"], averaged["encoder"], SHEET_PROMPTS, 1)
        pictures.sheet(drawn, 12).save(folder / "noise.png")
        seen = judge.read(drawn)
        right = {
            field: sum(found[field] in prompt for found, prompt in zip(seen, SHEET_PROMPTS, strict=True)) / len(seen)
            for field in ("noun", "colour", "scene", "style")
        }
        print(f"noise {step}: {step * size} pictures; the judge reads right: {right}", flush=True)
        export(averaged["unet"], averaged["encoder"])

    stage = stages.Stage(
        name="noise",
        folder=folder,
        model=model,
        groups=[(model["unet"], config.lr), (model["encoder"], config.lr / 3)],
        steps=config.noise_pictures // size,
        loss=loss,
        average=0.999,
        show=show,
    )
    return stages.run(stage)
