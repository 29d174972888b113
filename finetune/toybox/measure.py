"""Measures the shipped base model: its pictures, its autoencoder, and the judge that says so.

    finetune toybox measure --output finetune/toybox/measured.json --card finetune/toybox/MODEL_CARD.md

is how the shipped figures came about.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

MARKERS = ("<!-- measured: written by measure.py -->", "<!-- /measured -->")


@dataclass(frozen=True)
class Config:
    """What to measure, and how thoroughly."""

    weights: Path | None = None
    """Pipeline folder. Default: the shipped one."""
    output: Path = Path("measured.json")
    """Where the figures go."""
    card: Path | None = None
    """A model card whose table of figures is to be rewritten."""
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


def main(config: Config) -> None:
    """Measure, print, and write the figures."""
    import torch
    from diffusers import StableDiffusionPipeline

    from finetune.toybox import path, pictures, quality, subjects, world
    from finetune.toybox.judge import Judge

    folder = config.weights or path()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    judge = Judge.load(folder / "judge")
    specs = [spec for spec in quality.held_out_prompts() for _ in range(config.seeds)]
    captions = [world.caption(spec) for spec in specs]
    drawn = quality.draw(pipeline, captions, config.seed, config.steps, config.guidance)
    if config.sheet is not None:
        pictures.sheet(drawn, 18).save(config.sheet)
    real_specs = quality.fresh(config.seed)
    real = [world.render(spec) for spec in real_specs]
    coded, decibels = quality.through(pipeline.vae, real)
    views = quality.unseen_subjects(config.seed)
    figures = {
        "base, held-out prompts": {
            "prompts": len(quality.held_out_prompts()),
            "pictures": len(drawn),
            **quality.right(judge, drawn, specs),
            "prompt score": judge.prompt(drawn, captions),
        },
        "autoencoder, PSNR in dB": {
            "held-out world": decibels,
            **{name: quality.through(pipeline.vae, shown)[1] for name, shown in views.items()},
            "neon": quality.through(pipeline.vae, [p for p, _ in subjects.drawn("neon").values()])[1],
        },
        "judge, drawn pictures": quality.right(judge, real, real_specs),
        "judge, the same through the autoencoder": {
            **quality.right(judge, coded, real_specs),
            "prompt score": judge.prompt(
                coded, [world.caption(replace(s, says_colour=True, says_scene=True)) for s in real_specs]
            ),
        },
        "judge, identity": quality.identity(judge, views, config.seed),
        "megabytes": {"all weights": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6},
    }
    config.output.write_text(json.dumps(figures, indent=2) + "\n")
    table = "\n".join(rows(figures))
    print(table)
    if config.card is not None:
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
