"""FLUX.1 and FLUX.2 klein: what they are told, what they are not, and their published sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune import cli, families
from finetune.families import Source
from finetune.families.base import skeleton


@pytest.mark.parametrize(
    ("pipeline", "billions"), [("FluxPipeline", [11.90, 11.89]), ("Flux2KleinPipeline", [3.88, 9.08])]
)
def test_the_published_editions_have_their_sizes(pipeline: str, billions: list[float]) -> None:
    published = families.FAMILIES[pipeline].published
    parts = [skeleton(published, edition)["transformer"] for edition in published.editions]
    sizes = [sum(p.numel() for p in part.parameters()) / 1e9 for part in parts]
    assert sizes == pytest.approx(billions, abs=0.01)


def test_klein_latents_are_those_of_its_pipeline(tiny_models: dict[str, Path]) -> None:
    """In squares, and of mean 0 and variance 1 by the statistics that its VAE carries."""
    family = families.load(Source(str(tiny_models["klein"])))
    pictures = torch.rand(1, 3, 64, 96) * 2 - 1
    mean, std = family.encode_pictures(pictures)
    torch.testing.assert_close(mean, family.pipeline._encode_vae_image(pictures, None))
    assert mean.shape == (1, 16, 4, 6) and (std > 0).all()


@pytest.mark.parametrize(
    ("kind", "words", "why"),
    [
        ("flux", ["generate", "--negative", "blurry"], "--negative 'blurry': FLUX.1 is told"),
        (
            "klein",
            ["generate", "--negative", "blurry"],
            "--negative 'blurry': FLUX.2 klein is guided against the empty",
        ),
        ("klein", ["generate", "--init"], "--init: there is no drawing from a picture with FLUX.2 klein"),
        ("klein", ["train", "lora", "--text-encoder-lr", "1e-5"], "--text-encoder-lr: the text encoders of FLUX.2"),
    ],
)
def test_what_they_do_not_know_is_refused(
    kind: str,
    words: list[str],
    why: str,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "pictures").mkdir()
    picture = tmp_path / "pictures" / "one.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    words = [*words, str(picture)] if words[-1] == "--init" else words
    more = (
        ["--size", "64"]
        if words[0] == "generate"
        else ["--data", str(picture.parent), "--no-prior", "--resolution", "64"]
    )
    given = ["--model", str(tiny_models[kind]), "--prompt", "a dog", "--output", str(tmp_path / "out"), *more]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, *given])
    assert stop.value.code == 2
    assert why in " ".join(capsys.readouterr().err.split())
