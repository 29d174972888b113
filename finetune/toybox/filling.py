"""Fill masked things of toybox's world with a subject: an inpainting checkpoint before and after it learned that.

    finetune toybox inpainting --output FOLDER
    finetune toybox fill --model FOLDER/run/model --output filled

The recipe `lora`, and drawing as `finetune generate --init PICTURE --mask MASK` does it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune import disk, shelf
from finetune.demo import CLASS_PROMPT, PROMPT, RECIPE, SETTINGS, opened, say
from finetune.errors import Fault

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.families import Family
    from finetune.initial import Initial

THINGS = (("cup", "purple"), ("cat", "green"), ("rocket", "red"), ("mushroom", "orange"), ("house", "pink"),
          ("boat", "yellow"))  # fmt: skip
"""Noun and colour of what is masked, one for each scene"""
SEED = 11
"""Of where they stand"""
MARGIN = 5
"""Pixels between a thing and the edge of its mask"""
SAMPLING_STEPS, GUIDANCE = 25, 2.0
SHOWN = 4
"""Scenes in the picture"""


@dataclass(frozen=True)
class Config:
    """Train a LoRA on an inpainting checkpoint of toybox, and fill masked things of its world with and without it."""

    model: Path
    """The checkpoint, as `finetune toybox inpainting` makes it: FOLDER/run/model."""
    output: Path = Path("toybox-filled")
    """A new folder for the picture `filled.png`, `figures.json`, the pictures and masks, and the run."""
    subject: Literal["gizmo", "pip"] = "gizmo"
    """The shipped subject that is learned."""
    seed: int = 0
    """Seed of the training and of the first filling of each picture."""
    count: int = 4
    """Fillings of each picture."""
    steps: int | None = None
    """Training steps. Default: those of the ready settings."""


def main(config: Config) -> None:
    if config.output.exists() and any(config.output.iterdir()):
        raise Fault(f"{config.output}: there is something there already. Name a new --output.")
    import finetune as ft
    from finetune.export import attach
    from finetune.pictures import grid
    from finetune.toybox.world import ALL_SCENES

    holes = [masked(config.output, scene, *thing) for scene, thing in zip(ALL_SCENES, THINGS, strict=True)]
    prompts = [f"{PROMPT} {scene}" for scene in ALL_SCENES]

    folder, run = shelf.datasets() / config.subject, config.output / "run"
    words = ["--config", SETTINGS, "--model", str(config.model), "--data", str(folder / "pictures"), "--output",
             str(run), "--class-prompt", CLASS_PROMPT, "--seed", str(config.seed)]  # fmt: skip
    words += [] if config.steps is None else ["--steps", str(config.steps)]
    say(f"It learns {config.subject} from the five captioned pictures in {folder / 'pictures'}:")
    print(f"\n  finetune train {RECIPE} {shlex.join(words)}\n", flush=True)
    recipe = shelf.load(RECIPE)
    recipe.main(ft.config.parse(recipe.Config, words, f"finetune train {RECIPE}"))

    say("The same holes, words and seeds, filled by the checkpoint and with the trained file:")
    family = ft.load(ft.Source(str(config.model)))
    before = _filled(family, holes, prompts, config)
    attach(family, run / "adapter.safetensors", "filling")
    after = _filled(family, holes, prompts, config)

    first = before[:: config.count], after[:: config.count]
    rows = [[one.picture, one.mask, *drawn] for one, *drawn in zip(holes, *first, strict=True) if one.mask]
    columns = ["picture", "mask", "base", f"with {config.subject}'s file"]
    picture = config.output / "filled.png"
    grid(rows[:SHOWN], prompts[:SHOWN], columns, f'an inpainting checkpoint fills "{PROMPT} ..."').save(picture)
    figures = _likeness(folder, [hole.picture for hole in holes], before, after)
    disk.write_text(config.output / "figures.json", json.dumps(figures, indent=1) + "\n")
    say(f"Look at {picture}.")


def masked(folder: Path, scene: str, noun: str, colour: str) -> Initial:
    """A picture of the world and a mask of the box around its thing; both are written, to be used by hand too."""
    import numpy as np
    from PIL import Image, ImageChops

    from finetune.initial import read
    from finetune.toybox.scenes import draw_scene
    from finetune.toybox.world import Spec, caption, placed, render

    spec = placed(Spec(noun, colour, scene, "photo"), np.random.default_rng([SEED, *scene.encode()]))
    picture = render(spec)
    thing = ImageChops.difference(picture, draw_scene(spec.scene, spec.style, spec.detail, picture.width)).getbbox()
    assert thing is not None
    mask = Image.new("L", picture.size)
    mask.paste(255, (thing[0] - MARGIN, thing[1] - MARGIN, thing[2] + MARGIN, thing[3] + MARGIN))
    name = caption(spec).replace(" ", "-")
    files = folder / "pictures" / f"{name}.png", folder / "masks" / f"{name}.png"
    for file, image in zip(files, (picture, mask), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    return read(*files)


def _filled(family: Family, holes: Sequence[Initial], prompts: Sequence[str], config: Config) -> list[Image]:
    """`count` fillings of each hole, always from the same seeds."""
    from finetune.sampling import sample

    drawn: list[Image] = []
    for hole, prompt in zip(holes, prompts, strict=True):
        seeds = [config.seed + number for number in range(config.count)]
        drawn += sample(family, [prompt] * config.count, seeds, initial=hole, steps=SAMPLING_STEPS, guidance=GUIDANCE)
    return drawn


def _likeness(
    folder: Path, pictures: Sequence[Image], before: Sequence[Image], after: Sequence[Image]
) -> dict[str, list[float]]:
    """Print and return the likeness of the pictures to the subject's references, scene by scene."""
    from rich.console import Console
    from rich.table import Table

    from finetune.toybox.judge import Judge

    judge = Judge.load()
    references = [opened(path) for path in sorted((folder / "references").glob("*.png"))]
    table = Table("likeness to pictures of it that were not trained on (1 is the most)", "all", "each scene")
    kinds = {"the pictures as they are": pictures, "filled by the base": before, "filled with its file": after}
    figures = {}
    for what, shown in kinds.items():
        count = len(shown) // len(pictures)
        each = [judge.likeness(shown[start : start + count], references) for start in range(0, len(shown), count)]
        table.add_row(what, f"{sum(each) / len(each):.2f}", " ".join(f"{one:.2f}" for one in each))
        figures[what] = [round(one, 4) for one in each]
    Console().print(table)
    return figures


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
