"""`finetune generate`: pictures of prompts and seeds, with adapters, as PNGs that know their settings, and a grid."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.commands import drawing
from finetune.commands.drawing import Drawing
from finetune.errors import Fault

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.families import Family
    from finetune.initial import Initial

GRID = "grid.png"


@dataclass(frozen=True)
class Config(Drawing):
    """Draw pictures with a model and adapters: of words, from a picture, or a part of one anew."""

    prompt: tuple[str, ...] = ()
    r"""What to draw; several prompts, each in quotes, give a row of pictures each. `(words:1.2)` weighs words, `\(` is
    a parenthesis; they may be longer than 77 tokens."""
    prompts: Path | None = None
    """A text file with a prompt in each line, which follow those of --prompt. Lines that begin with # are left out."""
    scale: tuple[float, ...] = (1.0,)
    """Strength of the adapters: one number for all, or one each. 0 is the base alone."""
    strength: float | None = None
    """How much of --init is drawn anew: 0 leaves it as it is, 1 ignores it. Default: .6, under a mask 1."""
    seed: int = 0
    """Seed of the first picture; the next have the next seeds, the same for every prompt."""
    count: int = 1
    """Pictures for each prompt."""
    steps: int = 30
    """Denoising steps."""
    guidance: float = 5.0
    """How strictly the prompt is followed (classifier-free guidance, Ho & Salimans 2022, 2207.12598)."""


def main(config: Config) -> None:
    # What can be refused is refused before a model is loaded.
    prompts = _prompts(config)
    _require_sense(config, prompts)
    files = _files(config, prompts)
    scales = config.scale * len(config.adapter) if len(config.scale) == 1 else config.scale
    adapters = drawing.told(config.adapter, scales)
    initial = drawing.initial(config, config.strength)
    drawing.require_words(config, prompts)

    from finetune import families, sampling
    from finetune.initial import PICTURE
    from finetune.pictures import grid, save_png

    family = drawing.load(config)
    drawing.set_scales(family, scales)
    settings = {**drawing.facts(config, family), "steps": config.steps, "guidance": config.guidance}
    changes = families.takes_source(family)
    settings |= {"strength": initial.strength if initial and not changes else None, "adapters": adapters}
    settings |= {"picture_guidance": config.picture_guidance or PICTURE} if changes else {}
    sampling.check(family, initial, config.steps)
    drawing.make_folder(config.output)
    rows: dict[int, list[Image]] = {row: [] for row in range(len(prompts))}
    for (row, seed), picture in _draw(family, config, prompts, initial, list(files)):
        save_png(picture, files[row, seed], {**settings, "prompt": prompts[row], "seed": seed})
        rows[row].append(picture)
    if len(files) > 1:
        columns = [f"seed {seed}" for seed in _seeds(config)]
        sheet = grid(list(rows.values()), prompts, columns, drawing.title(config, scales))
        save_png(sheet, config.output / GRID, {"model": config.model.model, "adapters": adapters})
    print(*files.values(), *([config.output / GRID] if len(files) > 1 else []), sep="\n")


def _draw(
    family: Family, config: Config, prompts: Sequence[str], initial: Initial | None, wanted: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Image]]:
    """The pictures of (prompt, seed) pairs, as they are drawn."""
    from rich.console import Console
    from rich.progress import track

    from finetune.sampling import sample

    batches = [wanted[start : start + config.batch] for start in range(0, len(wanted), config.batch)]
    for pairs in track(batches, "draw", console=Console(stderr=True)):
        pictures = sample(
            family,
            [prompts[row] for row, _ in pairs],
            [seed for _, seed in pairs],
            negative=config.negative,
            steps=config.steps,
            guidance=config.guidance,
            size=config.size,
            batch=config.batch,
            initial=initial,
            weighted=True,
        )
        yield from zip(pairs, pictures, strict=True)


def _prompts(config: Config) -> tuple[str, ...]:
    """Those of the command line, then those of the file."""
    if config.prompts is None:
        return config.prompt
    try:
        lines = config.prompts.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Fault(f"--prompts {config.prompts}: cannot be read as UTF-8 text ({error}).") from error
    found = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not found:
        raise Fault(f"--prompts {config.prompts}: no prompt in it. It holds one in each line.")
    return (*config.prompt, *found)


def _require_sense(config: Config, prompts: Sequence[str]) -> None:
    drawing.require_sense(config, prompts, config.scale)
    for name in ("count", "steps"):
        if getattr(config, name) < 1:
            raise Fault(f"--{name} {getattr(config, name)}: at least 1.")
    if config.seed < 0:
        raise Fault(f"--seed {config.seed}: a seed is 0 or more.")


def _seeds(config: Config) -> range:
    return range(config.seed, config.seed + config.count)


def _files(config: Config, prompts: Sequence[str]) -> dict[tuple[int, int], Path]:
    """The file of each (prompt, seed). Raises Fault when something is there and is not to be written over."""
    files = {
        (row, seed): config.output / f"{row + 1:02d}-{_slug(prompt)}-seed{seed}.png"
        for row, prompt in enumerate(prompts)
        for seed in _seeds(config)
    }
    drawing.require_room(config.output, (*files.values(), config.output / GRID), config.overwrite)
    return files


def _slug(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"
