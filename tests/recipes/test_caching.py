"""What is computed once and kept: through the command line, on pictures that change between the runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune import cli

VARIED = """
[data]
prompt = "a photo of sks dog"

[captions]
shuffle_tags = true
tag_dropout = 0.3
caption_dropout = 0.2
caption_variants = 3

[framing]
resolution = 64
crop = "random"
crop_variants = 2
flip = true
min_kept = 0.2
max_upscale = 9
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures that differ, one of them tall, with tags."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate([(90, 64), (64, 64), (64, 120)]):
        noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks dog, red, on a sofa, number {number}")
    return folder


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    file = tmp_path / "varied.toml"
    file.write_text(VARIED)
    return file


def train(model: Path, pictures: Path, output: Path, *flags: str, recipe: str = "lora") -> list[float]:
    """The losses of a run of four steps."""
    given = ["--model", str(model), "--data", str(pictures), "--output", str(output), "--tracker", "none", "--no-prior"]
    cli.main(["train", recipe, *given, "--steps", "4", "--batch-size", "2", *flags])
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


def computed(said: str) -> dict[str, int]:
    """What a run says that it computed, by kind."""
    return {what: int(new) for new, what in re.findall(r"(\d+) of \d+ (\w+)", said.rpartition("computed: ")[2])}


def test_a_second_run_computes_only_what_has_changed(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, model: Path = tiny_models["sd"]) -> dict[str, int]:
        capsys.readouterr()
        train(model, pictures, tmp_path / name)
        return computed(capsys.readouterr().out)

    assert run("one") == {"pictures": 3, "captions": 3}
    assert run("two") == {"pictures": 0, "captions": 0}

    (pictures / "1.png").rename(pictures / "renamed.png")
    (pictures / "1.txt").rename(pictures / "renamed.txt")
    assert run("another name") == {"pictures": 0, "captions": 0}

    Image.effect_noise((64, 64), 90).convert("RGB").save(pictures / "renamed.png")
    assert run("another picture, same name") == {"pictures": 1, "captions": 0}

    (pictures / "0.txt").write_text("sks dog, blue")
    assert run("another caption") == {"pictures": 0, "captions": 1}

    changed = shutil.copytree(tiny_models["sd"], tmp_path / "changed")
    file = changed / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["quant_conv.bias"] += 1e-3
    save_file(weights, file)
    assert run("another VAE", changed) == {"pictures": 3, "captions": 0}


@pytest.mark.parametrize("recipe", ["lora", "dreambooth"])
def test_with_and_without_the_cache_the_losses_are_the_same(
    recipe: str, tiny_models: dict[str, Path], pictures: Path, varied: Path, tmp_path: Path
) -> None:
    """Flips, random crops, shuffled and dropped tags, dropped captions; computed, found and kept in memory only."""
    flags = ["--config", str(varied)]
    cold = train(tiny_models["sdxl"], pictures, tmp_path / "cold", *flags, recipe=recipe)
    warm = train(tiny_models["sdxl"], pictures, tmp_path / "warm", *flags, recipe=recipe)
    plain = train(tiny_models["sdxl"], pictures, tmp_path / "plain", *flags, "--no-use-cache", recipe=recipe)
    assert len(set(cold)) == 4
    assert cold == pytest.approx(warm, abs=1e-6)
    assert cold == pytest.approx(plain, abs=1e-6)


def test_what_was_cached_ahead_is_found(
    tiny_models: dict[str, Path], pictures: Path, varied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(tiny_models["sd"]), "--config", str(varied)]
    cli.main(["data", "cache", str(pictures), *given])
    ahead = computed(capsys.readouterr().out)
    # A square offers one place to crop, the others two; each mirrored too.
    assert ahead["pictures"] == 10 and ahead["captions"] > 3
    cli.main(["data", "cache", str(pictures), *given])
    assert set(computed(capsys.readouterr().out).values()) == {0}
    train(tiny_models["sd"], pictures, tmp_path / "run", "--config", str(varied))
    assert set(computed(capsys.readouterr().out).values()) == {0}


def test_the_cache_goes_where_it_is_told(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    train(tiny_models["sd"], pictures, tmp_path / "run", "--cache", str(tmp_path / "kept"))
    kept = sorted(path.relative_to(tmp_path / "kept").parts[0] for path in (tmp_path / "kept").rglob("*.safetensors"))
    assert kept == ["pictures", "texts"]


def test_nothing_local_is_in_the_cache(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """Neither names nor captions nor the camera's notes: keys are hashes."""
    exif = Image.Exif()
    exif[0x010F] = "SecretCamera"
    Image.open(pictures / "0.png").convert("RGB").save(pictures / "0.png", exif=exif)
    train(tiny_models["sd"], pictures, tmp_path / "run", "--cache", str(tmp_path / "kept"))
    for file in (path for path in (tmp_path / "kept").rglob("*") if path.is_file()):
        for planted in (b"SecretCamera", b"on a sofa", b"0.png", str(tmp_path).encode()):
            assert planted not in file.read_bytes()
