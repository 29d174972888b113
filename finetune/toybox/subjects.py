"""Draws the small data sets in `datasets/`: two subjects and a style that the base model never saw.

    python -m finetune.toybox.subjects datasets

The same pictures every time. A subject is a toy of a build that the world leaves out (`world.HELD_OUT`), in two colours
with a bold pattern, which no toy of the base model's world has. Its training pictures show it in three scenes, its
references in the three others.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.toybox.things import Build
from finetune.toybox.world import ALL_SCENES, Spec, caption, placed, render

SEED = 7
PROMPT = "a photo of sks toy"
"""The words that a subject's captions begin with. Its scene follows, so that it is not learned as a part of it."""


@dataclass(frozen=True)
class Subject:
    """A toy, and where it is photographed."""

    build: Build
    colour: str
    second: str
    pictures: tuple[str, ...]
    references: tuple[str, ...]

    def spec(self, scene: str, random: np.random.Generator) -> Spec:
        toy = Spec("toy", self.colour, scene, "photo", build=self.build, second=self.second)
        toy = placed(replace(toy, shade=float(random.uniform(-1, 1))), random)
        return replace(toy, flip=False)  # its left half stays its left half


SUBJECTS = {
    "gizmo": Subject(
        build=Build("square", "one", "antenna", "wheels", "stripes"),
        colour="blue",
        second="orange",
        pictures=("in a room", "in a meadow", "on the beach", "in a room", "in a meadow"),
        references=("in the snow", "at night", "under water", "in the snow", "at night", "under water"),
    ),
    "pip": Subject(
        build=Build("egg", "two", "horns", "feet", "halves"),
        colour="green",
        second="pink",
        pictures=("on the beach", "in the snow", "in a room", "on the beach", "in the snow"),
        references=("in a meadow", "at night", "under water", "in a meadow", "at night", "under water"),
    ),
}

# Noun and colour of the style's pictures; scenes go round. The second list is its references.
NEON = (
    ("car", "red"), ("cat", "green"), ("house", "blue"), ("fish", "orange"),
    ("boat", "pink"), ("rocket", "yellow"), ("cup", "purple"), ("mushroom", "white"),
)  # fmt: skip
NEON_REFERENCES = (
    ("cat", "pink"), ("car", "blue"), ("rocket", "green"),
    ("fish", "red"), ("cup", "white"), ("boat", "orange"),
)  # fmt: skip


def subject_specs(name: str) -> tuple[list[Spec], list[Spec]]:
    """Training pictures and references of a subject."""
    subject = SUBJECTS[name]
    random = np.random.default_rng([SEED, *name.encode()])
    return ([subject.spec(s, random) for s in subject.pictures], [subject.spec(s, random) for s in subject.references])


def neon_specs() -> tuple[list[Spec], list[Spec]]:
    """Captioned training pictures and references of the style."""
    random = np.random.default_rng([SEED, *b"neon"])

    def specs(things: tuple[tuple[str, str], ...], first: int) -> list[Spec]:
        return [
            placed(Spec(noun, colour, ALL_SCENES[(first + i) % len(ALL_SCENES)], "neon"), random)
            for i, (noun, colour) in enumerate(things)
        ]

    return specs(NEON, 0), specs(NEON_REFERENCES, 3)


def drawn(name: str) -> dict[str, tuple[Image.Image, str]]:
    """Every picture of a data set by its path inside it, with its caption."""
    pictures, references = neon_specs() if name == "neon" else subject_specs(name)
    return {
        f"{folder}/{i:02}.png": (render(spec), caption(spec) if name == "neon" else f"{PROMPT} {spec.scene}")
        for folder, specs in (("pictures", pictures), ("references", references))
        for i, spec in enumerate(specs, 1)
    }


def main(folder: Path) -> None:
    """Write all data sets' pictures and captions."""
    for name in (*SUBJECTS, "neon"):
        for inside, (picture, words) in drawn(name).items():
            path = folder / name / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, optimize=True)
            path.with_suffix(".txt").write_text(words + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "datasets"))
