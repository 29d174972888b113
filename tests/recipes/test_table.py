"""Every family x recipe x precision: trains, the loss falls, what is frozen stays, the files load back equal."""

from __future__ import annotations

import gc
import json
import tomllib
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from finetune import cli, keys, loop

KINDS = ["sd", "sd-v", "sdxl"]
RECIPES = ["lora", "dreambooth"]
FLAGS = {
    "lora": ["--rank", "4", "--alpha", "8", "--lr", "2e-2"],
    "dreambooth": ["--lr", "2e-3"],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three plain pictures of different shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, (size, colour) in enumerate([((80, 64), "red"), ((64, 64), "orange"), ((64, 100), "brown")]):
        Image.new("RGB", size, colour).save(folder / f"{number}.png")
    return folder


def train(recipe: str, model: Path, pictures: Path, output: Path, *flags: str) -> Path:
    """Run a recipe as a user does; the run's folder."""
    given = ["train", recipe, "--model", str(model), "--data", str(pictures), "--prompt", "a photo of sks dog"]
    prior = ["--class-prompt", "a photo of a dog", "--class-images", "2", "--class-steps", "2"]
    base = [*given, *prior, "--output", str(output), "--tracker", "none", *FLAGS[recipe], *flags]
    assert cli.main(base) == 0
    return output


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def result(run: Path) -> dict[str, torch.Tensor]:
    """What was trained: the adapter's or the UNet's tensors."""
    adapter = run / "adapter.safetensors"
    return load_file(adapter if adapter.exists() else run / "model" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_exports_what_loads_back(
    kind: str, recipe: str, precision: str, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """The recipe itself loads each file back and refuses a difference; here plain diffusers must load it too."""
    steps = 24
    flags = ("--steps", str(steps), "--batch-size", "4", "--precision", precision)
    run = train(recipe, tiny_models[kind], pictures, tmp_path / "run", *flags)
    seen = losses(run)
    assert len(seen) == steps
    assert sum(seen[-6:]) < 0.9 * sum(seen[:6])
    if recipe == "lora":
        pipeline = DiffusionPipeline.from_pretrained(tiny_models[kind])
        pipeline.load_lora_weights(run / "adapter.safetensors")
        config = pipeline.unet.peft_config["default_0"]
        assert (config.r, config.lora_alpha) == (4, 8)
    else:
        pipeline = DiffusionPipeline.from_pretrained(run / "model")
    image = pipeline("a photo of sks dog", num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)
    settings = tomllib.loads((run / "settings.toml").read_text())
    assert settings["train"]["precision"] == precision
