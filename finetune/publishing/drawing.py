"""Sample pictures from fixed seeds, and one prompt at several strengths, drawn with the very file that is published."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from finetune import export, sampling
from finetune.families import Family
from finetune.pictures import grid, save_png
from finetune.publishing.release import Drawn

ADAPTER = "published"
"""Name under which the published adapter is on the model."""
FOLDER = "images"
STRENGTH = f"{FOLDER}/strength.png"
Track = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Brush:
    """How all of them are drawn."""

    family: Family
    model: str
    revision: str | None
    adapter: Path | None
    """The adapter file, which is on the model as `ADAPTER`; None: the model alone."""
    steps: int
    guidance: float
    size: int | None
    from_noise: bool
    how: Mapping[str, Any]
    """How the model is held and read, see `Source.how`"""

    def draw(self, prompt: str, seed: int, strength: float = 1.0) -> Image:
        if self.adapter is not None:
            export.set_strengths(self.family, {ADAPTER: strength})
        whole = sampling.everything(self.family, self.size or self.family.resolution())
        [picture] = sampling.sample(
            self.family, [prompt], [seed], steps=self.steps, guidance=self.guidance, size=self.size, initial=whole
        )
        return picture

    def facts(self, prompt: str, seed: int) -> dict[str, Any]:
        """What `save_png` keeps in the picture."""
        return {
            "prompt": prompt,
            "seed": seed,
            "steps": self.steps,
            "guidance": self.guidance,
            "scheduler": self.scheduler,
            "zero_terminal_snr": self.from_noise or None,
            "model": self.model,
            "revision": self.revision,
            **self.how,
        }

    @property
    def scheduler(self) -> str:
        return type(self.family.pipeline.scheduler).__name__

    def adapters(self) -> list[dict[str, Any]]:
        if self.adapter is None:
            return []
        with self.adapter.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [{"name": self.adapter.name, "sha256": digest, "scale": 1.0}]


def samples(brush: Brush, folder: Path, prompts: Sequence[str], seeds: Iterable[int], track: Track) -> list[Drawn]:
    """`images/01-seed0.png` ...: each prompt with each seed."""
    adapters, drawn = brush.adapters(), []
    pairs = [(row, prompt, seed) for seed in seeds for row, prompt in enumerate(prompts)]
    for row, prompt, seed in track(pairs, "draw"):
        name = f"{FOLDER}/{row + 1:02d}-seed{seed}.png"
        save_png(brush.draw(prompt, seed), folder / name, {**brush.facts(prompt, seed), "adapters": adapters})
        drawn.append(Drawn(name, prompt, seed))
    return drawn


def strengths(brush: Brush, folder: Path, prompt: str, seed: int, shown: Sequence[float], track: Track) -> str:
    """`images/strength.png`: one row of the same noise."""
    row = [brush.draw(prompt, seed, strength) for strength in track(shown, "strengths")]
    sheet = grid([row], [""], [f"strength {strength:g}" for strength in shown], prompt)
    save_png(sheet, folder / STRENGTH, brush.facts(prompt, seed))
    return STRENGTH
