"""The models to measure with: Stable Diffusion 1.5 and XL as they are, or narrower, random weights from one seed.

They are written tensor by tensor; none is ever in memory as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from finetune import keys
from finetune.export import stream
from finetune.export.stream import Entry
from finetune.families import sd, sdxl

UNET = {"block_out_channels": (320, 640, 1280, 1280), "norm_num_groups": 32, "sample_size": 64}
VAE = {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32, "sample_size": 512}
LEVELS, WAYS = 4, (("Down", "En"), ("Up", "De"))
TEXT = {"vocab_size": 49408, "num_hidden_layers": 12}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""Those of https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5"""
XL_VAE = {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
"""Where those of https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0 are others"""
WIDTHS = (
    *("block_out_channels", "norm_num_groups", "cross_attention_dim", "hidden_size", "intermediate_size"),
    "projection_dim",
)
"""What is divided where a model is narrower"""
POOLED, SIZES = "projection_class_embeddings_input_dim", 6
"""What SDXL's UNet is told of a picture: the pooled caption, and so many numbers, each of them in waves"""


@dataclass(frozen=True)
class Model:
    """A model to measure with."""

    make: Callable[[int], DiffusionPipeline]
    """By the divisor of its widths, without values"""
    divisor: int
    resolution: int
    """Side in pixels that it is measured at"""
    dtype: torch.dtype
    """Of its files"""
    rivals: bool = True
    """Whether it is one that the other trainers' scripts train"""


def save(folder: Path, model: Model) -> Path:
    """A diffusers folder of it; the same weights every time."""
    pipeline = model.make(model.divisor)
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        place = folder / name
        if isinstance(part, nn.Module):
            _write(place, part, model.dtype)
        elif part is not None:
            part.save_pretrained(place)
        if isinstance(part, CLIPTokenizer):
            _as_published(place)
    return folder


def tokenizer(**named: Any) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer without any merges: a token a letter, 77 positions."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77, **named)


def stable_diffusion(divisor: int) -> StableDiffusionPipeline:
    """1.5"""
    return StableDiffusionPipeline(
        unet=_empty(UNet2DConditionModel, **_narrow({**UNET, **sd.FIRST["unet"]}, divisor)),
        text_encoder=_text(CLIPTextModel, sd.FIRST["text_encoder"], divisor),
        vae=_vae(VAE, divisor),
        tokenizer=tokenizer(),
        scheduler=DDIMScheduler(**SCHEDULER, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(divisor: int) -> StableDiffusionXLPipeline:
    """1.0"""
    told = _narrow({**sdxl.PARTS["unet"], "sample_size": 128, "norm_num_groups": 32}, divisor)
    told[POOLED] = 1280 // divisor + SIZES * told["addition_time_embed_dim"]
    return StableDiffusionXLPipeline(
        unet=_empty(UNet2DConditionModel, **told),
        text_encoder=_text(CLIPTextModel, sdxl.PARTS["text_encoder"], divisor),
        text_encoder_2=_text(
            CLIPTextModelWithProjection, {**sdxl.PARTS["text_encoder_2"], "hidden_act": "gelu"}, divisor
        ),
        vae=_vae({**VAE, **XL_VAE}, divisor),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(pad_token="!"),
        scheduler=EulerDiscreteScheduler(**SCHEDULER, timestep_spacing="leading"),
    )


MODELS = {
    "quarter": Model(stable_diffusion, 4, 256, torch.float32),
    "sd15": Model(stable_diffusion, 1, 512, torch.bfloat16),
    "sdxl": Model(stable_diffusion_xl, 1, 1024, torch.bfloat16, rivals=False),
}


def _vae(told: Mapping[str, Any], divisor: int) -> nn.Module:
    kinds = {f"{way.lower()}_block_types": (f"{way}{coder}coderBlock2D",) * LEVELS for way, coder in WAYS}
    return _empty(AutoencoderKL, **kinds, layers_per_block=2, **_narrow(told, divisor))


def _text(kind: Any, told: Mapping[str, Any], divisor: int) -> nn.Module:
    end = len(tokenizer()) - 1
    marks = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    return _empty(kind, CLIPTextConfig(**_narrow({**TEXT, **told}, divisor), **marks))


def _empty(kind: Any, *given: Any, **named: Any) -> Any:
    """A part without values."""
    with torch.device("meta"):
        return kind(*given, **named)


def _narrow(told: Mapping[str, Any], divisor: int) -> dict[str, Any]:
    """A configuration with its widths divided."""

    def divided(width: Any) -> Any:
        return tuple(map(divided, width)) if isinstance(width, tuple) else width // divisor

    return {name: divided(value) if name in WIDTHS else value for name, value in told.items()}


def _write(place: Path, part: Any, dtype: torch.dtype) -> None:
    """A part's configuration and its weights, by the names of the published checkpoints."""
    text = isinstance(part, CLIPTextModel | CLIPTextModelWithProjection)
    if text:
        part.config.architectures = [type(part).__name__]  # by which diffusers' script finds its class
    (part.config.save_pretrained if text else part.save_config)(place)
    shapes = {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}
    if text:  # a level that this version of transformers does not write, and trainers with older ones read
        inner = {name: name.removeprefix("text_model.") for name in shapes}
        shapes = {n if inner[n].startswith("text_proj") else f"text_model.{inner[n]}": s for n, s in shapes.items()}
    entries = {name: Entry(shape, dtype, partial(_values, place.name, name, shape)) for name, shape in shapes.items()}
    name = "model.safetensors" if text else "diffusion_pytorch_model.safetensors"
    stream.write(place / name, entries, {"format": "pt"})  # which older versions of transformers ask for


def _values(part: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """As wide as PyTorch draws them: norms are one, biases zero, of all else a sum over its inputs has variance 1/3."""
    if len(shape) < 2:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    inputs = torch.Size(shape[1:]).numel()
    return keys.normal(shape, 0, "bench", part, name).mul_((3 * inputs) ** -0.5)


def _as_published(place: Path) -> None:
    """A tokenizer's files as older libraries read them."""
    words = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    (place / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (place / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
