"""What was trained with --zero-terminal-snr is drawn from pure noise, on the way and afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, PNDMScheduler
from PIL import Image

from finetune import cli, families, sampling
from finetune.pictures import read_settings

PROMPT = "a photo of sks dog"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        Image.effect_noise((64, 64), 30 + 60 * number).convert("RGB").save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


def train(recipe: str, model: Path, pictures: Path, run: Path, *flags: str) -> Path:
    given = ["--model", model, "--data", pictures, "--output", run, "--prompt", PROMPT, "--tracker", "none"]
    rest = ["--steps", "1", "--lr", "1e-2", *flags]
    cli.main(["train", recipe, *map(str, given), *rest])
    return run


def generated(output: Path, *words: object) -> Path:
    drawn = ["--prompt", PROMPT, "--steps", "3", "--guidance", "4", "--output", output]
    cli.main(["generate", *map(str, [*drawn, *words])])
    (picture,) = output.glob("*.png")
    return picture


def plainly(model: Path, adapter: Path | None = None, **scheduler: object) -> np.ndarray:
    """As a user of diffusers draws it."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if scheduler:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **scheduler)
    if adapter:
        pipeline.load_lora_weights(adapter.parent, weight_name=adapter.name)
    generator = torch.Generator("cpu").manual_seed(0)
    return pixels(pipeline(PROMPT, generator=generator, num_inference_steps=3, guidance_scale=4.0).images[0])


def pixels(picture: Image.Image | Path) -> np.ndarray:
    return np.asarray(Image.open(picture) if isinstance(picture, Path) else picture).astype(int)


def test_an_adapter_is_drawn_from_pure_noise(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    flags = [
        "--no-prior",
        "--zero-terminal-snr",
        "--sample-every",
        "1",
        "--sample-steps",
        "3",
        "--sample-guidance",
        "4",
    ]
    run = train("lora", tiny_models["sd-v"], pictures, tmp_path / "run", *flags)
    adapter = run / "adapter.safetensors"
    known = plainly(tiny_models["sd-v"], adapter, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    ours = generated(tmp_path / "out", "--model", tiny_models["sd-v"], "--adapter", adapter)
    assert np.abs(pixels(ours) - known).max() <= 1
    assert np.abs(pixels(run / "samples" / "step-000001-0.png") - known).max() <= 1
    assert read_settings(ours)["zero_terminal_snr"] is True
    assert np.abs(known - plainly(tiny_models["sd-v"], adapter)).max() > 5, "another scheduler, another picture"


def test_a_whole_model_carries_its_scheduler(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    run = train("dreambooth", tiny_models["sd-v"], pictures, tmp_path / "run", "--no-prior", "--zero-terminal-snr")
    said = json.loads((run / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert said["rescale_betas_zero_snr"] is True and said["timestep_spacing"] == "trailing"
    ours = generated(tmp_path / "out", "--model", run / "model")
    assert np.abs(pixels(ours) - plainly(run / "model")).max() <= 1
    assert families.load(families.Source(str(run / "model"))).objective().alphas_cumprod[-1] < 1e-6


def test_the_base_is_asked_about_the_same_noise(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """So that in the first step, what is taught is what is predicted already: the loss is the subject's alone."""
    word = ["--trigger", "sks", "--class-word", "dog", "--prior-from", "base", "--class-images", "2"]
    losses = []
    for name, flags in (("taught", word), ("alone", ["--no-prior"])):
        run = train("dreambooth", tiny_models["sd-v"], pictures, tmp_path / name, "--zero-terminal-snr", *flags)
        losses.append(json.loads((run / "log.jsonl").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_model_that_predicts_the_noise_is_refused(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train("lora", tiny_models["sd"], pictures, tmp_path / "run", "--no-prior", "--zero-terminal-snr")
    assert stop.value.code == 2 and "the model predicts epsilon" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [("sd-v", PNDMScheduler, DDIMScheduler), ("sdxl", EulerDiscreteScheduler, EulerDiscreteScheduler)],
)
def test_a_scheduler_that_cannot_gives_way(kind: str, given: type, expected: type) -> None:
    family = families.wrap(tiny.pipeline(kind))
    family.pipeline.scheduler = given.from_config(family.pipeline.scheduler.config)
    before = dict(family.pipeline.scheduler.config)
    sampling.begin_at_noise(family)
    after = family.pipeline.scheduler
    assert type(after) is expected
    assert after.config.rescale_betas_zero_snr is True and after.config.timestep_spacing == "trailing"
    assert after.config.beta_end == before["beta_end"] and after.config.prediction_type == before["prediction_type"]
