"""Clip skip and chunks: captions, class pictures and samples are read in one way, which files and commands tell on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTextModel

from finetune import adapters, cli, export, families, prompting, sampling
from finetune.data.encoding import _encoders_fingerprint
from finetune.export import trained
from finetune.families import Family, Source
from finetune.settings import Adapter

SKIPS = [("sd", 2), ("sdxl", 3)]
"""A layer less than each has by itself"""
LONG = " ".join(["abcde"] * 20)
"""100 tokens"""


@contextmanager
def as_diffusers_wants() -> Iterator[None]:
    """Its 0.42 looks for the norm of Stable Diffusion 1.x where transformers 5 has it no more."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
        yield


def load(folder: Path, **how: Any) -> Family:
    return families.load(Source(str(folder), **how))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize(("kind", "skip"), SKIPS)
def test_captions_are_read_as_diffusers_reads_them(kind: str, skip: int, tiny_models: dict[str, Path]) -> None:
    """diffusers counts the layers that are left out; the checkpoint's own layer is what it is without the setting."""
    family, own = load(tiny_models[kind], clip_skip=skip), load(tiny_models[kind])
    asked = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with as_diffusers_wants():
        theirs = own.pipeline.encode_prompt(prompt=["a dog"], clip_skip=1, **asked)
    ours, usual = family.encode_prompts(["a dog"]), own.encode_prompts(["a dog"])
    assert torch.equal(ours["text"], theirs[0]) and not torch.equal(ours["text"], usual["text"])
    same = load(tiny_models[kind], clip_skip=skip - 1)
    assert torch.equal(same.encode_prompts(["a dog"])["text"], usual["text"])
    keys = [_encoders_fingerprint(each) for each in (own, same, family, load(tiny_models[kind], text_chunks=2))]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_an_empty_caption_is_zeros_where_the_pipeline_draws_so(tiny_models: dict[str, Path]) -> None:
    """SDXL's setting, in training as in drawing; others read no words as any others."""
    family = load(tiny_models["sdxl"])
    for chunks in (1, 2):
        family.chunks = chunks  # type: ignore[attr-defined]
        told = prompting.conditions(family, ["", "a dog"])
        assert told["text"].shape[1] == 77 * chunks
        assert all(not value[0].any() and value[1].any() for value in told.values())
    family.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert prompting.conditions(family, [""])["text"].any()
    assert load(tiny_models["sd"]).encode_prompts([""])["text"].any()


def test_long_captions_in_chunks_are_what_long_prompts_are(tiny_models: dict[str, Path]) -> None:
    """Two chunks of a long one, the second of a short one empty; three are cut to two."""
    family = load(tiny_models["sdxl"], text_chunks=2)
    told = prompting.conditions(family, [LONG, "ab", f"{LONG} {LONG}"])
    single = load(tiny_models["sdxl"])
    drawn = prompting.embeddings(single, [prompting.read(single, LONG)], prompting.read(single, ""))
    assert torch.equal(told["text"][:1], drawn["prompt_embeds"])
    assert torch.allclose(told["text"][1, :77], single.encode_prompts(["ab"])["text"][0], atol=1e-6)
    assert told["text"].shape[1] == 154


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(["red", "orange"]):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
    return folder


def train(recipe: str, model: Path | str, pictures: Path, output: Path, *flags: str) -> Path:
    given = [
        "--model",
        str(model),
        "--data",
        str(pictures),
        "--output",
        str(output),
        "--tracker",
        "none",
        "--no-report",
    ]
    given += ["--resolution", "64", "--steps", "2", "--rank", "4", "--lr", "5e-2", "--seed", "5"]
    cli.main(["train", recipe, *given, *flags])
    return output


@pytest.mark.parametrize(("kind", "skip"), SKIPS)
def test_a_preview_is_diffusers_picture_with_clip_skip(
    kind: str, skip: int, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """Of the file and the seed; and `generate` draws it, told by the file alone."""
    flags = ["--clip-skip", str(skip), "--prompt", "sks dog", "--class-prompt", "dog", "--class-images", "1"]
    flags += ["--class-steps", "1", "--sample-every", "2", "--sample-steps", "2", "--sample-guidance", "4"]
    run = train("lora", tiny_models[kind], pictures, tmp_path / "run", *flags)
    file, sample = run / "adapter.safetensors", Image.open(run / "samples" / "step-000002-0.png")
    ours = pixels(sample)
    pipeline = DiffusionPipeline.from_pretrained(tiny_models[kind])
    pipeline.load_lora_weights(file)
    asked = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}
    drawn = []
    for left in (1, None):
        noise = torch.Generator("cpu").manual_seed(5)
        with as_diffusers_wants():
            drawn.append(pixels(pipeline("sks dog", generator=noise, clip_skip=left, **asked).images[0]))
    assert np.abs(ours - drawn[0]).max() <= 1 < np.abs(ours - drawn[1]).max()

    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["ss_clip_skip"] == str(skip) and json.loads(header["finetune"])["clip_skip"] == skip
    assert f"Clip skip: {skip}" in sample.info["parameters"]
    words = ["--model", str(tiny_models[kind]), "--adapter", str(file), "--prompt", "sks dog", "--seed", "5"]
    words += ["--steps", "2", "--guidance", "4", "--size", "64", "--output", str(tmp_path / "drawn")]
    cli.main(["generate", *words])
    [drawing] = (tmp_path / "drawn").glob("*.png")
    assert np.abs(ours - pixels(Image.open(drawing))).max() <= 1


def test_a_word_is_drawn_so_by_its_file_alone(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    model, run = str(tiny_models["sd"]), tmp_path / "run"
    given = ["--model", model, "--data", str(pictures), "--output", str(run), "--tracker", "none", "--no-report"]
    given += ["--resolution", "64", "--steps", "1", "--lr", "1", "--seed", "5", "--prompt", "sks dog", "--word", "sks"]
    given += ["--clip-skip", "2", "--sample-every", "1", "--sample-steps", "2", "--sample-guidance", "4"]
    cli.main(["train", "textual_inversion", *given])
    words = ["--model", model, "--embedding", str(run / "sks.safetensors"), "--prompt", "sks dog", "--seed", "5"]
    words += ["--steps", "2", "--guidance", "4", "--size", "64"]
    drawn = []
    for name, flags in {"so": [], "last": ["--clip-skip", "1"]}.items():
        cli.main(["generate", *words, *flags, "--output", str(tmp_path / name)])
        [drawing] = (tmp_path / name).glob("*.png")
        drawn.append(pixels(Image.open(drawing)))
    sample = pixels(Image.open(run / "samples" / "step-000001-0.png"))
    assert np.abs(sample - drawn[0]).max() <= 1 < np.abs(sample - drawn[1]).max()


def test_chunked_captions_train_and_are_drawn_so(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With text encoders that train too; the picture is diffusers' of the embeddings of all chunks."""
    flags = ["--text-chunks", "2", "--prompt", LONG, "--no-prior", "--text-encoder-lr", "1e-3", "--sample-every", "2"]
    flags += ["--sample-steps", "2", "--sample-guidance", "4"]
    run = train("lora", tiny_models["sd"], pictures, tmp_path / "run", *flags)
    assert "longer than the text encoder" not in capsys.readouterr().out
    family = load(tiny_models["sd"])
    export.attach(family, run / "adapter.safetensors", "trained")
    with torch.no_grad(), sampling.inference(family):
        said = prompting.embeddings(family, [prompting.read(family, LONG)], prompting.read(family, ""))
    assert said["prompt_embeds"].shape[1] == 154
    asked = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}
    theirs = family.pipeline(**said, generator=torch.Generator("cpu").manual_seed(5), **asked).images[0]
    ours = Image.open(run / "samples" / "step-000002-0.png")
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1
    with safe_open(run / "adapter.safetensors", "pt") as opened:
        assert opened.metadata()["ss_max_token_length"] == "150"


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        ("flux", "--clip-skip 2", "FLUX.1 has no such thing"),
        ("zimage", "--text-chunks 3", "Z-Image has no such thing"),
        ("sdxl", "--clip-skip 1", "2 skips nothing, 3 one layer more"),
        ("sd", "--clip-skip 9", "have 2 layers"),
        ("sd", "--text-chunks 0", "at least 1"),
    ],
)
def test_what_a_model_does_not_have_is_refused(
    kind: str, flags: str, said: str, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_models[kind]), "--prompt", "dog", "--output", str(tmp_path / "drawn")]
    with pytest.raises(SystemExit) as status:
        cli.main(["generate", *words, *flags.split()])
    assert status.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()


def test_adapters_that_disagree_want_to_be_told(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for skip in (1, 2):
        family = load(tiny_models["sd"], clip_skip=skip)
        adapters.adapt(family, Adapter(rank=1), 1e-3, None, 0)
        files.append(tmp_path / f"{skip}.safetensors")
        export.adapter(family, files[-1], settings={"model": {"clip_skip": skip}})
    words = ["--model", str(tiny_models["sd"]), "--prompt", "dog", "--output", str(tmp_path / "drawn")]
    with pytest.raises(SystemExit):
        cli.main(["generate", *words, "--adapter", *map(str, files)])
    assert "trained with --clip-skip 1 and 2: say which" in capsys.readouterr().err


def test_a_model_of_dreambooth_is_drawn_so_by_those_who_know_the_run(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder has no place for it: the run's last line says the flags."""
    given = ["--model", str(tiny_models["sd"]), "--data", str(pictures), "--output", str(tmp_path / "run")]
    given += ["--tracker", "none", "--no-report", "--resolution", "64", "--steps", "1", "--prompt", "sks", "--no-prior"]
    cli.main(["train", "dreambooth", *given, "--clip-skip", "2", "--text-chunks", "2"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--clip-skip 2 --text-chunks 2 --prompt" in said
    base = trained.find(tmp_path / "run").base()
    assert base is not None and (base.clip_skip, base.text_chunks) == (2, 2)
