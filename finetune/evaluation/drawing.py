"""The pictures that are judged: drawn from fixed seeds, kept in the run's folder, never drawn twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image as Images
from PIL.Image import Image

from finetune import disk, signals
from finetune.families import Family
from finetune.pictures import save_png
from finetune.sampling import everything, sample

RECORD = "drawn.json"
Track = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class How:
    """How all of them are drawn."""

    seed: int
    steps: int
    guidance: float
    size: int | None
    batch: int


@dataclass(frozen=True)
class Wanted:
    """A picture to draw."""

    file: str
    prompt: str
    seed: int


def wanted(kind: str, prompts: Sequence[str], count: int, seed: int) -> list[Wanted]:
    """`subject-01-seed0.png` ...: each prompt with the same `count` seeds."""
    return [
        Wanted(f"{kind}-{row + 1:02d}-seed{number}.png", prompt, number)
        for row, prompt in enumerate(prompts)
        for number in range(seed, seed + count)
    ]


def draw(
    folder: Path,
    pictures: Sequence[Wanted],
    how: How,
    identity: str,
    load: Callable[[], Family],
    facts: Mapping[str, Any],
    track: Track,
) -> list[Image]:
    """The pictures, in their order. Only what is missing in the folder is drawn; the model is loaded for that alone.

    `identity`: which weights draw. Pictures of other weights or settings are drawn again, over the old ones. An
    interruption loses one batch at most. `facts`: what else each picture tells.
    """
    folder.mkdir(parents=True, exist_ok=True)
    origin = {"weights": identity, **{name: value for name, value in asdict(how).items() if name != "batch"}}
    record = _read(folder, origin)
    missing = [one for one in pictures if record.get(one.file) != one.prompt or not (folder / one.file).is_file()]
    if missing:
        family = load()
        batches = [missing[start : start + how.batch] for start in range(0, len(missing), how.batch)]
        for batch in track(batches, f"draw {folder.name}"):
            signals.heed()
            _draw(family, folder, batch, how, facts)
            record |= {one.file: one.prompt for one in batch}
            disk.write_text(folder / RECORD, json.dumps({**origin, "pictures": record}, indent=1) + "\n")
    return [opened(folder / one.file) for one in pictures]


def opened(file: Path) -> Image:
    """In memory, the file closed."""
    with Images.open(file) as picture:
        return picture.convert("RGB")


def _draw(family: Family, folder: Path, batch: Sequence[Wanted], how: How, facts: Mapping[str, Any]) -> None:
    prompts, seeds = [one.prompt for one in batch], [one.seed for one in batch]
    initial = everything(family, how.size or family.resolution())
    drawn = sample(
        family, prompts, seeds,
        steps=how.steps, guidance=how.guidance, size=how.size, batch=how.batch, initial=initial,
    )  # fmt: skip
    told = {"steps": how.steps, "guidance": how.guidance, "scheduler": type(family.pipeline.scheduler).__name__}
    for one, picture in zip(batch, drawn, strict=True):
        save_png(picture, folder / one.file, {**facts, **told, "prompt": one.prompt, "seed": one.seed})


def _read(folder: Path, origin: Mapping[str, Any]) -> dict[str, str]:
    """What was drawn of the same origin: file -> prompt. Empty where it was another one, or cannot be read."""
    try:
        table = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        pictures = table.pop("pictures")
        return {str(file): str(prompt) for file, prompt in pictures.items()} if table == dict(origin) else {}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}
