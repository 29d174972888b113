"""Textual-inversion embeddings through `finetune generate`: as diffusers loads them, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image as Images
from safetensors.torch import save_file

from finetune import embeddings, families
from finetune.cli import main
from finetune.families import Source

WIDTHS = {"sd": (16,), "sdxl": (16, 24)}


def vectors(width: int, count: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(width + count))


def words(output: Path, model: Path, file: Path, prompt: str, *more: str) -> list[str]:
    asked = ["--model", str(model), "--embedding", str(file), "--prompt", prompt, "--output", str(output)]
    return ["generate", *asked, "--steps", "2", *more]


def drawn(output: Path, model: Path, file: Path, prompt: str, *more: str) -> np.ndarray:
    main(words(output, model, file, prompt, *more))
    [picture] = output.glob("*.png")
    return np.asarray(Images.open(picture)).astype(int)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("prompt", ["a photo of sksdog there", "a photo of (sksdog:1.0)"])
def test_a_word_is_what_diffusers_makes_of_it(
    kind: str, count: int, prompt: str, tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    names = ("emb_params",) if kind == "sd" else ("clip_l", "clip_g")
    tensors = {name: vectors(width, count) for name, width in zip(names, WIDTHS[kind], strict=True)}
    save_file(tensors, tmp_path / "sksdog.safetensors")
    ours = drawn(tmp_path / "out", tiny_models[kind], tmp_path / "sksdog.safetensors", prompt)
    pipeline = DiffusionPipeline.from_pretrained(tiny_models[kind])
    for name, end in zip(names, ("", "_2"), strict=False):
        parts = {
            "tokenizer": getattr(pipeline, f"tokenizer{end}"),
            "text_encoder": getattr(pipeline, f"text_encoder{end}"),
        }
        pipeline.load_textual_inversion(tensors[name], token="sksdog", **parts)
    text = prompt.replace("(", "").replace(":1.0)", "")
    theirs = pipeline(
        text, num_inference_steps=2, guidance_scale=5.0, generator=torch.Generator("cpu").manual_seed(0)
    ).images[0]
    assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1


def test_a_word_with_capitals(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """CLIP's tokenizers know small letters only; the word is found as it is written."""
    for name in ("MyDog-v2", "mydog-v2"):
        save_file({"emb_params": vectors(16, 2)}, tmp_path / f"{name}.safetensors")
    big, small = (
        drawn(tmp_path / name, tiny_models["sd"], tmp_path / f"{name}.safetensors", f"a {name}, smiling")
        for name in ("MyDog-v2", "mydog-v2")
    )
    assert np.abs(big - small).max() <= 1


def test_a_file_may_name_its_word(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """diffusers' own format."""
    save_file({"<toy>": vectors(16, 2)}, tmp_path / "learned_embeds.safetensors")
    other = drawn(tmp_path / "one", tiny_models["sd"], tmp_path / "learned_embeds.safetensors", "a <toy>")
    main(["generate", "--model", str(tiny_models["sd"]), "--prompt", "a <toy>", "--steps", "2",
          "--output", str(tmp_path / "two")])  # fmt: skip
    without = np.asarray(Images.open(next((tmp_path / "two").glob("*.png")))).astype(int)
    assert np.abs(other - without).max() > 0


@pytest.mark.parametrize(
    ("tensors", "prompt", "expected"),
    [
        ({"emb_params": vectors(16, 2)}, "a photo of a dog", "no prompt says its word"),
        ({"emb_params": vectors(16, 2)}, "a photo of sksdogs", "no prompt says its word"),
        ({"emb_params": vectors(24, 2)}, "a photo of sksdog", "are 24 wide, this Stable Diffusion model's are 16"),
        ({"clip_l": vectors(16, 2), "clip_g": vectors(24, 2)}, "a sksdog", "16 and 24 wide"),
        ({"unet.lora_A": vectors(16, 2), "unet.lora_B": vectors(16, 2)}, "a sksdog", "An adapter goes with --adapter"),
        (None, "a sksdog", "sksdog.safetensors"),
    ],
)
def test_what_would_change_nothing_or_does_not_fit_is_refused(
    tensors: dict[str, torch.Tensor] | None,
    prompt: str,
    expected: str,
    tmp_path: Path,
    tiny_models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "sksdog.safetensors"
    if tensors is not None:
        save_file(tensors, file)
    with pytest.raises(SystemExit) as stop:
        main(words(tmp_path / "out", tiny_models["sd"], file, prompt))
    assert stop.value.code == 2 and expected in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_word_that_is_one_already_is_refused(tmp_path: Path) -> None:
    """In the embedded model's vocabulary `dog</w>` is a token, `dog` is no word of a file's."""
    family = families.load(Source("toybox"))
    taken = next(iter(family.pipeline.tokenizer.get_vocab()))
    width = family.pipeline.text_encoder.config.hidden_size
    with pytest.raises(embeddings.Fault, match="already in tokenizer vocabulary"):
        embeddings.put_on(family, embeddings.Embedding(tmp_path / "a.safetensors", taken, (vectors(width, 1),)))
