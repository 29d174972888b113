"""The figures of the base model's quality; `measure.py` is the page that prints them."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from finetune import keys
from finetune.toybox import subjects, vae, world
from finetune.toybox.judge import Judge
from finetune.toybox.judge_training import identity_spec

FIELDS = ("noun", "colour", "scene", "style")
UNSEEN = 10**6
"""First index of pictures that no training set reaches."""


def held_out_prompts() -> list[world.Spec]:
    """Every combination of noun, colour and scene that training left out, in both styles."""
    every = (world.Spec(*parts) for parts in product(world.ALL_NOUNS, world.COLOURS, world.ALL_SCENES, world.STYLES))
    return [spec for spec in every if world.is_held_out_prompt(spec)]


def draw(
    pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, steps: int, guidance: float
) -> list[Image.Image]:
    """One picture for each prompt, by the pipeline as users call it."""
    found: list[Image.Image] = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        noise = keys.normal((len(part), 4, 16, 16), seed, "toybox/measure", start)
        found += pipeline(part, num_inference_steps=steps, guidance_scale=guidance, latents=noise).images
    return found


def right(judge: Judge, shown: list[Image.Image], specs: list[world.Spec]) -> dict[str, float]:
    """Share of the pictures in which the judge reads what the spec says."""
    read = judge.read(shown)
    return {f: float(np.mean([r[f] == getattr(s, f) for r, s in zip(read, specs, strict=True)])) for f in FIELDS}


def through(autoencoder: AutoencoderKL, shown: list[Image.Image]) -> tuple[list[Image.Image], float]:
    """The pictures through the autoencoder, and the mean PSNR in dB."""
    batch = vae.as_tensor(np.stack([np.asarray(picture) for picture in shown]))
    output = vae.reconstruct(autoencoder, batch)
    return vae.as_pictures(output), vae.psnr(output, batch)


def fresh(seed: int, count: int = 400) -> list[world.Spec]:
    """World pictures that no part was trained on."""
    return [world.spec_at(seed, UNSEEN + index) for index in range(count)]


def unseen_subjects(seed: int, count: int = 60) -> dict[str, list[Image.Image]]:
    """Each data-set subject in many places and scenes."""
    random = np.random.default_rng([seed, 11])
    return {
        name: [world.render(subject.spec(str(random.choice(world.ALL_SCENES)), random)) for _ in range(count)]
        for name, subject in subjects.SUBJECTS.items()
    }


def identity(judge: Judge, subject_views: dict[str, list[Image.Image]], seed: int) -> dict[str, float]:
    """How well likeness tells things apart: cosines of same and different things, and finding a thing among 200."""
    views = [[world.render(identity_spec(seed + 1, 4 * thing + v)) for thing in range(200)] for v in (0, 1)]
    one, other = (judge.embed(part) for part in views)
    alike = one @ other.T
    result = {
        "thing found among 200, in families one trait apart": float(
            alike.argmax(1).eq(torch.arange(200)).float().mean()
        ),
        "likeness, same thing elsewhere": float(alike.diagonal().mean()),
        "likeness, different things": float((alike.sum() - alike.diagonal().sum()) / (200 * 199)),
    }
    for name, shown in subject_views.items():
        result[f"likeness, {name} to itself in other scenes"] = judge.likeness(shown[:30], shown[30:])
        result[f"likeness, {name} to other things"] = judge.likeness(shown[:30], views[0])
    return result
