"""Tiny random pipelines of every family: real classes, real topologies and key names, widths of a few channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIDE = 64
"""Side in pixels that the tiny models are made for: latents of 8 x 8, as the VAE divides by 8."""


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokenizer without any merges: a token a letter, 77 positions."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def text_config(width: int, projection: int | None = None) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        projection_dim=projection or width,
    )


def vae() -> AutoencoderKL:
    """Four levels as in Stable Diffusion: f = 8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        sample_size=SIDE,
    )


def unet_sd(text_width: int, channels: int = 4) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's four levels, two layers a block."""
    return UNet2DConditionModel(
        in_channels=channels,
        sample_size=SIDE // 8,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=text_width,
    )


def unet_sdxl(text_width: int, pooled: int, channels: int = 4) -> UNet2DConditionModel:
    """SDXL's three levels, linear projections, size and pooled-text embedding."""
    return UNet2DConditionModel(
        in_channels=channels,
        sample_size=SIDE // 8,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        norm_num_groups=4,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        cross_attention_dim=text_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=pooled + 6 * 4,
    )


def _sd(prediction: str) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(16)),
        tokenizer=tokenizer(),
        unet=unet_sd(16),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(16)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(24, projection=24)),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet_sdxl(16 + 24, 24),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )


KINDS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": lambda: _sd("epsilon"),
    "sd-v": lambda: _sd("v_prediction"),
    "sdxl": _sdxl,
}


def _inpainting(kind: str, made: Any, unet: UNet2DConditionModel) -> DiffusionPipeline:
    """An inpainting checkpoint: nine channels, of noise, mask and masked picture."""
    return made(**{**KINDS[kind]().components, "unet": unet})


INPAINTING: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd-inpainting": lambda: _inpainting("sd", StableDiffusionInpaintPipeline, unet_sd(16, 9)),
    "sdxl-inpainting": lambda: _inpainting("sdxl", StableDiffusionXLInpaintPipeline, unet_sdxl(16 + 24, 24, 9)),
}
"""Checkpoints that only draw"""


def pipeline(kind: str) -> DiffusionPipeline:
    """The same random weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {**KINDS, **INPAINTING}[kind]()
    made.set_progress_bar_config(disable=True)
    return made


def save(kind: str, folder: Path) -> Path:
    """A diffusers folder of the tiny pipeline."""
    pipeline(kind).save_pretrained(folder)
    return folder
