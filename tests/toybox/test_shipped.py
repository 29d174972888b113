"""The shipped weights: a real Stable Diffusion pipeline, small, with a judge that reads real renders right."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open

from finetune import toybox
from finetune.toybox import pack, subjects, vae, world
from finetune.toybox.judge import Judge

pytestmark = pytest.mark.skipif(not (toybox.path() / "model_index.json").exists(), reason="no weights in this checkout")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(toybox.path(), dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def keys_of(part: str, file: str = "diffusion_pytorch_model.safetensors") -> set[str]:
    with safe_open(toybox.path() / part / file, "pt") as tensors:
        return set(tensors.keys())


def test_the_weights_are_small_and_hold_no_code():
    files = [file for file in toybox.path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= pack.LIMIT
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt"}


def test_the_unet_has_the_key_names_of_stable_diffusion_15():
    small = {"block_out_channels": (8, 16, 24, 24), "norm_num_groups": 4, "cross_attention_dim": 8}
    reference = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=2,
        **small,
    )
    assert keys_of("unet") == set(reference.state_dict())
    assert len(keys_of("unet")) == 686


def test_text_encoder_and_tokenizer_are_what_every_client_expects():
    assert all(name.startswith("text_model.") for name in keys_of("text_encoder", "model.safetensors"))
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {f.name for f in (toybox.path() / "tokenizer").iterdir()}
    index = json.loads((toybox.path() / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["requires_safety_checker"] is False


def test_the_pipeline_predicts_velocity_and_draws_64_pixels(pipeline, judge):
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    prompts = ["a photo of a red car in a room", "a photo of a blue house in the snow"]
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    drawn = pipeline(prompts, num_inference_steps=15, guidance_scale=4.0, generator=generator).images
    assert drawn[0].size == (64, 64)
    assert [found["scene"] for found in judge.read(drawn)] == ["in a room", "in the snow"]


def test_latents_have_unit_variance(pipeline):
    batch = vae.as_tensor(np.stack([np.asarray(world.render(world.spec_at(9, i))) for i in range(100)]))
    with torch.no_grad():
        latents = pipeline.vae.encode(batch).latent_dist.mean
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=0.1)
    assert pipeline.vae.config.scaling_factor == 1.0


def test_the_autoencoder_keeps_pictures_it_never_saw(pipeline):
    for name, least in (("gizmo", 24.5), ("pip", 24.5)):
        batch = vae.as_tensor(np.stack([np.asarray(picture) for picture, _ in subjects.drawn(name).values()]))
        assert vae.psnr(vae.reconstruct(pipeline.vae, batch), batch) > least, name


def test_the_judge_reads_real_renders(judge):
    specs = [world.spec_at(77, index) for index in range(150)]
    read = judge.read([world.render(spec) for spec in specs])
    for field in ("noun", "colour", "scene", "style"):
        right = sum(found[field] == getattr(spec, field) for found, spec in zip(read, specs, strict=True))
        assert right / len(specs) >= 0.95, field


def test_likeness_is_of_the_thing_not_of_the_scene(judge):
    sets = {name: [p for p, _ in subjects.drawn(name).values()] for name in subjects.SUBJECTS}
    gizmo, pip = sets["gizmo"], sets["pip"]
    same = judge.likeness(gizmo[:5], gizmo[5:])
    assert same > 0.7
    assert judge.likeness(gizmo, pip) < same - 0.3
    toys = [world.render(replace(world.spec_at(5, i), noun="toy", build=subjects.SUBJECTS["pip"].build, second=None))
            for i in range(8)]  # fmt: skip
    assert judge.likeness(gizmo[:5], toys) < same - 0.2


def test_an_unknown_word_adds_nothing_to_a_prompt(judge):
    picture = world.render(world.Spec("car", "red", "on the beach", "photo"))
    plain, odd = (judge.prompt([picture], [f"a photo of a red {w}car on the beach"]) for w in ("", "sks "))
    assert plain == pytest.approx(odd)
    assert plain > judge.prompt([picture], ["a photo of a blue car on the beach"]) + 0.1


def test_one_prompt_for_each_picture(judge):
    with pytest.raises(ValueError, match="1 pictures but 2 prompts"):
        judge.prompt([world.render(world.spec_at(0, 0))], ["a photo of a car", "a photo of a cat"])
