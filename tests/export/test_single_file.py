"""One file in the original layout: the names and tensors of an independent writer, and diffusers draws the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import live
import numpy as np
import original
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel

from finetune import export, families, sampling
from finetune.adapters import NAME
from finetune.errors import Failure, Fault
from finetune.export import compare, stream
from finetune.families import Family, Source


def read(file: Path, config: Path, kind: str, dtype: torch.dtype = torch.float32) -> Family:
    """As a user of diffusers loads it."""
    made = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    pipeline = made.from_single_file(str(file), config=str(config), torch_dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return families.wrap(pipeline)


def picture(family: Family) -> np.ndarray:
    [image] = sampling.sample(family, ["a dog"], [3], steps=2, guidance=4.0)
    return np.asarray(image).astype(int)


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 2's: text of width 1024 by OpenCLIP, whose activation is the exact gelu; the velocity."""
    pipeline = tiny.pipeline("sd-v")
    config = tiny.text_config(1024, 512)
    config.hidden_act, config.intermediate_size = "gelu", 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.register_modules(text_encoder=CLIPTextModel(config), unet=tiny.unet_sd(1024))
    folder = tmp_path_factory.mktemp("sd2") / "model"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tiny_models: dict[str, Path], sd2: Path) -> dict[str, Path]:
    return {**tiny_models, "sd2": sd2}


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd2"])
def test_diffusers_draws_the_live_models_picture(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    family = live.adapted(folders[kind], text=True)
    before, expected = live.state(family), picture(family)
    export.single_file(family, tmp_path / "a.safetensors", dtype=torch.float32)
    live.assert_same_state(before, live.state(family))
    assert np.abs(picture(read(tmp_path / "a.safetensors", folders[kind], kind)) - expected).max() <= 1
    assert np.abs(picture(read(original_of(folders[kind], tmp_path), folders[kind], kind)) - expected).max() > 10
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "base.safetensors"}


def original_of(folder: Path, tmp_path: Path) -> Path:
    return original.save(DiffusionPipeline.from_pretrained(folder), tmp_path / "base.safetensors")


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd2"])
def test_names_and_tensors_are_the_independent_writers(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """tests/original.py knows nothing of the writer."""
    family = families.load(Source(str(folders[kind])))
    export.single_file(family, tmp_path / "a.safetensors", dtype=torch.float32)
    ours, theirs = load_file(tmp_path / "a.safetensors"), load_file(original_of(folders[kind], tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_embedded_model(tmp_path: Path) -> None:
    """Real weights, and a VAE of three levels."""
    family = live.adapted(families.Source("toybox").folder)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in family.pipeline.unet.named_parameters():
            if ".lora_B." in name:
                parameter.mul_(0.1)
    expected = picture(family)
    export.single_file(family, tmp_path / "a.safetensors", dtype=torch.float32)
    config = families.Source("toybox").folder
    assert config is not None
    assert np.abs(picture(read(tmp_path / "a.safetensors", config, "sd")) - expected).max() <= 1
    assert np.abs(picture(families.load(Source("toybox"))) - expected).max() > 10, "the adapter acts"


def test_this_toolkit_trains_on_from_it(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """The family is told by the file alone, SD 2's by the width of its text."""
    family = live.tuned(tiny_models["sd"], text=True)
    export.single_file(family, tmp_path / "a.safetensors", dtype=torch.float32)
    again = families.load(Source(str(tmp_path / "a.safetensors"), model_config=str(tiny_models["sd"])))
    assert compare.difference(compare.prediction(family), compare.prediction(again)) < 1e-5
    assert compare.difference(compare.encoding(family), compare.encoding(again)) < 1e-5


def test_sd2_is_known_as_such(sd2: Path, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    family = families.load(Source(str(sd2)))
    export.single_file(family, tmp_path / "a.safetensors", dtype=torch.float16)
    assert infer_diffusers_model_type(load_file(tmp_path / "a.safetensors")) == "v2"
    assert Source(str(tmp_path / "a.safetensors")).pipeline_class() == "StableDiffusionPipeline"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Each weight is rounded once, q, k and v in one tensor too."""
    family = live.adapted(tiny_models["sdxl"], text=True)
    told = {"modelspec.title": "sks"}
    export.single_file(family, tmp_path / "a.safetensors", dtype=dtype, metadata=told)
    layer = family.pipeline.text_encoder_2.text_model.encoder.layers[0].self_attn.q_proj
    change = layer.scaling[NAME] * layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        fused = file.get_tensor("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight")
        header = file.metadata()
        assert (header["format"], header["modelspec.title"]) == ("pt", "sks")
        assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {stream.NAMES[dtype]}  # noqa: SIM118
    assert torch.equal(fused[: len(change)], (layer.base_layer.weight + change).to(dtype))
    content = (tmp_path / "a.safetensors").read_bytes()
    behind = content[8 + int.from_bytes(content[:8], "little") :]
    assert header["modelspec.hash_sha256"] == "0x" + hashlib.sha256(behind).hexdigest()


FUSED = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
UPSAMPLER = "model.diffusion_model.output_blocks.2.2.conv.weight"


def plant(entries: dict[str, stream.Entry], how: str) -> None:
    if how == "lost":
        entries.pop(UPSAMPLER)
    elif how == "one too many":
        entries[f"{UPSAMPLER}_"] = entries[UPSAMPLER]
    elif how == "another's name":
        entries[UPSAMPLER.replace(".2.conv", ".1.conv")] = entries.pop(UPSAMPLER)
    else:
        entry = entries[how]
        entries[how] = stream.Entry(entry.shape, entry.dtype, lambda: -entry.make())


@pytest.mark.parametrize(
    "how", ["lost", "one too many", "another's name", FUSED, "first_stage_model.decoder.mid.attn_1.q.weight"]
)
def test_a_planted_corruption_is_found_and_nothing_is_left(
    how: str, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, write = live.adapted(tiny_models["sdxl"], text=True), stream.write
    before = live.state(family)

    def corrupted(path: Path, entries: dict[str, stream.Entry], *given: Any, **named: Any) -> None:
        plant(entries, how)
        write(path, entries, *given, **named)

    monkeypatch.setattr(stream, "write", corrupted)
    with pytest.raises(Failure, match="does not load back"):
        export.single_file(family, tmp_path / "a.safetensors", dtype=torch.float32)
    assert not list(tmp_path.iterdir())
    live.assert_same_state(before, live.state(family))


def test_what_is_there_is_not_written_over(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(Fault, match="something there already"):
        export.single_file(
            families.load(Source(str(tiny_models["sd"]))), tmp_path / "a.safetensors", dtype=torch.float32
        )
    assert (tmp_path / "a.safetensors").read_text() == "mine"


def test_layers_without_an_original_name_are_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    family = families.load(Source(str(tiny_models["sd"])))
    family.pipeline.unet.time_embedding.cond_proj = torch.nn.Linear(3, 8, bias=False)
    with pytest.raises(Fault, match=r"unet: the original layout has no place for 'time_embedding\.cond_proj'"):
        export.single_file(family, tmp_path / "a.safetensors", dtype=torch.float32)
    assert not list(tmp_path.iterdir())
