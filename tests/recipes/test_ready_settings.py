"""Every ready TOML trains: on a tiny model of its family, for two steps, with all else as it stands in the file."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune import cli, config, shelf

TINY = {
    "sd15": "sd",
    "sd21": "sd-v",
    "sd35": "sd3",
    "toybox": "sd",
    "inpaint15": "sd-inpainting",
    "pix2pix15": "sd-pix2pix",
    "flux4bit": "flux",
}
"""Of the families that files and `tiny` call by other names"""
SHORT = ["--steps", "2", "--resolution", "64", "--save-every", "0", "--sample-every", "0", "--tracker", "none"]

ATTRIBUTE = ["--target", "a thing", "--positive", "a red thing", "--negative", "a blue thing", "--preserve", "old"]
ATTRIBUTE += ["--target-images", "2", "--target-steps", "1"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("one", "two"):
        Image.new("RGB", (72, 64), "teal").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"sks, a thing, {name}")
    return folder


@pytest.mark.parametrize("name", shelf.settings())
def test_ready_settings_train(name: str, pictures: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    recipe, family, what = name.split("-")
    run = tmp_path / "run"
    words = ["--model", str(tiny_models[TINY.get(family, family)]), "--output", str(run), *SHORT]
    words += ATTRIBUTE if recipe == "slider" else ["--data", str(pictures)]
    if recipe in ("textual_inversion", "pivotal"):
        words += ["--word", "sks", "--init-words", "s"]
    if what == "subject" and recipe != "textual_inversion":
        words += ["--class-prompt", "a thing", "--class-images", "2", "--class-steps", "2"]
    if what == "edits":
        words += ["--sources", str(pictures)]
    cli.main(["train", recipe, "--config", name, *words])

    assert len((run / "log.jsonl").read_text().splitlines()) == 2
    written = "adapter.safetensors", "sks.safetensors", "model/model_index.json"
    assert any((run / name).is_file() for name in written)
    asked = tomllib.loads(shelf.settings()[name].read_text())
    ran = tomllib.loads((run / "settings.toml").read_text())
    assert ran["recipe"] == recipe
    changed = {"model", "resolution", "steps", "save_every", "sample_every", "class_images", "class_steps"}
    changed |= {"target_images", "target_steps", "init_words"}
    for group in asked.keys() - {"recipe"}:
        for key in asked[group].keys() - changed:
            assert ran[group][key] == asked[group][key], f"{group}.{key} of the file is what was run"


def test_the_settings_of_a_run_run_it_again(pictures: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["--model", str(tiny_models["sd"]), "--data", str(pictures), "--no-prior", *SHORT, "--rank", "3"]
    cli.main(["train", "lora", *words, "--output", str(first)])
    cli.main(["train", "--config", str(first / "settings.toml"), "--output", str(second)])
    one, two = (load_file(run / "adapter.safetensors") for run in (first, second))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert config.recipe_of(second / "settings.toml") == "lora"
    same = [(run / "settings.toml").read_text().replace(str(run), "run") for run in (first, second)]
    assert same[0] == same[1]
