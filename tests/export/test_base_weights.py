"""A model's weights by the names of its layers, wherever it lies."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import original
import pytest
import tiny
import torch
from safetensors.torch import load_file

from finetune.errors import Fault
from finetune.export.base_weights import BaseWeights
from finetune.export.naming import written
from finetune.families import Source


@pytest.mark.parametrize("form", ["folder", "shards", "file"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_every_weight_by_its_name(kind: str, form: str, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    pipeline, source = tiny.pipeline(kind), Source(str(tiny_models[kind]))
    if form == "shards":
        pipeline.save_pretrained(tmp_path / "model", max_shard_size="60KB")
        assert len([*(tmp_path / "model" / "unet").glob("*-of-*.safetensors")]) > 1
        source = Source(str(tmp_path / "model"))
    if form == "file":
        file = original.save(pipeline, tmp_path / "model.safetensors")
        source = Source(str(file), model_config=str(tiny_models[kind]))
    found = BaseWeights(source)
    parts = {name: getattr(pipeline, name) for name in ("unet", *found.family.text_encoder_names)}
    expected = {
        f"{part}.{written(module, name)}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert all(torch.equal(found.load(name), tensor) for name, tensor in expected.items())
    layers = {
        f"{part}.{written(module, name)}"
        for part, module in parts.items()
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert set(found.layers()) == layers


def test_of_a_hub_model_only_what_is_needed(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(model: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tiny_models["sd"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Source("someone/model").local(["unet", "text_encoder"]) == tiny_models["sd"]
    files = {
        "model_index.json": True,
        "unet/config.json": True,
        "unet/diffusion_pytorch_model.safetensors": True,
        "unet/diffusion_pytorch_model.fp16.safetensors": False,
        "unet/diffusion_pytorch_model.non_ema.safetensors": False,
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors": True,
        "unet/diffusion_pytorch_model.safetensors.index.json": True,
        "unet/diffusion_pytorch_model.bin": False,
        "text_encoder/model.safetensors": True,
        "text_encoder/model.fp16.safetensors": False,
        "text_encoder_2/model.safetensors": False,
        "vae/diffusion_pytorch_model.safetensors": False,
        "v1-5-pruned.safetensors": False,
    }
    assert {file: any(fnmatch(file, pattern) for pattern in asked) for file in files} == files


def test_a_part_without_weights_is_named(tmp_path: Path) -> None:
    folder = tiny.save("sd", tmp_path / "model")
    for file in (folder / "unet").iterdir():
        file.unlink()
    with pytest.raises(Fault, match=r"unet: no weights there"):
        BaseWeights(Source(str(folder)))


def test_a_layer_of_no_known_model_is_named(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    from safetensors.torch import save_file

    file = original.save(tiny.pipeline("sd"), tmp_path / "model.safetensors")
    save_file({**load_file(file), "model.diffusion_model.odd.weight": torch.ones(2)}, file)
    with pytest.raises(Fault, match=r"model\.diffusion_model\.odd\.weight"):
        BaseWeights(Source(str(file), model_config=str(tiny_models["sd"])))
