"""How much memory the tools take on files as large as SDXL's. Its layers' real names and shapes, random numbers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune import families
from finetune.export import naming, stream
from finetune.export.stream import Entry

pytestmark = pytest.mark.slow
MEASURED = """
import resource, sys
from finetune import cli
from finetune.export import tools
from finetune.families import Source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cli.main(sys.argv[1:])
print("PEAK", before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
TARGETS = (*families.StableDiffusionXL.adapter_targets, *families.StableDiffusionXL.text_adapter_targets)


def test_adapters(tmp_path: Path) -> None:
    """Rank 64 on the attention of the UNet and both text encoders, and on the UNet's convolutions."""
    one, two = (lora(tmp_path / f"{name}.safetensors", 64) for name in "ab")
    out = tmp_path / "out.safetensors"
    for words in (
        ["convert", one, out, "--format", "diffusers"],
        ["merge", "--adapter", one, two, "--scale", "0.8", "0.5", "--output", out],
        ["merge", "--adapter", one, two, "--output", out, "--rank", "32"],
        ["resize", one, out, "--rank", "16"],
        ["resize", one, out, "--energy", "0.9"],
    ):
        taken = measured(*words, "--overwrite")
        assert taken < 0.5e9 + 0.2 * one.stat().st_size, "far less than any of the files"


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_models(layers: str, tmp_path: Path) -> None:
    base, tuned = model(tmp_path / "base", 0), model(tmp_path / "tuned", 1)
    size = sum(file.stat().st_size for file in base.rglob("*.safetensors"))
    assert size > 6.5e9, "SDXL's UNet and text encoders in fp16"
    taken = measured("extract", "--model", base, "--tuned", tuned, "--output", tmp_path / "out.safetensors",
                     "--rank", "32", "--layers", layers)  # fmt: skip
    assert taken < 0.25 * size


def measured(*words: object) -> int:
    """Peak memory of a command in a process of its own, in bytes beyond what the libraries take."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.rpartition("PEAK")[2].split())
    sizes = [f"{Path(str(word)).name} {Path(str(word)).stat().st_size / 1e9:.2f} GB" for word in words
             if str(word).endswith(".safetensors")]  # fmt: skip
    taken = f"peak {peak / 1e9:.2f} GB, of which libraries {before / 1e9:.2f} GB; {time.monotonic() - start:.0f} s"
    print(f"\n{words[0]} {' '.join(map(str, words[-5:]))}: {', '.join(sizes)}; {taken}")
    print(done.stdout.strip())
    return peak - before


def parts() -> dict[str, nn.Module]:
    """SDXL's denoiser and text encoders, without memory (stabilityai/stable-diffusion-xl-base-1.0, config.json)."""
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                use_linear_projection=True,
                cross_attention_dim=2048,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            ),
            "text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextConfig(
                    hidden_size=1280,
                    intermediate_size=5120,
                    num_hidden_layers=32,
                    num_attention_heads=20,
                    projection_dim=1280,
                )
            ),
        }


def model(folder: Path, seed: int) -> Path:
    """A diffusers folder, as much as the tools read of one. Zeros take no space on the disk, so the base is zero."""
    index = {"_class_name": "StableDiffusionXLPipeline"}
    for part, module in parts().items():
        entries = {naming.written(module, name): tensor.shape for name, tensor in module.state_dict().items()}
        name = "diffusion_pytorch_model" if part == "unet" else "model"
        write(folder / part / f"{name}.safetensors", entries, seed if part == "unet" else 0)
        index[part] = ["diffusers", type(module).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def lora(path: Path, rank: int) -> Path:
    entries = {}
    for part, module in parts().items():
        for name, layer in module.named_modules():
            if not (name.endswith(TARGETS) or (part == "unet" and isinstance(layer, nn.Conv2d))):
                continue
            out, inside, *kernel = layer.weight.shape
            own = f"{part}.{naming.written(module, name)}"
            entries[f"{own}.lora_A.weight"] = (rank, inside, *kernel)
            entries[f"{own}.lora_B.weight"] = (out, rank, *[1] * len(kernel))
    write(path, entries, seed=1)
    return path


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
    """Random fp16 numbers; with seed 0, a file with a hole."""
    if seed == 0:
        stream.write(path, {"x": Entry((0,), torch.float16, lambda: torch.empty(0))})
        header, end = {}, 0
        for name, shape in shapes.items():
            size = 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        return
    made = torch.randn(2**22, generator=torch.Generator().manual_seed(seed)).half() * 0.02

    def random(shape: tuple[int, ...], place: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return made.roll(place * 7919).repeat(-(-count // len(made)))[:count].reshape(shape)

    stream.write(
        path,
        {
            name: Entry(tuple(shape), torch.float16, lambda shape=shape, place=place: random(shape, place))
            for place, (name, shape) in enumerate(shapes.items())
        },
    )
