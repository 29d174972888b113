"""The small data sets are what the code draws, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.toybox import subjects, world

DATASETS = Path(__file__).parents[2] / "datasets"
NAMES = (*subjects.SUBJECTS, "neon")


@pytest.mark.parametrize("name", NAMES)
def test_pictures_and_captions_are_drawn_by_the_code(name):
    drawn = subjects.drawn(name)
    on_disk = {str(path.relative_to(DATASETS / name)) for path in (DATASETS / name).rglob("*.png")}
    assert on_disk == set(drawn)
    for inside, (picture, words) in drawn.items():
        path = DATASETS / name / inside
        assert (np.asarray(Image.open(path)) == np.asarray(picture)).all(), inside
        assert path.with_suffix(".txt").read_text() == words + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_readme_and_a_licence(name):
    assert "CC0" in (DATASETS / name / "README.md").read_text()
    assert "CC0-1.0" in (DATASETS / name / "LICENSE").read_text()


def test_there_is_no_python_in_the_data_sets():
    assert not list(DATASETS.rglob("*.py"))


def test_subjects_are_new_to_the_base():
    for name, subject in subjects.SUBJECTS.items():
        assert world.is_held_out(subject.build), name
        assert subject.second != subject.colour
        assert not set(subject.pictures) & set(subject.references)
