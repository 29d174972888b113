"""Inpainting checkpoints under training: told what diffusers' pipelines tell them, better under a mask afterwards."""

from __future__ import annotations

from pathlib import Path

import measured
import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoPipelineForInpainting, DiffusionPipeline
from PIL import Image

from finetune import cli, export, families, sampling
from finetune.data import read_plain
from finetune.data.framing.holes import hole
from finetune.families import Source
from finetune.initial import Initial


@pytest.fixture(params=tiny.INPAINTING)
def folder(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Path:
    return tiny_models[request.param]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    made = tmp_path / "pictures"
    made.mkdir()
    for number, colour in enumerate(["red", "orange", "brown"]):
        Image.new("RGB", (64, 64), colour).save(made / f"{number}.png")
    return made


def test_it_is_told_what_diffusers_tells_it(folder: Path, pictures: Path) -> None:
    """The mask, and the latents of the picture that is grey under it: means, where the VAE's spread is taken away."""
    family = families.load(Source(str(folder)))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    data = measured.encoded(family, read_plain(pictures, "a dog"))
    item, told = data.subjects[0], []
    for number in range(data.holes):
        mask, mean, _ = data.hole(item, item.views[0], number)
        wide = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[None]
        picture = pipeline.image_processor.preprocess(Image.open(item.example.path))
        with torch.no_grad():
            masked = pipeline.vae.encode(picture * (wide < 0.5)).latent_dist.mean * pipeline.vae.config.scaling_factor
        torch.testing.assert_close(mean[None], masked, rtol=1e-4, atol=1e-5)
        told.append(float(mask.mean()))
    assert data.holes == 8 and len({*told}) > 3
    (batch,) = measured.batches(data, 6)
    assert batch.beside is not None and batch.beside.shape == (6, 5, 8, 8)
    assert {*batch.beside[:, 0].unique().tolist()} <= {0.0, 1.0}
    assert torch.equal(measured.batches(data, 6)[0].beside, batch.beside), "it follows from the step and the slot alone"


def test_holes_are_of_all_sizes_and_a_quarter_is_everything() -> None:
    shares = np.array([float(hole((16, 24), "picture", number).mean()) for number in range(400)])
    assert shares.min() > 0 and 0.18 < (shares == 1).mean() < 0.35
    part = shares[shares < 1]
    assert part.min() < 0.1 and part.max() > 0.6 and 0.15 < part.mean() < 0.5
    assert torch.equal(hole((16, 24), "a", 3), hole((16, 24), "a", 3))


@pytest.mark.parametrize("recipe", ["lora", "dreambooth"])
def test_it_trains_and_fills_masks_better(
    recipe: str, folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With class pictures, samples and measuring, all drawn under a mask of everything; diffusers loads what is
    written. So are the pictures of what is published, and the card tells how to fill a mask.
    """
    run, rate = tmp_path / "run", "5e-2" if recipe == "lora" else "2e-3"
    cli.main(["train", recipe, "--model", str(folder), "--data", str(pictures), "--prompt", "sks dog", "--output",
              str(run), "--class-prompt", "a dog", "--class-images", "2", "--class-steps", "2", "--tracker", "none",
              "--steps", "24", "--batch-size", "3", "--lr", rate, "--sample-every", "24", "--sample-steps", "2",
              "--max-upscale", "4", "--measure", "toybox", "--measure-prompts", "red sks dog",
              "--measure-steps", "1"])  # fmt: skip
    assert (run / "samples" / "step-000024-0.png").is_file()
    assert (run / "measured" / "step-000024" / "subject-01-seed0.png").is_file()
    assert capsys.readouterr().out.rstrip().endswith('--prompt "sks dog" --init PICTURE --mask MASK')
    cli.main(["publish", str(run), "--repo", "mary/sks-dog", "--base-model", "mary/inpainting", "--steps", "1",
              "--count", "1", "--size", "64"])  # fmt: skip
    card = (run / "publish" / "README.md").read_text()
    assert "under a mask of everything" in card and "image=image, mask_image=mask, strength=1.0)" in card
    losses = []
    for made in (folder, folder if recipe == "lora" else run / "model"):
        pipeline = AutoPipelineForInpainting.from_pretrained(made)
        if losses and recipe == "lora":
            pipeline.load_lora_weights(run, weight_name="adapter.safetensors")
        family = families.wrap(pipeline)
        families.freeze(family)
        losses.append(measured.loss(family, measured.encoded(family, read_plain(pictures, "sks dog"))))
    assert losses[1] < 0.99 * losses[0]


def test_what_is_drawn_with_the_file_is_plain_diffusers_picture(folder: Path, pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cli.main(["train", "lora", "--model", str(folder), "--data", str(pictures), "--prompt", "sks dog", "--no-prior",
              "--output", str(run), "--tracker", "none", "--steps", "3", "--lr", "5e-2"])  # fmt: skip
    picture, mask = Image.open(pictures / "0.png"), Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    pipeline = AutoPipelineForInpainting.from_pretrained(folder)
    pipeline.load_lora_weights(run, weight_name="adapter.safetensors")
    theirs = pipeline("a dog", image=picture, mask_image=mask, strength=1.0, num_inference_steps=2, guidance_scale=4.0,
                      height=64, width=64, generator=torch.Generator("cpu").manual_seed(3)).images[0]  # fmt: skip
    family = families.load(Source(str(folder)))
    export.attach(family, run / "adapter.safetensors", "one")
    start = Initial(picture, 1.0, mask)
    [ours] = sampling.sample(family, ["a dog"], [3], initial=start, steps=2, guidance=4.0, size=64)
    apart = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
    assert apart[:, 32:].max() <= 1


def test_a_film_strip_of_it_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main(["explain", "--model", str(folder), "--prompt", "a dog", "--output", str(tmp_path / "strip.png")])
    assert refused.value.code == 2
    assert "InpaintPipeline, which draws from a picture" in " ".join(capsys.readouterr().err.split())
