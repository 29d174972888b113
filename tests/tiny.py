"""Tiny random pipelines of every family: real classes, real topologies and key names, widths of a few channels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

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


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer of single letters."""
    letters = [chr(code) for code in range(33, 127)]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -1.0), *((letter, -2.0) for letter in letters)]
    return T5TokenizerFast(vocab=words, extra_ids=0)


def t5(width: int) -> T5EncoderModel:
    """Version 1.1, as its XXL is."""
    config = T5Config(
        vocab_size=128, d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level, without any merges, with a template for what a user says."""
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    made.add_special_tokens({"additional_special_tokens": words[-2:]})
    made.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


def qwen(width: int, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=259, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=258, pad_token_id=256,
    )  # fmt: skip


def vae(channels: int = 4, **more: Any) -> AutoencoderKL:
    """Four levels as in Stable Diffusion: f = 8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=channels,
        sample_size=SIDE,
        **more,
    )


def vae_16() -> AutoencoderKL:
    """As of SD 3 and FLUX.1: 16 channels, shifted, without the layers around the latents."""
    return vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)


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


def _sd3() -> StableDiffusion3Pipeline:
    """As 3.5 Medium: queries and keys normalised, a second attention in the first layers."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIDE // 8, num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=48,
            caption_projection_dim=16, pooled_projection_dim=16 + 24, pos_embed_max_size=16,
            qk_norm="rms_norm", dual_attention_layers=(0,),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae_16(),
        text_encoder=CLIPTextModelWithProjection(text_config(16)),
        tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(24, projection=24)),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(48),
        tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def _flux() -> FluxPipeline:
    """As dev: told its guidance."""
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=24,
            pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae_16(),
        text_encoder=CLIPTextModel(text_config(16)),
        tokenizer=tokenizer(),
        text_encoder_2=t5(24),
        tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def _klein() -> Flux2KleinPipeline:
    """Its text is of Qwen3's layers 9, 18 and 27."""
    channels, levels = (4, 4, 8, 8), 4
    autoencoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels, norm_num_groups=2, layers_per_block=1, latent_channels=4, sample_size=SIDE,
    )  # fmt: skip
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=24, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=Qwen3ForCausalLM(qwen(8, 28)),
        tokenizer=qwen_tokenizer(),
    )  # fmt: skip


def _zimage() -> ZImagePipeline:
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 4, 4],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae_16(),
        text_encoder=Qwen3Model(qwen(16, 2)),
        tokenizer=qwen_tokenizer(),
    )  # fmt: skip


KINDS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": lambda: _sd("epsilon"),
    "sd-v": lambda: _sd("v_prediction"),
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "klein": _klein,
    "zimage": _zimage,
}


def _inpainting(kind: str, made: Any, unet: UNet2DConditionModel) -> DiffusionPipeline:
    """An inpainting checkpoint: nine channels, of noise, mask and masked picture."""
    return made(**{**KINDS[kind]().components, "unet": unet})


INPAINTING: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd-inpainting": lambda: _inpainting("sd", StableDiffusionInpaintPipeline, unet_sd(16, 9)),
    "sdxl-inpainting": lambda: _inpainting("sdxl", StableDiffusionXLInpaintPipeline, unet_sdxl(16 + 24, 24, 9)),
}
"""Checkpoints that are told a mask and the masked picture"""


def _editing(kind: str, made: Any, unet: UNet2DConditionModel) -> DiffusionPipeline:
    """An instruct-pix2pix checkpoint: eight channels, of noise and of the picture to change."""
    parts = {**KINDS[kind]().components, "unet": unet}
    return made(**{name: part for name, part in parts.items() if name in inspect.signature(made.__init__).parameters})


EDITING: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd-pix2pix": lambda: _editing("sd", StableDiffusionInstructPix2PixPipeline, unet_sd(16, 8)),
    "sdxl-pix2pix": lambda: _editing("sdxl", StableDiffusionXLInstructPix2PixPipeline, unet_sdxl(16 + 24, 24, 8)),
}
"""Checkpoints that are told a picture to change"""


def pipeline(kind: str) -> DiffusionPipeline:
    """The same random weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {**KINDS, **INPAINTING, **EDITING}[kind]()
    made.set_progress_bar_config(disable=True)
    return made


def save(kind: str, folder: Path) -> Path:
    """A diffusers folder of the tiny pipeline."""
    pipeline(kind).save_pretrained(folder)
    return folder
