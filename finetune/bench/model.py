"""The model to measure with: Stable Diffusion 1.5's topology, all widths divided, random weights from one seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

UNET, VAE, TEXT = (320, 640, 1280, 1280), (128, 256, 512, 512), 768
GROUPS, VOCABULARY, LEVELS = 32, 49408, 4
"""Those of Stable Diffusion 1.5, https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5"""


def save(folder: Path, divisor: int) -> Path:
    """A diffusers folder of it; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = _pipeline(divisor)
    pipeline.save_pretrained(folder)
    _as_published(folder)
    return folder


def _as_published(folder: Path) -> None:
    """Names and files as the published checkpoint has them, which trainers with older libraries read."""
    text, tokens = folder / "text_encoder" / "model.safetensors", folder / "tokenizer"
    weights = {f"text_model.{name.removeprefix('text_model.')}": one for name, one in load_file(text).items()}
    save_file(weights, text, {"format": "pt"})
    words = json.loads((tokens / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    (tokens / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (tokens / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def unet_widths(divisor: int) -> tuple[int, ...]:
    return tuple(width // divisor for width in UNET)


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokenizer without any merges: a token a letter, 77 positions."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _pipeline(divisor: int) -> StableDiffusionPipeline:
    parts: dict[str, Any] = {"tokenizer": tokenizer(), "safety_checker": None, "feature_extractor": None}
    end = len(parts["tokenizer"]) - 1
    text = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=TEXT // divisor, intermediate_size=4 * TEXT // divisor,
        num_hidden_layers=12, num_attention_heads=12, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=unet_widths(divisor), cross_attention_dim=TEXT // divisor,
        attention_head_dim=8, norm_num_groups=GROUPS // divisor,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * LEVELS, up_block_types=("UpDecoderBlock2D",) * LEVELS,
        block_out_channels=tuple(width // divisor for width in VAE), layers_per_block=2,
        norm_num_groups=GROUPS // divisor, sample_size=512,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    parts |= {"text_encoder": CLIPTextModel(text), "unet": unet, "vae": vae, "scheduler": scheduler}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)
