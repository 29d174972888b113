"""Adapter files as other programs write them, in kohya's names, of random numbers; and their changes by the papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune import keys

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
LAYERS: dict[str, dict[str, tuple[int, ...]]] = {
    "sd": {
        f"lora_unet_{ATTENTION}.to_q": (8, 8),
        f"lora_unet_{ATTENTION}.to_v": (8, 16),
        "lora_unet_down_blocks.1.resnets.0.conv1": (8, 8, 3, 3),
        "lora_unet_down_blocks.1.attentions.0.proj_in": (8, 8, 1, 1),
        "lora_te_text_model.encoder.layers.0.mlp.fc1": (32, 16),
    },
    "sdxl": {
        "lora_unet_input_blocks.4.1.transformer_blocks.0.attn2.to_q": (16, 16),
        "lora_unet_input_blocks.4.1.transformer_blocks.0.attn2.to_v": (16, 40),
        "lora_unet_input_blocks.4.0.in_layers.2": (16, 8, 3, 3),
        "lora_te1_text_model.encoder.layers.0.self_attn.q_proj": (16, 16),
        "lora_te2_text_model.encoder.layers.1.self_attn.out_proj": (24, 24),
    },
}
"""Some layers of the tiny models, by the names that kohya's scripts give them, and the shapes of their weights."""
VERSIONS = {"sd": "sd_v1", "sdxl": "sdxl_base_v1-0"}


def lora(
    path: Path,
    kind: str = "sd",
    *,
    rank: int = 4,
    alpha: float | None = 2.0,
    layers: Sequence[int] = range(5),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """LoRA and LoCon. `layers`: which of `LAYERS`."""
    tensors: dict[str, Tensor] = {}
    for name, (out, inside, *kernel) in [list(LAYERS[kind].items())[place] for place in layers]:
        tensors[f"{name}.lora_down.weight"] = normal(seed, name, "down", rank, inside, *kernel)
        tensors[f"{name}.lora_up.weight"] = normal(seed, name, "up", out, rank, *[1] * len(kernel))
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return save(path, tensors, kind, dtype, metadata)


def save(
    path: Path,
    tensors: Mapping[str, Tensor],
    kind: str = "sd",
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    named = {}
    for name, tensor in tensors.items():
        suffix = ".".join(name.split(".")[-2:]) if name.endswith(".weight") else name.split(".")[-1]
        named[f"{name.removesuffix(f'.{suffix}').replace('.', '_')}.{suffix}"] = tensor.to(dtype).contiguous()
    told = {"ss_base_model_version": VERSIONS[kind]} if metadata is None else dict(metadata)
    save_file(named, path, told)
    return path


def normal(seed: int, name: str, half: str, *shape: int) -> Tensor:
    return 0.1 * keys.normal(shape, seed, "test", name, half)


def changes(path: Path) -> dict[str, Tensor]:
    """alpha / rank * up @ down of each layer of a LoRA file in kohya's names (Hu et al. 2021, eq. 3), float64."""
    tensors, made = {name: tensor.double() for name, tensor in load_file(path).items()}, {}
    for name in {name.partition(".")[0] for name in tensors}:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        scale = float(tensors.get(f"{name}.alpha", torch.tensor(len(down)))) / len(down)
        made[name] = scale * torch.einsum("or,rn->on", up.flatten(1), down.flatten(1))
    return made
