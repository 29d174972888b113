"""The demo from end to end, with few steps: its command, its picture and its figures."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
from PIL import Image

from finetune import cli, demo, shelf
from finetune.toybox.subjects import SUBJECTS

QUICK = """
recipe = "lora"
[prior]
class_images = 2
class_steps = 2
[train]
steps = 2
[measure]
measure_steps = 1
"""


def test_the_subjects_are_those_that_are_shipped() -> None:
    names = typing.get_args(typing.get_type_hints(demo.Config)["subject"])
    assert {*names} == {*SUBJECTS}
    assert all([*(shelf.datasets() / name / "pictures").glob("*.png")] for name in names)


def test_the_demo_trains_draws_and_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quick.toml").write_text(QUICK)
    monkeypatch.setattr(demo, "SETTINGS", str(tmp_path / "quick.toml"))
    monkeypatch.setattr(demo, "EACH", 1)
    monkeypatch.setattr(demo, "SAMPLING_STEPS", 2)
    folder = tmp_path / "out"

    cli.main(["demo", "--output", str(folder), "--subject", "pip", "--seed", "3"])

    said = " ".join(capsys.readouterr().out.split())
    assert "finetune train lora --config" in said and "likeness" in said and "Verdict on step-000002: " in said
    assert (folder / "run" / "adapter.safetensors").is_file()
    with Image.open(folder / "demo.png") as picture:
        assert picture.width > 5 * 64 and picture.height > 3 * 64

    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--output", str(folder)])
    assert stopped.value.code == 2
    assert "there is something there already" in " ".join(capsys.readouterr().err.split())
