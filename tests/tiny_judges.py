"""Tiny random metric models of the real classes, saved as folders: what the hub would give."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from finetune.evaluation.lpips import WIDTHS, Features


def save(folder: Path, channels: bool = False) -> dict[str, Path]:
    """`dino`, `dinov2`, `clip`, `lpips`, with the same random weights every time."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    shape |= {"initializer_range": 0.3}  # enough for other pictures to be other vectors
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(ViTConfig(**shape, intermediate_size=32, image_size=32)).save_pretrained(folder / "dino")
        Dinov2Model(Dinov2Config(**shape, mlp_ratio=2, image_size=32)).save_pretrained(folder / "dinov2")
        vision = CLIPVisionConfig(**shape, intermediate_size=32, image_size=32, projection_dim=12)
        both = CLIPConfig(
            text_config=tiny.text_config(16, projection=12).to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=12,
        )
        CLIPModel(both).save_pretrained(folder / "clip")
        tiny.tokenizer().save_pretrained(folder / "clip")
        vgg = Features([[width // 16 for width in stage] for stage in WIDTHS])
        heads = {f"lin{i}.model.1.weight": torch.rand(1, stage[-1] // 16, 1, 1) for i, stage in enumerate(WIDTHS)}
    (folder / "lpips").mkdir()
    classifier = {"head.fc.weight": torch.zeros(2, 2)}
    save_file({**vgg.state_dict(), **classifier}, folder / "lpips" / "model.safetensors")
    if channels:
        save_file(heads, folder / "lpips" / "lpips.safetensors")
    return {name: folder / name for name in ("dino", "dinov2", "clip", "lpips")}
