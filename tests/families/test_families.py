"""Where a base model comes from, what is refused, and the questions that a family answers."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import original
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from finetune import families
from finetune.errors import Fault
from finetune.families import Source, straight
from finetune.families.source import CHANGED

KINDS = list(tiny.KINDS)
PREDICTIONS = {"sd": "epsilon", "sd-v": "v_prediction", "sdxl": "epsilon"}
"""All others predict a flow."""
UNET = Path("unet", "diffusion_pytorch_model.safetensors")


@pytest.fixture
def copied(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(tiny_models["sd"], tmp_path / "model"))


def refused(model: str | Path, **more: str) -> str:
    with pytest.raises(Fault) as fault:
        families.load(Source(str(model), **more))
    return str(fault.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_says_what_it_is(kind: str, tiny_models: dict[str, Path]) -> None:
    """Those that do not tell a side are for 1024 pixels."""
    loaded = families.load(Source(str(tiny_models[kind])))
    assert type(loaded) is families.FAMILIES[type(tiny.pipeline(kind)).__name__]
    assert loaded.objective().prediction == PREDICTIONS.get(kind, "flow")
    assert loaded.objective().timesteps == 1000
    assert loaded.resolution() == (64 if kind in {*PREDICTIONS, "sd3"} else 1024)
    assert not any(p.requires_grad for module in families.modules(loaded).values() for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_predictions_have_the_shapes_that_they_should(kind: str, tiny_models: dict[str, Path]) -> None:
    family = families.load(Source(str(tiny_models[kind])), torch.bfloat16)
    mean, std = family.encode_pictures(torch.zeros(2, 3, 64, 96))
    channels, factor = family.latents()
    assert mean.shape == std.shape == (2, channels, 64 // factor, 96 // factor)
    assert mean.dtype == torch.float32
    conditions = family.encode_prompts(["a dog", "a photo of a very small cat"])
    assert {name: tuple(value.shape[1:]) for name, value in conditions.items()} == family.condition_shapes()
    sizes = torch.tensor([[64, 96, 0, 0, 64, 96.0]] * 2)
    times = family.objective().told(torch.tensor([1, 999]))
    prediction = family.predict(mean, times, conditions, sizes)
    assert prediction.shape == mean.shape
    assert prediction.dtype == torch.bfloat16


def test_latents_are_in_the_scale_that_the_denoiser_works_in(tiny_models: dict[str, Path]) -> None:
    """z = (posterior mean - shift) * scaling_factor, as the pipelines' img2img has it."""
    family = families.load(Source(str(tiny_models["sd"])))
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    posterior = family.pipeline.vae.encode(pictures).latent_dist
    mean, std = family.encode_pictures(pictures)
    torch.testing.assert_close(mean, posterior.mean * 0.18215)
    torch.testing.assert_close(std, posterior.std * 0.18215)


def test_sdxl_is_told_the_size(tiny_models: dict[str, Path]) -> None:
    family = families.load(Source(str(tiny_models["sdxl"])))
    latents, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    conditions = family.encode_prompts(["a dog"])
    whole, cropped = (
        family.predict(latents, t, conditions, torch.tensor([[64.0, 64, top, 0, 64, 64]])) for top in (0, 32)
    )
    assert not torch.allclose(whole, cropped)


@pytest.mark.parametrize("kind", KINDS)
def test_released_parts_come_back_and_trained_ones_stay(kind: str, tiny_models: dict[str, Path]) -> None:
    source = Source(str(tiny_models[kind]))
    family = families.load(source)
    vae, denoiser = family.pipeline.vae.state_dict(), families.denoiser(family)
    with torch.no_grad():
        trained = next(denoiser.parameters()).fill_(0.5)
    families.release(family, "vae", "text_encoder")
    assert family.pipeline.vae is None
    families.restore(family, source)
    assert families.denoiser(family) is denoiser
    assert torch.equal(next(denoiser.parameters()), trained) and float(trained.flatten()[0]) == 0.5
    assert all(torch.equal(value, vae[name]) for name, value in family.pipeline.vae.state_dict().items())
    assert not any(p.requires_grad for p in family.pipeline.vae.parameters())


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt"])
def test_a_pickled_checkpoint_is_refused(suffix: str, tmp_path: Path) -> None:
    """FAULTS row 38."""
    file = tmp_path / f"model{suffix}"
    torch.save({"a": torch.zeros(1)}, file)
    message = refused(file)
    assert file.name in message
    assert "safetensors" in message


def test_a_folder_that_holds_only_pickles_is_refused(copied: Path) -> None:
    for file in copied.rglob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    message = refused(copied)
    assert "pickles" in message
    assert "unet/diffusion_pytorch_model.bin" in message


@pytest.mark.parametrize("damage", ["truncated", "trailing", "header"])
def test_a_damaged_weight_file_is_refused(damage: str, copied: Path) -> None:
    """FAULTS row 40."""
    file = copied / UNET
    whole = file.read_bytes()
    damaged = {
        "truncated": whole[:-100],
        "trailing": whole + b"\0" * 8,
        "header": (2**60).to_bytes(8, "little") + whole[8:],
    }
    file.write_bytes(damaged[damage])
    assert UNET.name in refused(copied)


def test_weights_that_are_not_finite_are_refused(copied: Path) -> None:
    tensors = load_file(copied / UNET)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, copied / UNET, metadata={"format": "pt"})
    message = refused(copied)
    assert "unet" in message
    assert "conv_in.weight" in message


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "model_index.json" in refused(tmp_path)


def test_an_unknown_pipeline_is_named(copied: Path) -> None:
    index = copied / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "KandinskyPipeline"}))
    message = refused(copied)
    assert "KandinskyPipeline" in message
    assert "StableDiffusionXLPipeline" in message


def test_a_name_that_is_nowhere_says_where_was_looked() -> None:
    message = refused("nobody/no-such-model", revision="abc")
    assert "nobody/no-such-model at revision abc" in message
    assert "network" in message


def test_a_missing_checkpoint_file(tmp_path: Path) -> None:
    assert "no such checkpoint file" in refused(tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_checkpoint_in_the_original_layout_is_the_same_model(
    kind: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    pipeline = tiny.pipeline(kind)
    file = original.save(pipeline, tmp_path / "model.safetensors")
    source = Source(str(file), model_config=str(tiny_models[kind]))
    assert source.pipeline_class() == type(pipeline).__name__
    family = families.load(source)
    for name, module in families.modules(families.wrap(pipeline)).items():
        loaded = family.pipeline.components[name].state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in module.state_dict().items())
    families.release(family, "vae")
    families.restore(family, source)
    assert family.pipeline.vae is not None


def test_a_checkpoint_needs_a_configuration_from_the_hub_or_a_folder(tmp_path: Path) -> None:
    file = original.save(tiny.pipeline("sd"), tmp_path / "model.safetensors")
    assert Source(str(file)).pipeline_class() == "StableDiffusionPipeline"
    assert "--model-config" in refused(file)


def test_an_adapter_given_as_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file({"unet.down.lora_A.weight": torch.zeros(2, 2)}, file)
    assert "--adapter" in refused(file)


def test_the_identity_is_the_content(tiny_models: dict[str, Path], copied: Path, tmp_path: Path) -> None:
    original = Source(str(tiny_models["sd"])).identity()
    assert Source(str(copied)).identity() == original
    tensors = load_file(copied / UNET)
    tensors["conv_in.weight"][0, 0, 0, 0] += 1
    save_file(tensors, copied / UNET, metadata={"format": "pt"})
    assert Source(str(copied)).identity() != original


def test_the_identity_is_told_later_of_files_that_are_still_the_same(copied: Path) -> None:
    source = Source(str(copied))
    told, other, none = (source.identity_later() for _ in range(3))
    assert told() == source.identity()
    (copied / "unet" / "config.json").write_text((copied / "unet" / "config.json").read_text() + "\n")
    assert other() == CHANGED
    shutil.rmtree(copied)
    assert none() == CHANGED


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_the_same_however_it_is_read(kind: str, tiny_models: dict[str, Path]) -> None:
    """In another precision than its files' it is read a tensor at a time, not by diffusers."""
    ours = families.modules(families.load(Source(str(tiny_models[kind])), torch.bfloat16))
    theirs = DiffusionPipeline.from_pretrained(
        tiny_models[kind], dtype={"default": torch.bfloat16, "vae": torch.float32}
    )
    for name, module in ours.items():
        other = getattr(theirs, name)
        assert type(module) is type(other) and not module.training
        assert {n: b.dtype for n, b in module.named_buffers()} == {n: b.dtype for n, b in other.named_buffers()}
        for (at, tensor), (there, their) in zip(values(module), values(other), strict=True):
            assert at == there and tensor.dtype == their.dtype and torch.equal(tensor, their), f"{name}.{at}"
        told = [{n: v for n, v in dict(m.config.to_dict() if hasattr(m.config, "to_dict") else m.config).items()
                 if n != "_name_or_path"} for m in (module, other)]  # fmt: skip
        assert told[0] == told[1]


def values(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return sorted([*module.named_parameters(), *module.named_buffers()], key=lambda pair: pair[0])


def test_a_model_in_bf16_is_never_beside_its_fp32_file_in_memory(tmp_path: Path) -> None:
    """72 MB in the file, 36 in memory: the most that was in memory, files that are mapped included, grew by those."""
    unet = UNet2DConditionModel(block_out_channels=(64, 128, 256, 256), cross_attention_dim=64, norm_num_groups=8)
    size = sum(p.numel() for p in unet.parameters()) * 2
    unet.save_pretrained(tmp_path)
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the most that was in memory")

    def peak(load: Callable[[], object]) -> int:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # from now on
        before, held = resident("VmRSS"), load()
        assert held is not None
        return resident("VmHWM") - before

    straight.part(tmp_path, UNet2DConditionModel, torch.bfloat16)
    assert peak(lambda: straight.part(tmp_path, UNet2DConditionModel, torch.bfloat16)) < 1.5 * size
    assert peak(lambda: UNet2DConditionModel.from_pretrained(tmp_path, dtype=torch.bfloat16)) > 2 * size


def resident(what: str) -> int:
    """Bytes"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


@pytest.mark.parametrize("change", ["fp32", "renamed", "quantised", "variant", "kept"])
def test_what_is_no_plain_part_is_left_to_diffusers(change: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, file, dtype = copied / "unet", copied / UNET, torch.float32 if change == "fp32" else torch.bfloat16
    assert straight.part(unet, UNet2DConditionModel, torch.bfloat16) is not None
    if change == "renamed":
        save_file({f"{name}.old": tensor for name, tensor in load_file(file).items()}, file)
    if change == "quantised":
        config = unet / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {}}))
    if change == "variant":
        file.rename(file.with_suffix(".fp16.safetensors"))
    if change == "kept":
        monkeypatch.setattr(UNet2DConditionModel, "_keep_in_fp32_modules", ["conv_in"])
    assert straight.part(unet, UNet2DConditionModel, dtype) is None


def test_shards_are_read(copied: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(copied / "unet")
    unet.save_pretrained(copied / "unet", max_shard_size="100KB")
    (copied / UNET).unlink()
    read = straight.part(copied / "unet", UNet2DConditionModel, torch.bfloat16)
    assert read is not None and len(list((copied / "unet").glob("*.safetensors"))) > 2
    for at, tensor in read.state_dict().items():
        assert torch.equal(tensor, unet.state_dict()[at].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_the_hub_is_read_from_where_it_was_downloaded_to(
    dtype: torch.dtype, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "models--someone--model"
    shutil.copytree(tiny_models["sd"], stored / "snapshots" / "1234")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("1234")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source, local = Source("someone/model"), Source(str(tiny_models["sd"]))
    family, same = (families.modules(families.load(each, dtype)) for each in (source, local))
    for name, module in same.items():
        for (at, tensor), (_, other) in zip(values(module), values(family[name]), strict=True):
            assert torch.equal(tensor, other), f"{name}.{at}"
    given = {name: module for name, module in family.items() if name != "vae"}
    assert source.load(dtype, given).unet is family["unet"]
