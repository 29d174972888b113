"""An adapter of ours loads in plain diffusers whole, with its alpha; one that would not is never left behind."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import live
import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune import export, families, keys, sampling, weights
from finetune.adapters import NAME
from finetune.errors import Failure
from finetune.export import compare, formats
from finetune.export.adapter_file import verify_adapter
from finetune.export.reading import layers
from finetune.families import Family, Source

SETTINGS = {
    "model": {"model": "toybox"},
    "adapter": {"rank": 4, "alpha": 2.0},
    "data": {"prompt": "a photo of sks dog"},
}


@pytest.fixture(params=tiny.KINDS)
def folder(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Path:
    return tiny_models[request.param]


def plain(folder: Path, file: Path) -> Family:
    """As a user of diffusers loads it; the questions are put to it through a family."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    return families.wrap(pipeline)


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What diffusers and transformers warn of (their loggers do not reach the root's handlers by themselves)."""
    for library in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_plain_diffusers_loads_it_whole_and_predicts_the_same(
    kind: str, text: bool, tiny_models: dict[str, Path], tmp_path: Path, complaints: pytest.LogCaptureFixture
) -> None:
    folder, file = tiny_models[kind], tmp_path / "adapter.safetensors"
    family = live.adapted(folder, text=text)
    export.adapter(family, file, settings=SETTINGS)
    complaints.clear()
    loaded = plain(folder, file)
    heard = [record.getMessage() for record in complaints.records]
    absent = [line for line in heard if line.startswith("No LoRA keys associated to CLIPTextModel")]
    assert heard == absent and len(absent) == (0 if text else len(family.text_encoder_names))
    assert compare.difference(compare.prediction(family), compare.prediction(loaded)) < 1e-5
    assert compare.difference(compare.encoding(family), compare.encoding(loaded)) < 1e-5
    base = families.load(Source(str(folder)))
    assert compare.difference(compare.prediction(base), compare.prediction(loaded)) > 0.02, "the adapter acts"
    assert (compare.difference(compare.encoding(base), compare.encoding(loaded)) > 0.02) == text


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (3, 1.0)])
def test_alpha_survives(tiny_models: dict[str, Path], rank: int, alpha: float, tmp_path: Path) -> None:
    family = live.adapted(tiny_models["sdxl"], rank=rank, alpha=alpha, text=True)
    export.adapter(family, tmp_path / "a.safetensors", settings={})
    loaded = plain(tiny_models["sdxl"], tmp_path / "a.safetensors")
    for module in (loaded.pipeline.unet, loaded.pipeline.text_encoder, loaded.pipeline.text_encoder_2):
        scales = [layer.scaling["default_0"] for layer in layers(module, "default_0").values()]
        assert scales and scales == [pytest.approx(alpha / rank)] * len(scales)
    assert compare.difference(compare.prediction(family), compare.prediction(loaded)) < 1e-5


def test_the_picture_is_the_same(folder: Path, tmp_path: Path) -> None:
    family = live.adapted(folder, text=True)
    export.adapter(family, tmp_path / "a.safetensors", settings={})
    [ours] = sampling.sample(family, ["a dog"], [3], steps=2, guidance=4.0, size=64)
    [theirs] = sampling.sample(
        plain(folder, tmp_path / "a.safetensors"), ["a dog"], [3], steps=2, guidance=4.0, size=64
    )
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_names_and_header(kind: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Text encoders' names begin with `text_model.`; of PEFT's fields only those that every reader knows."""
    family = live.adapted(tiny_models[kind], text=True)
    export.adapter(family, tmp_path / "a.safetensors", settings=SETTINGS)
    tensors = load_file(tmp_path / "a.safetensors")
    parts = {name.split(".")[0] for name in tensors}
    assert parts == {family.denoiser_name, *family.text_encoder_names}
    for name, tensor in tensors.items():
        assert name.endswith((".lora_A.weight", ".lora_B.weight")) and tensor.dtype == torch.float32
        assert name.startswith("unet.") or ".text_model.encoder.layers." in name
    header = weights.read_metadata(tmp_path / "a.safetensors")
    assert set(header) >= {"format", "lora_adapter_metadata", "finetune"}
    fields = json.loads(header["lora_adapter_metadata"])
    known = {"r", "lora_alpha", "target_modules", "alpha_pattern", "rank_pattern", "use_dora", "lora_bias"}
    assert {name.rpartition(".")[2] for name in fields} == known
    assert (fields["unet.r"], fields["unet.lora_alpha"]) == (4, 2)
    carrying = {name.rpartition(".lora_")[0].partition(".")[2] for name in tensors if name.startswith("unet.")}
    assert fields["unet.target_modules"] == sorted(carrying)
    told = json.loads(header["finetune"])
    assert (told["model"], told["prompt"], told["rank"]) == ("toybox", "a photo of sks dog", 4)
    assert told["pipeline"] == type(family.pipeline).__name__


def test_nothing_local_is_written(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    local = {
        "model": {"model": str(tiny_models["sd"])},
        "output": {"output": str(tmp_path)},
        "data": {"data": "/home/mary/d"},
    }
    export.adapter(live.adapted(tiny_models["sd"]), tmp_path / "a.safetensors", settings=local)
    raw = (tmp_path / "a.safetensors").read_bytes()
    for secret in (str(tmp_path), str(tiny_models["sd"]), "/home", "mary", "/tmp"):
        assert secret.encode() not in raw


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_two_writes_are_the_same_bytes(kind: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    family = live.adapted(tiny_models[kind], text=True)
    export.adapter(family, tmp_path / "a.safetensors", settings=SETTINGS)
    export.adapter(family, tmp_path / "b.safetensors", settings=dict(reversed(SETTINGS.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(("kind", "dtype"), [("sd", torch.float32), ("sdxl", torch.bfloat16)])
def test_the_live_model_is_as_before(
    tiny_models: dict[str, Path], kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Also the precision of the text encoders' float32 adapters, which diffusers' loader casts to the base's."""
    family = live.adapted(tiny_models[kind], text=True, dtype=dtype)
    family.pipeline.unet.train()
    before, identities = live.state(family), [id(p) for p in family.pipeline.text_encoder.parameters()]
    answer = compare.prediction(family)
    export.adapter(family, tmp_path / "a.safetensors", settings={})
    live.assert_same_state(before, live.state(family))
    assert [id(p) for p in family.pipeline.text_encoder.parameters()] == identities
    assert torch.equal(compare.prediction(family), answer)
    assert list(family.pipeline.unet.peft_config) == [NAME]
    assert {layer.active_adapters[0] for layer in layers(family.pipeline.unet, NAME).values()} == {NAME}


def test_it_trains_on_after_an_export(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    family = live.adapted(tiny_models["sd"], text=True)
    export.adapter(family, tmp_path / "a.safetensors", settings={})
    conditions = family.encode_prompts(["a dog"])
    latents = keys.normal((1, 4, 16, 16), 0, "test")
    family.predict(latents, torch.tensor([10]), conditions, torch.zeros(1, 6)).square().mean().backward()
    for module in (family.pipeline.unet, family.pipeline.text_encoder):
        gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        assert {name for name, g in gradients.items() if g is not None} == set(gradients)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_released_parts_are_not_needed(kind: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    family = live.adapted(tiny_models[kind])
    families.release(family, "vae", *family.text_encoder_names)
    export.adapter(family, tmp_path / "a.safetensors", settings={})
    assert (tmp_path / "a.safetensors").is_file()


def test_layers_of_other_ranks_and_scales_and_convolutions(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """rank_pattern and alpha_pattern, rank-stabilised scaling (Kalajdzievski 2023, 2312.03732), LoCon layers."""
    family = families.load(Source(str(tiny_models["sd"])))
    family.pipeline.unet.add_adapter(
        LoraConfig(
            r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q", "to_k", "conv1"],
            rank_pattern={"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2}, alpha_pattern={"conv1": 3},
        ),
        NAME,
    )  # fmt: skip
    family.pipeline.text_encoder.add_adapter(
        LoraConfig(r=2, lora_alpha=4, target_modules=r".*layers\.1\.self_attn\.[qkvo].*_proj"), NAME
    )
    live.randomise(family)
    export.adapter(family, tmp_path / "a.safetensors", settings={})
    loaded = plain(tiny_models["sd"], tmp_path / "a.safetensors")
    assert compare.difference(compare.prediction(family), compare.prediction(loaded)) < 1e-5
    assert compare.difference(compare.encoding(family), compare.encoding(loaded)) < 1e-5


def test_dora_survives(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Its magnitude vector too (Liu et al. 2024, 2402.09353)."""
    family = families.load(Source(str(tiny_models["sd"])))
    family.pipeline.unet.add_adapter(LoraConfig(r=4, use_dora=True, target_modules=["to_q", "to_v"]), NAME)
    for name, parameter in family.pipeline.unet.named_parameters():
        if parameter.requires_grad:
            noise = keys.normal(tuple(parameter.shape), 0, "test", name)
            parameter.data = parameter.data * (1 + 0.2 * noise) if "magnitude" in name else 0.2 * noise
    export.adapter(family, tmp_path / "a.safetensors", settings={})
    assert any(name.endswith("lora_magnitude_vector.weight") for name in load_file(tmp_path / "a.safetensors"))
    loaded = plain(tiny_models["sd"], tmp_path / "a.safetensors")
    assert compare.difference(compare.prediction(family), compare.prediction(loaded)) < 1e-5


def test_without_an_adapter_there_is_nothing_to_write(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="carries an adapter"):
        export.adapter(families.load(Source(str(tiny_models["sd"]))), tmp_path / "a.safetensors", settings={})


def corrupt(tensors: dict[str, torch.Tensor], metadata: dict[str, str], how: str) -> None:
    some = sorted(name for name in tensors if name.startswith("unet."))[0]
    if how == "value":
        tensors[some] = tensors[some].clone()
        tensors[some].view(-1)[0] *= 1.001
    elif how == "text value":
        some = sorted(name for name in tensors if name.startswith("text_encoder."))[0]
        tensors[some] = -tensors[some]
    elif how == "renamed":
        tensors[some.replace("lora_A", "lora_X")] = tensors.pop(some)
    elif how == "lost layer":
        tensors.pop(some)
        tensors.pop(some.replace("lora_A", "lora_B"))
    elif how == "alpha":
        metadata["lora_adapter_metadata"] = metadata["lora_adapter_metadata"].replace(
            'lora_alpha": 2', 'lora_alpha": 3'
        )
    elif how == "no alpha":
        del metadata["lora_adapter_metadata"]


@pytest.mark.parametrize("how", ["value", "text value", "renamed", "lost layer", "alpha", "no alpha"])
def test_a_planted_corruption_is_found_and_no_file_is_left(
    how: str, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was right before stays, and so does the live model."""
    family, file = live.adapted(tiny_models["sd"], text=True), tmp_path / "run" / "a.safetensors"
    export.adapter(family, file, settings={})
    good, before, write = file.read_bytes(), live.state(family), formats.write

    def corrupted(path: Path, *given: Any) -> None:
        write(path, *given)
        tensors, metadata = load_file(path), weights.read_metadata(path)
        corrupt(tensors, metadata, how)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(formats, "write", corrupted)
    with pytest.raises(Failure, match="does not load back"):
        export.adapter(family, file, settings={})
    assert [path.name for path in file.parent.iterdir()] == ["a.safetensors"] and file.read_bytes() == good
    live.assert_same_state(before, live.state(family))


def test_verify_compares_with_the_live_adapter_and_leaves_the_file(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    family, file = live.adapted(tiny_models["sd"]), tmp_path / "a.safetensors"
    export.adapter(family, file, settings={})
    verify_adapter(family, file)
    with torch.no_grad():
        layer = family.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        layer.lora_B[NAME].weight[0, 0] += 0.01
    with pytest.raises(Failure, match="does not load back") as failure:
        verify_adapter(family, file)
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_q: other values" in str(failure.value)
    assert file.is_file()


def test_the_header_is_read_by_other_tools(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    export.adapter(live.adapted(tiny_models["sd"]), tmp_path / "a.safetensors", settings={})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
