"""See it work: a subject is learned from five pictures, and shown before and after in scenes it was never seen in.

The shipped base model, a shipped data set, and the recipe `lora` with its ready settings, as a user would run it.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune import shelf
from finetune.errors import Fault

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.families import Family

RECIPE, SETTINGS = "lora", "lora-toybox-subject"
PROMPT, CLASS_PROMPT = "a photo of sks toy", "a photo of a toy"
CARTOON = "a cartoon of sks toy"
EACH = 4
"""Pictures of each prompt for the judge; the grid shows the first."""
SAMPLING_STEPS, GUIDANCE = 25, 2.0


@dataclass(frozen=True)
class Config:
    """Train a LoRA with prior preservation on a shipped subject, and show the subject before and after."""

    output: Path = Path("finetune-demo")
    """A new folder for the picture `demo.png` and for the run."""
    subject: Literal["gizmo", "pip"] = "gizmo"
    """The shipped subject that is learned."""
    seed: int = 0
    """Seed of the training and of the pictures."""
    steps: int | None = None
    """Training steps. Default: those of the ready settings."""


def main(config: Config) -> None:
    if config.output.exists() and any(config.output.iterdir()):
        raise Fault(f"{config.output}: there is something there already. Name a new --output.")
    began = time.monotonic()
    import finetune as ft
    from finetune.export import attach
    from finetune.pictures import grid, stacked
    from finetune.signals import Watch
    from finetune.toybox.subjects import SUBJECTS

    folder, run = shelf.datasets() / config.subject, config.output / "run"
    new_scenes = list(dict.fromkeys(SUBJECTS[config.subject].references))
    prompts = [*(f"{PROMPT} {scene}" for scene in new_scenes), f"{CARTOON} {new_scenes[0]}"]

    say(f"The base model draws `{PROMPT}`, words that mean nothing to it yet.")
    family = ft.load(ft.Source("toybox"))
    before = draw(family, prompts, config.seed)

    words = ["--config", SETTINGS, "--data", str(folder / "pictures"), "--output", str(run)]
    words += ["--class-prompt", CLASS_PROMPT, "--seed", str(config.seed)]
    words += [] if config.steps is None else ["--steps", str(config.steps)]
    say(f"It learns {config.subject} from the five captioned pictures in {folder / 'pictures'}:")
    print(f"\n  finetune train {RECIPE} {shlex.join(words)}\n")
    recipe = shelf.load(RECIPE)
    with Watch():
        recipe.main(ft.config.parse(recipe.Config, words, f"finetune train {RECIPE}"))

    say("The trained file on the base model, the same words and seeds:")
    attach(family, run / "adapter.safetensors", "demo")
    after = draw(family, prompts, config.seed)

    photos = [opened(path) for path in sorted((folder / "pictures").glob("*.png"))]
    above = grid([photos], ["it learns from"], [""] * len(photos), f"{config.subject}, before and after")
    below = grid([before[::EACH], after[::EACH]], ["before", "after"], [*prompts, f"{CLASS_PROMPT} (the class)"])
    picture = config.output / "demo.png"
    stacked([above, below]).save(picture)
    judge(folder, prompts, before, after)
    say(f"Look at {picture}: scenes that {config.subject} was never seen in. {time.monotonic() - began:.0f} s in all.")


def draw(family: Family, prompts: Sequence[str], seed: int) -> list[Image]:
    """`EACH` pictures of every prompt and of the class prompt, which comes last; always from the same seeds."""
    from finetune.sampling import sample

    asked = [prompt for prompt in [*prompts, CLASS_PROMPT] for _ in range(EACH)]
    seeds = [1000 * seed + number for number in range(len(asked))]
    return sample(family, asked, seeds, steps=SAMPLING_STEPS, guidance=GUIDANCE, batch=8)


def judge(folder: Path, prompts: Sequence[str], before: Sequence[Image], after: Sequence[Image]) -> None:
    """Print the judge's scores of the pictures of the subject and of its class."""
    from rich.console import Console
    from rich.table import Table

    from finetune.toybox.judge import Judge

    judge = Judge.load()
    references = [opened(path) for path in sorted((folder / "references").glob("*.png"))]
    photos = [opened(path) for path in sorted((folder / "pictures").glob("*.png"))]
    asked = [prompt for prompt in prompts for _ in range(EACH)]
    table = Table("the judge's score (1 is the most)", "before", "after", "")
    rows = {
        "likeness to pictures of it that were not trained on": (
            [judge.likeness(drawn[: len(asked)], references) for drawn in (before, after)],
            f"its own photos: {judge.likeness(photos, references):.2f}",
        ),
        "what the words ask for is there": (
            [judge.prompt(drawn[: len(asked)], asked) for drawn in (before, after)],
            "should stay",
        ),
        f"`{CLASS_PROMPT}`: likeness to it": (
            [judge.likeness(drawn[len(asked) :], references) for drawn in (before, after)],
            "should stay low",
        ),
    }
    for what, (scores, note) in rows.items():
        table.add_row(what, *(f"{score:.2f}" for score in scores), note)
    Console().print(table)


def opened(path: Path) -> Image:
    from PIL import Image

    return Image.open(path).convert("RGB")


def say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False).print(f"\n{text}", style="bold", markup=False)
