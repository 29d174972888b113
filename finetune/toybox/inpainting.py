"""An inpainting checkpoint of toybox: 9 channels, trained by the recipe `dreambooth` on pictures of toybox's world.

    finetune toybox inpainting --output FOLDER

Then `--model FOLDER/run/model` wherever a model is named. The same command goes on where it was stopped.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import disk, shelf

if TYPE_CHECKING:
    from finetune.families import Source

RECIPE, SETTINGS = "dreambooth", "dreambooth-toybox-inpainting"


@dataclass(frozen=True)
class Config:
    """Make an inpainting checkpoint of the embedded base model: minutes on one core."""

    output: Path = Path("toybox-inpainting")
    """Working folder: `start` (the model to train), `world` (pictures), `run/model` (the result). The same command goes
    on from what is there."""
    pictures: int = 2000
    """Captioned pictures of the world to train on."""
    seed: int = 1
    """Seed of the pictures and of the training."""
    steps: int | None = None
    """Training steps. Default: those of the ready settings."""


def main(config: Config) -> None:
    import finetune as ft
    from finetune.toybox import path

    start, world, run = (config.output / name for name in ("start", "world", "run"))
    if not start.exists():
        _widen(ft.Source(str(path())), start)
    _draw(world, config.pictures, config.seed)
    words = ["--config", SETTINGS, "--model", str(start), "--data", str(world), "--output", str(run)]
    words += ["--seed", str(config.seed), "--no-report", "--resume-or-begin"]
    words += [] if config.steps is None else ["--steps", str(config.steps)]
    print(f"\n  finetune train {RECIPE} {shlex.join(words)}\n", flush=True)
    recipe = shelf.load(RECIPE)
    recipe.main(ft.config.parse(recipe.Config, words, f"finetune train {RECIPE}"))


def _widen(source: Source, folder: Path) -> None:
    """The base with the input channels of an inpainting checkpoint, as a diffusers folder."""
    import torch

    from finetune import export, families
    from finetune.families import widened

    export.merged(widened.inpainting(families.load(source)), folder, dtype=torch.float32)


def _draw(folder: Path, count: int, seed: int) -> None:
    """The first so many pictures of the world, without those that the base has never seen; what is there stays."""
    from finetune.toybox import world

    folder.mkdir(parents=True, exist_ok=True)
    index = drawn = 0
    while drawn < count:
        spec, index = world.spec_at(seed, index), index + 1
        if world.is_held_out_prompt(spec):
            continue
        file, drawn = folder / f"{index:06d}.png", drawn + 1
        if not file.with_suffix(".txt").exists():  # written last: then its picture is whole
            world.render(spec).save(file)
            disk.write_text(file.with_suffix(".txt"), world.caption(spec) + "\n")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
