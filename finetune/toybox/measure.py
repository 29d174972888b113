"""Measures the shipped base model: its pictures, its autoencoder, and the judge that says so.

    python -m finetune.toybox.measure

writes `measured.json` and the table in `MODEL_CARD.md`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from finetune import keys
from finetune.toybox import path, pictures, subjects, vae, world
from finetune.toybox.judge import Judge
from finetune.toybox.judge_training import identity_spec

HERE = Path(__file__).parent
MARKERS = ("<!-- measured: written by measure.py -->", "<!-- /measured -->")
FIELDS = ("noun", "colour", "scene", "style")
UNSEEN = 10**6
"""First index of pictures that no training set reaches."""


@dataclass(frozen=True)
class Config:
    """What to measure, and how thoroughly."""

    weights: Path | None = None
    """Pipeline folder. Default: the shipped one."""
    output: Path = HERE / "measured.json"
    """Where the figures go."""
    card: Path | None = HERE / "MODEL_CARD.md"
    """Model card whose table is rewritten."""
    sheet: Path | None = None
    """Where to write the generated pictures as one sheet."""
    seeds: int = 2
    """Pictures of each held-out prompt."""
    steps: int = 25
    """Sampling steps."""
    guidance: float = 4.0
    """Classifier-free guidance."""
    seed: int = 0
    """Seed of the sampling noise and of the fresh pictures."""


def held_out_prompts() -> list[world.Spec]:
    """Every combination of noun, colour and scene that training left out, in both styles."""
    every = (world.Spec(*parts) for parts in product(world.ALL_NOUNS, world.COLOURS, world.ALL_SCENES, world.STYLES))
    return [spec for spec in every if world.is_held_out_prompt(spec)]


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], config: Config) -> list[Image.Image]:
    """One picture for each prompt, by the pipeline as users call it."""
    found: list[Image.Image] = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        noise = keys.normal((len(part), 4, 16, 16), config.seed, "toybox/measure", start)
        found += pipeline(part, num_inference_steps=config.steps, guidance_scale=config.guidance, latents=noise).images
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


def fresh(config: Config, count: int = 400) -> list[world.Spec]:
    """World pictures that no part was trained on."""
    return [world.spec_at(config.seed, UNSEEN + index) for index in range(count)]


def unseen_subjects(config: Config, count: int = 60) -> dict[str, list[Image.Image]]:
    """Each data-set subject in many places and scenes."""
    random = np.random.default_rng([config.seed, 11])
    return {
        name: [world.render(subject.spec(str(random.choice(world.ALL_SCENES)), random)) for _ in range(count)]
        for name, subject in subjects.SUBJECTS.items()
    }


def identity(judge: Judge, subject_views: dict[str, list[Image.Image]], config: Config) -> dict[str, float]:
    """How well likeness tells things apart: cosines of same and different things, and finding a thing among 200."""
    views = [[world.render(identity_spec(config.seed + 1, 4 * thing + v)) for thing in range(200)] for v in (0, 1)]
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


def main(config: Config) -> None:
    """Measure, print, and write the figures."""
    folder = config.weights or path()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    judge = Judge.load(folder / "judge")
    specs = [spec for spec in held_out_prompts() for _ in range(config.seeds)]
    drawn = draw(pipeline, [world.caption(spec) for spec in specs], config)
    if config.sheet is not None:
        pictures.sheet(drawn, 18).save(config.sheet)
    real_specs = fresh(config)
    real = [world.render(spec) for spec in real_specs]
    coded, decibels = through(pipeline.vae, real)
    views = unseen_subjects(config)
    figures = {
        "base, held-out prompts": {
            "prompts": len(held_out_prompts()),
            "pictures": len(drawn),
            **right(judge, drawn, specs),
            "prompt score": judge.prompt(drawn, [world.caption(spec) for spec in specs]),
        },
        "autoencoder, PSNR in dB": {
            "held-out world": decibels,
            **{name: through(pipeline.vae, shown)[1] for name, shown in views.items()},
            "neon": through(pipeline.vae, [p for p, _ in subjects.drawn("neon").values()])[1],
        },
        "judge, drawn pictures": right(judge, real, real_specs),
        "judge, the same through the autoencoder": {
            **right(judge, coded, real_specs),
            "prompt score": judge.prompt(coded, [world.caption(replace(s, says_colour=True)) for s in real_specs]),
        },
        "judge, identity": identity(judge, views, config),
        "megabytes": {"all weights": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6},
    }
    config.output.write_text(json.dumps(figures, indent=2) + "\n")
    table = "\n".join(rows(figures))
    print(table)
    if config.card is not None and config.card.exists():
        text = config.card.read_text()
        before, rest = text.split(MARKERS[0])
        config.card.write_text(before + MARKERS[0] + "\n" + table + "\n" + MARKERS[1] + rest.split(MARKERS[1])[1])


def rows(figures: dict[str, dict[str, float]]) -> list[str]:
    """The figures as a Markdown table."""
    shown = ["| what | figure | measured |", "|---|---|---|"]
    for group, values in figures.items():
        for name, value in values.items():
            shown.append(f"| {group} | {name} | {value:.3g} |" if value < 1000 else f"| {group} | {name} | {value} |")
    return shown


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
