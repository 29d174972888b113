"""PNG files that carry their settings and nothing local; labelled grids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Images
from PIL import ImageFont
from PIL.Image import Image

from finetune import pictures

FACTS = {
    "prompt": "a photo of a dög, <b>sitting</b>",
    "negative": "blurry",
    "seed": 4_000_000_000,
    "steps": 30,
    "guidance": 5.0,
    "scheduler": "DDIMScheduler",
    "model": "stabilityai/sdxl",
    "adapters": [{"name": "/home/mary/dog.safetensors", "sha256": "ab" * 32, "scale": 0.8}],
}


def plain(colour: str, width: int = 64, height: int = 64) -> Image:
    return Images.new("RGB", (width, height), colour)


def test_settings_are_read_back(tmp_path: Path) -> None:
    pictures.save_png(plain("red", 64, 48), tmp_path / "a.png", FACTS)
    told = pictures.read_settings(tmp_path / "a.png")
    assert {name: told[name] for name in FACTS if name != "adapters"} == {
        k: v for k, v in FACTS.items() if k != "adapters"
    }
    assert told["adapters"] == [{"name": "dog.safetensors", "sha256": "ab" * 32, "scale": 0.8}]
    assert (told["width"], told["height"]) == (64, 48)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


def test_the_style_uis_find_their_parameters(tmp_path: Path) -> None:
    """AUTOMATIC1111's form: prompt, `Negative prompt: `, then a line of `Name: value` pairs."""
    pictures.save_png(plain("red"), tmp_path / "a.png", FACTS)
    prompt, negative, pairs = Images.open(tmp_path / "a.png").text["parameters"].split("\n")
    assert prompt == "a photo of a dög, <b>sitting</b> <lora:dog:0.8>"
    assert negative == "Negative prompt: blurry"
    assert pairs == (
        "Steps: 30, Sampler: DDIMScheduler, CFG scale: 5.0, Seed: 4000000000, Size: 64x64, Model: stabilityai/sdxl"
    )


def test_nothing_local_is_written(tmp_path: Path) -> None:
    model = tmp_path / "models" / "secret-folder"
    model.mkdir(parents=True)
    facts = {**FACTS, "model": str(model), "output": str(tmp_path), "user": "mary", "host": "marys-laptop"}
    pictures.save_png(plain("red"), tmp_path / "a.png", facts)
    raw = (tmp_path / "a.png").read_bytes()
    for local in (str(tmp_path), "secret-folder", "/home", "mary", "laptop"):
        assert local.encode() not in raw, local
    assert pictures.read_settings(tmp_path / "a.png")["model"] == "local"


def test_other_pictures_have_no_settings(tmp_path: Path) -> None:
    plain("red").save(tmp_path / "a.png")
    plain("red").save(tmp_path / "a.jpg")
    assert pictures.read_settings(tmp_path / "a.png") == pictures.read_settings(tmp_path / "a.jpg") == {}


def test_the_json_is_sorted_and_the_same_each_time(tmp_path: Path) -> None:
    pictures.save_png(plain("red"), tmp_path / "a.png", FACTS)
    pictures.save_png(plain("red"), tmp_path / "b.png", dict(reversed(FACTS.items())))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    text = Images.open(tmp_path / "a.png").text["finetune"]
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_a_grid_holds_every_picture_enlarged_by_a_whole_factor() -> None:
    noise = Images.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    sheet = pictures.grid([[noise, plain("red")], [plain("lime"), plain("blue")]], ["one", "two"], ["a", "b"], "title")
    wide = np.asarray(noise.resize((192, 192), Images.Resampling.NEAREST)).astype(int)
    array = np.asarray(sheet).astype(int)
    corners = [
        (y, x) for y in range(sheet.height - 192) for x in range(sheet.width - 192) if (array[y, x] == wide[0, 0]).all()
    ]
    assert any(np.array_equal(array[y : y + 192, x : x + 192], wide) for y, x in corners)
    for colour in ([255, 0, 0], [0, 255, 0], [0, 0, 255]):
        assert (array == colour).all(2).sum() == 192 * 192


def test_labels_stand_before_their_row_and_above_their_column() -> None:
    sheet = pictures.grid([[plain("red"), plain("lime")]], ["row"], ["", "column"])
    array = np.asarray(sheet).astype(int)
    ink = (array.sum(2) < 100) & ~(array == [255, 0, 0]).all(2)
    red, lime = ((array == colour).all(2).nonzero() for colour in ([255, 0, 0], [0, 255, 0]))
    ys, xs = ink.nonzero()
    before = xs < red[1].min()
    assert before.any() and (ys[before] > red[0].min()).all() and (ys[before] < red[0].max()).all()
    assert (~before).any() and (ys[~before] < lime[0].min()).all() and (xs[~before] >= lime[1].min()).all()


def test_long_labels_are_wrapped_and_none_is_lost() -> None:
    prompt = "a photo of a very small dog " * 12
    sheet = pictures.grid([[plain("red")]], [prompt], ["seed " * 30], "title " * 40)
    assert sheet.width < 3 * 192, "a long label does not widen the table beyond a second column"
    short = pictures.grid([[plain("red")]], ["a"], ["seed"], "title")
    assert sheet.height > short.height + 192


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=80), width=st.integers(40, 300))
def test_wrapped_lines_fit_and_keep_every_letter(text: str, width: int) -> None:
    font, bare = ImageFont.load_default(14), pictures.plain(text)
    lines = pictures.wrap(bare, font, width)
    assert "".join("".join(lines).split()) == "".join(bare.split())
    assert all(font.getlength(line) <= width + 0.5 for line in lines)


def test_letters_that_the_font_lacks_are_still_told() -> None:
    assert pictures.plain("Übergröße") == "Ubergro\\xdfe"
    assert pictures.plain("犬") == "\\u72ac"


def test_rows_and_labels_must_agree() -> None:
    with pytest.raises(ValueError, match="2 columns"):
        pictures.grid([[plain("red")]], ["row"], ["a", "b"])
