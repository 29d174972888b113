"""A merged model is a plain diffusers folder that draws the live model's pictures."""

from __future__ import annotations

import json
from pathlib import Path

import live
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from finetune import export, families, sampling
from finetune.adapters import NAME
from finetune.errors import Failure, Fault
from finetune.export import compare, merging, stream
from finetune.families import Family, Source


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Family:
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return families.wrap(pipeline)


def picture(family: Family) -> np.ndarray:
    [image] = sampling.sample(family, ["a dog"], [3], steps=2, guidance=4.0)
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["sd", "sd-v", "sdxl"])
def test_plain_diffusers_draws_the_live_models_picture(kind: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    family = live.adapted(tiny_models[kind], text=True)
    before, expected = live.state(family), picture(family)
    export.merged(family, tmp_path / "model", dtype=torch.float32)
    live.assert_same_state(before, live.state(family))
    loaded = plain(tmp_path / "model")
    assert np.abs(picture(loaded) - expected).max() <= 1
    assert np.abs(picture(plain(tiny_models[kind])) - expected).max() > 10, "the adapter acts"
    assert loaded.pipeline.scheduler.config.prediction_type == family.pipeline.scheduler.config.prediction_type
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_fine_tuned_model_without_an_adapter(kind: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    family = live.tuned(tiny_models[kind], text=True)
    export.merged(family, tmp_path / "before", dtype=torch.float32)
    expected = picture(family)
    export.merged(family, tmp_path / "model", dtype=torch.float32)
    assert np.abs(picture(plain(tmp_path / "model")) - expected).max() <= 1
    for file in (tmp_path / "before").rglob("*.*"):
        after = tmp_path / "model" / file.relative_to(tmp_path / "before")
        assert after.read_bytes() == file.read_bytes(), "texts that were read in between leave no trace"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_from_a_bf16_base(dtype: torch.dtype, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Each weight is rounded once, from base + change in float32: not first to the base's bf16 and then again."""
    family = live.adapted(tiny_models["sdxl"], text=True, dtype=torch.bfloat16)
    export.merged(family, tmp_path / "model", dtype=dtype)
    layer = family.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    change = layer.scaling[NAME] * layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight
    expected = (layer.base_layer.weight.float() + change).to(dtype)
    with safe_open(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        found = file.get_tensor("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight")
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {stream.NAMES[dtype]}  # noqa: SIM118
    assert torch.allclose(found.float(), expected.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert plain(tmp_path / "model", dtype).pipeline.unet.dtype == dtype


def test_names_in_the_files(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Text encoders' names begin with `text_model.`, no adapter's name is left, and nothing local is said."""
    family = live.adapted(tiny_models["sdxl"], text=True)
    export.merged(family, tmp_path / "model", dtype=torch.float32)
    for part in ("text_encoder", "text_encoder_2"):
        with safe_open(tmp_path / "model" / part / "model.safetensors", framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata()
        assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
        assert metadata == {"format": "pt"}
        config = json.loads((tmp_path / "model" / part / "config.json").read_text())
        assert config["architectures"] == [type(getattr(family.pipeline, part)).__name__]
    for path in (tmp_path / "model").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for other in (b"lora_", b"base_layer", str(tiny_models["sdxl"]).encode(), str(tmp_path).encode()):
                assert other not in content, (path, other)


def test_dora_and_convolutions_are_merged(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    for name, config in {
        "dora": LoraConfig(r=4, use_dora=True, target_modules=["to_q", "to_v"]),
        "locon": LoraConfig(r=4, lora_alpha=6, target_modules=["conv1", "proj_in", "to_k"]),
    }.items():
        family = families.load(Source(str(tiny_models["sd"])))
        family.pipeline.unet.add_adapter(config, NAME)
        live.randomise(family, relative=True)
        expected = compare.prediction(family)
        export.merged(family, tmp_path / name, dtype=torch.float32)
        assert compare.difference(expected, compare.prediction(plain(tmp_path / name))) < 1e-5
        assert compare.difference(expected, compare.prediction(plain(tiny_models["sd"]))) > 1e-3


@pytest.mark.parametrize(
    ("part", "how"),
    [("unet", "value"), ("unet", "lost"), ("unet", "unmerged"), ("vae", "value"), ("text_encoder", "unmerged")],
)
def test_a_planted_corruption_is_found_and_nothing_is_left(
    part: str, how: str, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, write = live.adapted(tiny_models["sd"], text=True), stream.write
    before = live.state(family)

    def corrupted(path: Path, entries: dict[str, stream.Entry]) -> None:
        entries = dict(entries)
        if path.parent.name == part:
            name = sorted(name for name in entries if "to_q.weight" in name or "q_proj.weight" in name)[-1]
            entry, bump = entries[name], torch.zeros(entries[name].shape).index_fill(0, torch.tensor([0]), 0.01)
            if how == "lost":
                del entries[name]
            elif how == "value":
                entries[name] = stream.Entry(entry.shape, entry.dtype, lambda: entry.make() + bump)
            else:
                base = live_weight(family, part)
                entries[name] = stream.Entry(entry.shape, entry.dtype, lambda: base)
        write(path, entries)

    monkeypatch.setattr(stream, "write", corrupted)
    with pytest.raises(Failure, match="does not load back") as failure:
        export.merged(family, tmp_path / "model", dtype=torch.float32)
    assert part in str(failure.value)
    assert not list(tmp_path.iterdir())
    live.assert_same_state(before, live.state(family))


def live_weight(family: Family, part: str) -> torch.Tensor:
    """The base's weight of the layer that the corruption is planted in."""
    own = merging.own_tensors(getattr(family.pipeline, part))
    return own[sorted(name for name in own if "to_q.weight" in name or "q_proj.weight" in name)[-1]]


def test_what_is_there_is_not_written_over(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    family = live.adapted(tiny_models["sd"])
    with pytest.raises(Fault, match="something there already"):
        export.merged(family, tmp_path / "model", dtype=torch.float32)
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"
    (tmp_path / "model" / "mine.txt").unlink()
    export.merged(family, tmp_path / "model", dtype=torch.float32)
    assert (tmp_path / "model" / "model_index.json").is_file()


def test_released_parts_are_asked_for(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    family, source = live.adapted(tiny_models["sd"]), Source(str(tiny_models["sd"]))
    families.release(family, "vae", "text_encoder")
    with pytest.raises(ValueError, match=r"text_encoder, vae was released|vae, text_encoder was released"):
        export.merged(family, tmp_path / "model", dtype=torch.float32)
    families.restore(family, source)
    export.merged(family, tmp_path / "model", dtype=torch.float32)


def test_verify_finds_a_live_model_that_went_on(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    family = live.adapted(tiny_models["sd"])
    export.merged(family, tmp_path / "model", dtype=torch.float32)
    export.verify_merged(family, tmp_path / "model")
    with torch.no_grad():
        family.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.lora_B[NAME].weight += 0.01
    with pytest.raises(
        Failure, match=r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn1\.to_q\.weight: other values"
    ):
        export.verify_merged(family, tmp_path / "model")
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_file_written_tensor_by_tensor_equals_the_librarys(tmp_path: Path) -> None:
    """Names, shapes, values, alignment; made one at a time, in order, never twice."""
    made: list[str] = []
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.arange(4),
        "half": torch.randn(7).half(),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "view": torch.randn(4, 6).t(),
        "empty": torch.zeros(0, 3),
    }

    def entry(name: str) -> stream.Entry:
        def make() -> torch.Tensor:
            made.append(name)
            return tensors[name]

        return stream.Entry(tuple(tensors[name].shape), tensors[name].dtype, make)

    stream.write(tmp_path / "a.safetensors", {name: entry(name) for name in tensors})
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys() and sorted(made) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
    stream.write(tmp_path / "b.safetensors", {name: entry(name) for name in reversed(tensors)})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_large_parts_are_written_in_shards(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Each below the limit, none twice, and read by diffusers, by transformers and by this toolkit."""
    family, limit = live.adapted(tiny_models["sdxl"], text=True), 30_000
    expected = picture(family)
    export.merged(family, tmp_path / "model", dtype=torch.float32, shard=limit)
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder_2", "model")):
        files = sorted((tmp_path / "model" / part).glob("*.safetensors"))
        assert [path.name for path in files] == [
            f"{stem}-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
        ]
        held = [load_file(path) for path in files]
        sizes = [sum(tensor.numel() * 4 for tensor in shard.values()) for shard in held]
        assert all(size <= limit or len(shard) == 1 for size, shard in zip(sizes, held, strict=True))
        index = json.loads((tmp_path / "model" / part / f"{stem}.safetensors.index.json").read_text())
        named = {name: path.name for path, shard in zip(files, held, strict=True) for name in shard}
        assert index == {"metadata": {"total_size": sum(sizes)}, "weight_map": named}
        assert len(named) == sum(map(len, held)) and len(files) > 2
    assert np.abs(picture(plain(tmp_path / "model")) - expected).max() <= 1
    assert np.abs(picture(families.load(Source(str(tmp_path / "model")))) - expected).max() <= 1
