"""What holds for every family in `tiny`'s table, beside what the tests of recipes, export and sampling ask of all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import live
import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from finetune import checkpoints, cli, export, families, sampling
from finetune.families import Family, Source


@pytest.fixture(params=tiny.KINDS)
def folder(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Path:
    return tiny_models[request.param]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two of one size, one of another."""
    made = tmp_path / "pictures"
    made.mkdir()
    for number, size in enumerate([(64, 64), (128, 64), (64, 64)]):
        noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(made / f"{number}.png")
    return made


def train(recipe: str, model: Path, pictures: Path, output: Path, *flags: str) -> Path:
    given = ["--model", str(model), "--data", str(pictures), "--output", str(output), "--tracker", "none"]
    given += ["--resolution", "64"]
    cli.main(["train", recipe, *given, "--prompt", "sks dog", "--no-prior", "--max-upscale", "4", *flags])
    return output


def weights(family: Family) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name.replace('.base_layer', '')}": value.detach().clone()
        for part, module in families.modules(family).items()
        for name, value in module.named_parameters()
        if ".lora_" not in name
    }


def test_only_what_should_train_has_gradients(folder: Path) -> None:
    """A LoRA's thin matrices, all of them; then all weights of the denoiser, and nothing else."""
    for make in (live.adapted, live.tuned):
        family = make(folder)
        before = weights(family)
        _step(family)
        trained = {name for name, p in families.denoiser(family).named_parameters() if p.requires_grad}
        moved = {name for name, p in families.denoiser(family).named_parameters() if p.grad is not None}
        assert trained and trained == moved, trained ^ moved
        others = [module for name, module in families.modules(family).items() if name != family.denoiser_name]
        assert all(p.grad is None for module in others for p in module.parameters())
        assert all(torch.equal(value, before[name]) for name, value in weights(family).items())


def _step(family: Family) -> None:
    """The loss of two pictures, backward."""
    channels, factor = family.latents()
    objective, t = family.objective(), torch.tensor([100, 800])
    x0, eps = torch.randn(2, 2, channels, 64 // factor, 96 // factor)
    with torch.no_grad():
        conditions = family.encode_prompts(["a dog", "a cat on a mat"])
    sizes = torch.tensor([[64, 96, 0, 0, 64, 96.0]] * 2)
    for module in families.modules(family).values():
        module.train()
    predicted = family.predict(objective.noised(x0, eps, t), objective.told(t), conditions, sizes)
    (predicted - objective.target(x0, eps, t)).square().mean().backward()


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_captions_encoded_in_each_step_are_those_encoded_once(
    kind: str, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """Where one text encoder trains, those that do not (T5) read the captions beside it, after samples too."""
    flags = "--steps", "2", "--sample-every", "1", "--sample-steps", "1"
    frozen = train("lora", tiny_models[kind], pictures, tmp_path / "frozen", *flags)
    trained = train("lora", tiny_models[kind], pictures, tmp_path / "trained", *flags, "--text-encoder-lr", "1e-8")
    assert _losses(trained) == pytest.approx(_losses(frozen), rel=1e-5)


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", ["lora", "dreambooth"])
def test_a_stopped_run_goes_on_to_the_same_bytes(recipe: str, folder: Path, pictures: Path, tmp_path: Path) -> None:
    """Checkpointed in the middle, gone on with, and compared with a run that was never stopped."""
    flags = "--steps", "4", "--checkpoint-every", "2", "--keep-last", "2", "--lr", "1e-3", "--gradient-checkpointing"
    whole = train(recipe, folder, pictures, tmp_path / "whole", *flags)
    stopped = train(recipe, folder, pictures, tmp_path / "stopped", *flags)
    _as_if_stopped(stopped, 2)
    cli.main(["train", "--output", str(stopped), "--resume"])
    assert _log(stopped) == _log(whole)
    files = sorted(file.relative_to(whole) for file in whole.rglob("*.safetensors") if "checkpoints" not in file.parts)
    assert files
    for file in files:
        one, other = load_file(whole / file), load_file(stopped / file)
        assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _as_if_stopped(run: Path, step: int) -> None:
    """Take away what came after a step."""
    shutil.rmtree(run / checkpoints.name(4))
    for made in [*run.glob("adapter.safetensors"), *run.glob("model")]:
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    table = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**table, "state": "stopped", "step": step}))


def _log(run: Path) -> list[tuple[int, float]]:
    """The last word on each step."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return sorted({line["step"]: line["loss"] for line in lines}.items())


def test_a_preview_is_plain_diffusers_picture_with_the_file_and_the_seed(
    folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """To a step of 1 in 255: an adapter is multiplied out beside the weights in both, in the same order."""
    flags = "--steps", "2", "--lr", "5e-2", "--sample-every", "2", "--sample-steps", "2", "--sample-guidance", "4"
    run = train("lora", folder, pictures, tmp_path / "run", *flags, "--seed", "5")
    ours = np.asarray(Image.open(run / "samples" / "step-000002-0.png")).astype(int)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    before = _drawn(pipeline)
    pipeline.load_lora_weights(run, weight_name="adapter.safetensors")
    assert np.abs(ours - _drawn(pipeline)).max() <= 1
    assert np.abs(ours - before).max() > 1, "the adapter acts"


def _drawn(pipeline: DiffusionPipeline) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(5)
    how = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}
    return np.asarray(pipeline(prompt="sks dog", generator=generator, **how).images[0]).astype(int)


def test_a_whole_model_is_written_and_draws_the_same(folder: Path, tmp_path: Path) -> None:
    family = live.adapted(folder, text=True)
    export.merged(family, tmp_path / "model", dtype=torch.float32)
    pictures = [
        np.asarray(sampling.sample(each, ["a dog"], [3], steps=2, guidance=4.0, size=64)[0]).astype(int)
        for each in (family, families.load(Source(str(tmp_path / "model"))), families.load(Source(str(folder))))
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.abs(pictures[0] - pictures[2]).max() > 5, "the adapter acts"
