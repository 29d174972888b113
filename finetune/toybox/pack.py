"""Writes the trained parts as one pipeline folder, in 16 bits, and proves that it loads back."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from finetune.toybox import noise, text
from finetune.toybox.judge import Judge

LIMIT = 12_000_000
"""Bytes that the weights may take in the package."""


def export(
    folder: Path,
    unet: UNet2DConditionModel,
    encoder: CLIPTextModel,
    autoencoder: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    judge: Judge,
) -> None:
    """A Stable Diffusion pipeline in diffusers' layout, with the judge beside it; replaces what was there."""
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    unet, encoder, autoencoder = (copy.deepcopy(part).half() for part in (unet, encoder, autoencoder))
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=noise.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(beside)
    text.save_encoder(encoder, beside / "text_encoder")
    text.save_tokenizer(tokenizer, beside / "tokenizer")
    judge.save(beside / "judge")
    check(beside, {"unet": unet, "text_encoder": encoder, "vae": autoencoder})
    for file in beside.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def check(folder: Path, parts: dict[str, nn.Module]) -> None:
    """The folder holds exactly these weights, and is small enough to ship."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    for name, live in parts.items():
        loaded = getattr(pipeline, name).state_dict()
        for key, value in live.state_dict().items():
            if not torch.equal(loaded[key], value):
                raise RuntimeError(f"{name}: {key} came back different from {folder}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if size > LIMIT:
        raise RuntimeError(f"{folder} has {size / 1e6:.1f} MB, more than the {LIMIT / 1e6:.0f} MB that may be shipped")
