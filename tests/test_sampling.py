"""A picture of ours is plain diffusers' picture with that seed, whatever it is drawn together with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image

from finetune import families, sampling
from finetune.errors import Fault
from finetune.families import Family, Source

DRAW = {"steps": 2, "guidance": 4.0}
SIZED = {**DRAW, "size": tiny.SIDE}


@pytest.fixture(params=tiny.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def family(kind: str, tiny_models: dict[str, Path]) -> Family:
    return families.load(Source(str(tiny_models[kind])))


def pixels(image: Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def plain(folder: Path, prompt: str, seed: int, **options: object) -> Image:
    """As a user of diffusers draws it."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    how = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": tiny.SIDE, "width": tiny.SIDE, **options}
    return pipeline(prompt=prompt, generator=generator, **how).images[0]


def test_one_picture_is_that_of_plain_diffusers(family: Family, kind: str, tiny_models: dict[str, Path]) -> None:
    [ours] = sampling.sample(family, ["a red ball"], [7], **SIZED)
    theirs = plain(tiny_models[kind], "a red ball", 7)
    assert ours.size == (tiny.SIDE, tiny.SIDE)
    assert np.array_equal(pixels(ours), pixels(theirs))
    assert pixels(ours).std() > 1, "a flat picture would prove nothing"


def words(family: Family, negative: str) -> dict[str, object]:
    try:
        return family.words(["a red ball"], negative, 4.0)
    except Fault as fault:
        return {"refused": fault.message}


def test_a_negative_prompt_is_that_of_plain_diffusers(family: Family, kind: str, tiny_models: dict[str, Path]) -> None:
    if "negative_prompt" not in (asked := words(family, "blurry")):
        assert "--negative 'blurry'" in asked["refused"]
        return
    [ours] = sampling.sample(family, ["a red ball"], [7], negative="blurry", **SIZED)
    [without] = sampling.sample(family, ["a red ball"], [7], **SIZED)
    assert np.array_equal(pixels(ours), pixels(plain(tiny_models[kind], "a red ball", 7, negative_prompt="blurry")))
    assert not np.array_equal(pixels(ours), pixels(without))


def test_a_picture_does_not_depend_on_its_batch(family: Family) -> None:
    prompts, seeds = ["a red ball", "a blue cube", "a dog", "a dog", "a red ball"], [1, 2, 3, 4, 1]
    together = sampling.sample(family, prompts, seeds, batch=4, **SIZED)
    alone = [sampling.sample(family, [p], [s], **SIZED)[0] for p, s in zip(prompts, seeds, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    assert np.abs(pixels(together[0]) - pixels(together[4])).max() <= 1
    assert np.abs(pixels(together[2]) - pixels(together[3])).max() > 5, "another seed, another picture"


def test_each_prompt_needs_a_seed(family: Family) -> None:
    with pytest.raises(ValueError, match="zip"):
        sampling.sample(family, ["a", "b"], [1], **SIZED)


def test_size_is_followed_and_a_size_that_does_not_fit_is_refused(family: Family) -> None:
    [picture] = sampling.sample(family, ["a dog"], [0], size=48, **DRAW)
    assert picture.size == (48, 48)
    with pytest.raises(Fault, match=rf"multiples of {family.grain()}.*nearest is 48"):
        sampling.sample(family, ["a dog"], [0], size=45, **DRAW)


def test_modes_gradients_and_methods_are_put_back(family: Family) -> None:
    denoiser, vae = families.denoiser(family), family.pipeline.vae
    denoiser.train()
    next(denoiser.children()).eval()
    denoiser.requires_grad_(True)
    before = {name: module.training for name, module in denoiser.named_modules()}
    sampling.sample(family, ["a dog"], [0], **SIZED)
    assert {name: module.training for name, module in denoiser.named_modules()} == before
    assert all(p.requires_grad and p.grad is None for p in denoiser.parameters())
    assert "decode" not in vars(vae)
    assert torch.is_grad_enabled()


def test_dropout_does_not_act(family: Family) -> None:
    [expected] = sampling.sample(family, ["a dog"], [0], **SIZED)
    for module in families.denoiser(family).modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    families.denoiser(family).train()
    [picture] = sampling.sample(family, ["a dog"], [0], **SIZED)
    assert np.array_equal(pixels(picture), pixels(expected))


@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float32])
def test_parts_in_other_precisions_draw_nearly_the_same(
    kind: str, trained: torch.dtype, tiny_models: dict[str, Path]
) -> None:
    """bf16 all through but the VAE, and a float32 denoiser beside bf16 text encoders, as full training has it."""
    source = Source(str(tiny_models[kind]))
    [expected] = sampling.sample(families.load(source), ["a dog"], [0], **SIZED)
    family = families.load(source, torch.bfloat16)
    families.denoiser(family).to(trained)
    [picture] = sampling.sample(family, ["a dog"], [0], **SIZED)
    assert np.abs(pixels(picture) - pixels(expected)).mean() < 8


def test_a_released_part_is_named(family: Family) -> None:
    families.release(family, "vae")
    with pytest.raises(ValueError, match="vae was released"):
        sampling.sample(family, ["a dog"], [0], **SIZED)
