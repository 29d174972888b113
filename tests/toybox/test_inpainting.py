"""The commands that make an inpainting checkpoint of toybox and tune it, from end to end, with few steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from finetune import cli
from finetune.toybox import filling

QUICK = """
recipe = "lora"
[prior]
class_images = 2
class_steps = 2
[optim]
lr = 2e-2
[train]
steps = 2
[measure]
measure = "off"
"""


def test_it_is_made_stopped_gone_on_with_and_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, filled = tmp_path / "made", tmp_path / "filled"
    making = ["toybox", "inpainting", "--output", str(made), "--pictures", "4", "--steps", "2"]
    cli.main(making)
    assert len([*(made / "world").glob("*.png")]) == len([*(made / "world").glob("*.txt")]) == 4
    with pytest.raises(SystemExit) as finished:
        cli.main(making)
    assert finished.value.code == 0 and "nothing is left to do" in " ".join(capsys.readouterr().err.split())
    start, model = (StableDiffusionInpaintPipeline.from_pretrained(made / name) for name in ("start", "run/model"))
    told = [pipeline.unet.conv_in.weight[:, 4:].abs().sum() for pipeline in (start, model)]
    assert told[0] == 0 and told[1] > 0, "it learns from what it is told besides the noise"

    (tmp_path / "quick.toml").write_text(QUICK)
    monkeypatch.setattr(filling, "SETTINGS", str(tmp_path / "quick.toml"))
    monkeypatch.setattr(filling, "SAMPLING_STEPS", 2)
    cli.main(["toybox", "fill", "--model", str(made / "run" / "model"), "--output", str(filled), "--count", "1"])
    said = " ".join(capsys.readouterr().out.split())
    assert "filled by the base" in said and "--model" in said
    with Image.open(filled / "filled.png") as sheet:
        assert sheet.width > 4 * 64 and sheet.height > 4 * 64
    assert len([*(filled / "pictures").glob("*.png")]) == len([*(filled / "masks").glob("*.png")]) == 6


def test_a_mask_covers_its_thing(tmp_path: Path) -> None:
    hole = filling.masked(tmp_path, "on the beach", "cup", "purple")
    assert hole.mask is not None
    pixels, inside = np.asarray(hole.picture).astype(int), np.asarray(hole.mask) > 0
    purple = (pixels[..., 2] > pixels[..., 1] + 60) & (pixels[..., 0] > pixels[..., 1] + 40)
    assert purple[inside].sum() > 100 and not purple[~inside].any() and 0.1 < inside.mean() < 0.9


@pytest.mark.slow
def test_masks_are_filled_with_the_subject(tmp_path: Path) -> None:
    """As docs/inpainting.md has it: the base knows nothing of gizmo, and draws it into masks once it was tuned."""
    cli.main(["toybox", "inpainting", "--output", str(tmp_path / "made")])
    cli.main(["toybox", "fill", "--model", str(tmp_path / "made" / "run" / "model"), "--output",
              str(tmp_path / "filled"), "--steps", "200", "--count", "2"])  # fmt: skip
    figures = json.loads((tmp_path / "filled" / "figures.json").read_text())
    base, tuned = (np.mean(figures[what]) for what in ("filled by the base", "filled with its file"))
    assert base < 0.2 and tuned > base + 0.4
