"""Instruct-pix2pix checkpoints under training: told what diffusers tells them, changing pictures better."""

from __future__ import annotations

import shutil
from pathlib import Path

import measured
import numpy as np
import pytest
import stopping
import tiny
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from safetensors.torch import load_file

from finetune import cli, families, loop, settings
from finetune.data import read
from finetune.families import Source
from finetune.pictures import read_settings


@pytest.fixture(params=tiny.EDITING)
def folder(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Path:
    return tiny_models[request.param]


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """Results, and their sources in a folder beside them: the pictures turned into their negatives."""
    (tmp_path / "results").mkdir()
    (tmp_path / "sources").mkdir()
    for number, colour in enumerate(["red", "orange", "brown"]):
        picture = Image.new("RGB", (64, 64), colour)
        picture.paste("white", (8 * number, 8, 30, 40))
        picture.save(tmp_path / "results" / f"{number}.png")
        ImageOps.invert(picture).save(tmp_path / "sources" / f"{number}.png")
    return ["--data", str(tmp_path / "results"), "--sources", str(tmp_path / "sources"), "--prompt", "invert it"]


def data(pairs: list[str]) -> settings.Data:
    return settings.Data(pairs[1], sources=Path(pairs[3]), prompt=pairs[5], use_cache=False)


def test_it_is_told_what_diffusers_tells_it(folder: Path, pairs: list[str]) -> None:
    """The picture's own latents, unscaled, now and then nothing, as the paper has it."""
    family, pipeline = families.load(Source(str(folder))), DiffusionPipeline.from_pretrained(folder)
    encoded = measured.encoded(family, read(data(pairs))[0], settings=data(pairs))
    item = encoded.subjects[0]
    assert item.example.source is not None
    picture = pipeline.image_processor.preprocess(Image.open(item.example.source.path))
    with torch.no_grad():
        theirs = pipeline.prepare_image_latents(picture, 1, 1, torch.float32, "cpu", False)
    torch.testing.assert_close(encoded.source(item, item.views[0])[None], theirs, rtol=1e-4, atol=1e-4)

    told = [(bool(batch.beside.abs().sum()), batch.captions[0]) for batch in
            (measured.batches(encoded, 1, step)[0] for step in range(400)) if batch.beside is not None]  # fmt: skip
    shares = {kind: told.count(kind) / 400 for kind in {*told}}
    assert {*shares} == {(True, "invert it"), (True, ""), (False, ""), (False, "invert it")}
    assert all(0.02 < share < 0.09 for kind, share in shares.items() if kind != (True, "invert it")), shares


@pytest.mark.parametrize(("recipe", "kind"), [("lora", "sdxl-pix2pix"), ("dreambooth", "sd-pix2pix")])
def test_it_learns_to_change_pictures(
    recipe: str,
    kind: str,
    pairs: list[str],
    tiny_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its samples are drawn from a source of the training's."""
    folder = tiny_models[kind]
    run, rate = tmp_path / "run", "5e-2" if recipe == "lora" else "2e-3"
    words = ["--model", str(folder), *pairs, "--no-prior", "--tracker", "none", "--steps", "20", "--batch-size", "3",
             "--lr", rate, "--sample-every", "20", "--sample-steps", "2", "--checkpoint-every", "10"]  # fmt: skip
    cli.main(["train", recipe, *words, "--output", str(run)])
    assert capsys.readouterr().out.rstrip().endswith('--prompt "invert it" --init PICTURE')
    assert (run / "samples" / "step-000020-0.png").is_file()
    losses = []
    for made in (folder, folder if recipe == "lora" else run / "model"):
        pipeline = DiffusionPipeline.from_pretrained(made)
        if losses and recipe == "lora":
            pipeline.load_lora_weights(run, weight_name="adapter.safetensors")
        family = families.wrap(pipeline)
        families.freeze(family)
        losses.append(measured.loss(family, measured.encoded(family, read(data(pairs))[0], settings=data(pairs))))
    assert losses[1] < 0.99 * losses[0]


def test_a_stop_changes_nothing_and_generate_draws_what_diffusers_does(
    folder: Path, pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "lora", "--model", str(folder), *pairs, "--no-prior", "--tracker", "none", "--steps", "3", "--lr",
             "5e-2", "--source-dropout", "0.2", "--checkpoint-every", "1"]  # fmt: skip
    run, again = tmp_path / "run", tmp_path / "again"
    cli.main([*words, "--output", str(run)])
    with monkeypatch.context() as inside, pytest.raises(SystemExit) as stopped:
        inside.setattr(loop.Training, "_step", stopping.at(2))
        cli.main([*words, "--output", str(again)])
    assert stopped.value.code == 75
    file = run / "adapter.safetensors"
    cli.main(["train", "--output", str(again), "--resume"])
    one, other = (load_file(made / "adapter.safetensors") for made in (run, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    picture = Image.open(Path(pairs[3]) / "0.png")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(run, weight_name=file.name)
    theirs = pipeline("negate", image=picture, num_inference_steps=2, guidance_scale=4.0, image_guidance_scale=2.0,
                      generator=torch.Generator("cpu").manual_seed(3),
                      **({} if "xl" not in folder.name else {"height": 64, "width": 64})).images[0]  # fmt: skip
    cli.main(["generate", "--model", str(folder), "--adapter", str(file), "--prompt", "negate", "--init",
              str(Path(pairs[3]) / "0.png"), "--picture-guidance", "2", "--guidance", "4", "--steps", "2", "--seed",
              "3", "--size", "64", "--output", str(tmp_path / "drawn")])  # fmt: skip
    [drawn] = (tmp_path / "drawn").glob("*.png")
    apart = np.abs(np.asarray(Image.open(drawn)).astype(int) - np.asarray(theirs).astype(int))
    assert apart.max() <= 1
    assert read_settings(drawn)["picture_guidance"] == 2
    cli.main(["verify", str(file), "--model", str(folder)])


def test_what_is_not_told_is_refused(
    pairs: list[str], tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources, model = Path(pairs[3]), str(tiny_models["sd-pix2pix"])
    train = ["train", "lora", "--no-prior", "--tracker", "none", "--steps", "1", "--output", str(tmp_path / "run")]

    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main([*words])
        assert stop.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    without = [*pairs[:2], *pairs[4:]]
    assert "of 3 of 3 pictures it is not told" in refused(*train, "--model", model, *without)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert "only instruct-pix2pix checkpoints" in refused(*train, "--model", str(tiny_models["sd"]), *pairs)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    class_pictures = [word for word in train if word != "--no-prior"] + ["--class-prompt", "a", "--class-images", "1"]
    assert "draws none from words alone" in refused(*class_pictures, "--model", model, *pairs)
    (sources / "0.png").unlink()
    Image.new("RGB", (64, 32)).save(sources / "1.png")
    said = refused(*train, "--model", model, *pairs)
    assert "0.png: no source of that name" in said and "1.png: its source 1.png has 64 x 32 pixels" in said
    drawing = ["generate", "--model", model, "--prompt", "a", "--output", str(tmp_path / "drawn")]
    assert "give it that (--init)" in refused(*drawing)
    assert "has none; --picture-guidance" in refused(*drawing, "--init", str(sources / "2.png"), "--strength", "0.3")
    assert "1 or more" in refused(*drawing, "--init", str(sources / "2.png"), "--picture-guidance", "0.5")
    strip = ["explain", "--model", model, "--prompt", "a", "--output", str(tmp_path / "strip.png")]
    assert "InstructPix2PixPipeline, which draws from a picture" in refused(*strip)
