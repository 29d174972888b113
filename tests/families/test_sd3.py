"""Stable Diffusion 3: a flow, three text encoders of which one may be absent, and prompts that are sentences."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from finetune import cli, families
from finetune.families import Source
from finetune.families.base import skeleton


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "one.png")
    return folder


@pytest.fixture
def without_t5(tmp_path: Path) -> Path:
    parts = tiny.pipeline("sd3").components
    StableDiffusion3Pipeline(**{**parts, "text_encoder_3": None, "tokenizer_3": None}).save_pretrained(tmp_path / "sd3")
    return tmp_path / "sd3"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([*words])
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("recipe", ["lora", "dreambooth"])
def test_it_trains_without_t5(recipe: str, without_t5: Path, pictures: Path, tmp_path: Path) -> None:
    """Its share of the text is zeros, as diffusers and ComfyUI have it; the file is for such a checkpoint as well."""
    family = families.load(Source(str(without_t5)))
    text = family.encode_prompts(["a dog"])["text"]
    assert text.shape == (1, 77 + 256, 48) and not text[:, 77:].any() and text[:, :77].any()
    run = tmp_path / "run"
    given = ["--model", str(without_t5), "--data", str(pictures), "--prompt", "sks dog", "--output", str(run)]
    cli.main(["train", recipe, *given, "--no-prior", "--steps", "2", "--sample-every", "2", "--sample-steps", "1",
              "--text-encoder-lr", "1e-4", "--tracker", "none", "--max-upscale", "4"])  # fmt: skip
    assert (run / "samples" / "step-000002-0.png").is_file()
    if recipe == "dreambooth":
        assert families.load(Source(str(run / "model"))).pipeline.text_encoder_3 is None


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--min-snr-gamma", "5"], "--min-snr-gamma: the model predicts flow.*--timesteps logit_normal"),
        (["--debiased"], "--debiased: the model predicts flow"),
        (["--noise-offset", "0.05"], "--noise-offset: the model predicts flow. It begins at pure noise"),
        (["--zero-terminal-snr"], "--zero-terminal-snr: the model predicts flow. Its last timestep is pure noise"),
    ],
)
def test_what_makes_no_sense_for_a_flow_is_refused(
    flags: list[str], why: str, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["train", "lora", "--model", str(tiny_models["sd3"]), "--data", str(pictures), "--prompt", "sks dog"]
    said = refused(capsys, *words, "--no-prior", "--output", str(tmp_path / "run"), "--max-upscale", "4", *flags)
    assert re.search(why, said), said


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--prompt", "a (red:1.3) dog"], "`(red:1.3)` weighs words, which Stable Diffusion 3 does not know"),
        (["--prompt", "a dog", "--scheduler", "euler"], "drawn by its own FlowMatchEulerDiscreteScheduler only"),
    ],
)
def test_what_it_is_not_drawn_with_is_refused(
    flags: list[str], why: str, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert why in refused(capsys, "generate", "--model", str(tiny_models["sd3"]), "--output", str(out), *flags)


def test_parentheses_are_letters(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    for name, prompt in (("plain", "a dog (red)"), ("escaped", r"a dog \(red\)")):
        words = ["--prompt", prompt, "--steps", "1", "--output", str(tmp_path / name)]
        cli.main(["generate", "--model", str(tiny_models["sd3"]), *words])
    one, other = (Image.open(next((tmp_path / name).glob("*.png"))) for name in ("plain", "escaped"))
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(("edition", "billions"), [(0, 2.24), (1, 8.06), (2, 2.03)])
def test_the_published_editions_have_their_sizes(edition: int, billions: float) -> None:
    """3.5 Medium, 3.5 Large and 3 Medium; without weights."""
    published = families.FAMILIES["StableDiffusion3Pipeline"].published
    parts = skeleton(published, published.editions[edition])
    assert sum(p.numel() for p in parts["transformer"].parameters()) / 1e9 == pytest.approx(billions, abs=0.05)
    assert sum(p.numel() for p in parts["text_encoder_2"].parameters()) / 1e9 == pytest.approx(0.69, abs=0.01)


def test_the_latents_are_shifted_and_scaled(tiny_models: dict[str, Path]) -> None:
    family = families.load(Source(str(tiny_models["sd3"])))
    pictures = torch.rand(1, 3, 64, 64) * 2 - 1
    mean, _ = family.encode_pictures(pictures)
    torch.testing.assert_close(mean, (family.pipeline.vae.encode(pictures).latent_dist.mean - 0.0609) * 1.5305)
