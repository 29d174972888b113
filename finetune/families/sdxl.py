"""Stable Diffusion XL: two text encoders, a pooled embedding, and the picture's size and crop as conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from finetune.families import base, checkpoint
from finetune.families.base import Conditions, Edition, Published
from finetune.families.checkpoint import Part
from finetune.families.original import Layout
from finetune.objective import Objective

PARTS: dict[str, Any] = {
    "unet": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "text_encoder_2": {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
                       "num_hidden_layers": 32, "projection_dim": 1280},
}  # fmt: skip
EDITION = Edition(
    "Stable Diffusion XL", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base",
    "https://github.com/Stability-AI/generative-models", 2048, 1024, parts=PARTS,
    tag="stable-diffusion-xl", site="SDXL 1.0", webui="SDXL",
)  # fmt: skip


@dataclass
class StableDiffusionXL:
    """Podell et al. 2023, 2307.01952."""

    pipeline: StableDiffusionXLPipeline
    clip_skip: int = 2
    chunks: int = 1

    own_layer: ClassVar[int] = 2
    title: ClassVar[str] = "Stable Diffusion XL"
    denoiser_name: ClassVar[str] = "unet"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    attends_to: ClassVar[str | None] = "text"
    adapter_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    text_adapter_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")
    trained_text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    optional_parts: ClassVar[tuple[str, ...]] = ()
    embedding_names: ClassVar[tuple[str, ...]] = ("clip_l", "clip_g")
    published: ClassVar[Published] = Published(
        text=("lora_te1", "lora_te2"),
        original=Layout(attends=frozenset({0, 1})),
        widths=(2048,),
        versions=("sdxl_",),
        architectures=("stable-diffusion-xl",),
        editions=(EDITION,),
        classes={
            "unet": UNet2DConditionModel,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
        },
    )

    from_picture: ClassVar[type[DiffusionPipeline] | None] = StableDiffusionXLImg2ImgPipeline
    inpaint: ClassVar[type[DiffusionPipeline] | None] = StableDiffusionXLInpaintPipeline

    def edition(self) -> Edition:
        velocity = self.pipeline.scheduler.config.prediction_type == "v_prediction"
        return replace(EDITION, prediction="v" if velocity else "epsilon", resolution=self.resolution())

    def original_parts(self) -> dict[str, Part]:
        return {
            "unet": Part(checkpoint.UNET, checkpoint.unet),
            "vae": Part(checkpoint.VAE, checkpoint.vae),
            "text_encoder": Part("conditioner.embedders.0.transformer.", checkpoint.clip),
            "text_encoder_2": Part("conditioner.embedders.1.model.", checkpoint.open_clip),
        }

    def objective(self) -> Objective:
        return base.diffusion(self.pipeline)

    def resolution(self) -> int:
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    def multiple(self) -> int:
        return base.unet_multiple(self.pipeline)

    def grain(self) -> int:
        return int(self.pipeline.vae_scale_factor)

    def latents(self) -> tuple[int, int]:
        return 4, int(self.pipeline.vae_scale_factor)

    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return base.encode_with_vae(self.pipeline.vae, pictures)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """text: (B, 77, D1 + D2), both encoders' last but one hidden states; pooled: (B, D2), of the second."""
        tokenizers = self.pipeline.tokenizer, self.pipeline.tokenizer_2
        told = self.encode_tokens([base.tokens(self.pipeline, tokenizer, prompts) for tokenizer in tokenizers])
        return base.zeroed(self.pipeline, prompts, told)

    def words(self, prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
        return base.guided(prompts, negative, guidance)

    def encode_tokens(self, tokens: Sequence[Tensor]) -> Conditions:
        encoders = self.pipeline.text_encoder, self.pipeline.text_encoder_2
        said = [
            encoder(ids.to(encoder.device), output_hidden_states=True)
            for encoder, ids in zip(encoders, tokens, strict=True)
        ]
        return {"text": torch.cat([one.hidden_states[-self.clip_skip] for one in said], dim=-1), "pooled": said[-1][0]}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        unet = self.pipeline.unet.config
        pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        return {"text": (77, unet.cross_attention_dim), "pooled": (pooled,)}

    def predict(self, noised: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        """sizes are SDXL's own `time_ids`: (original h, w, crop top, left, target h, w)."""
        unet = self.pipeline.unet
        given, own = base.with_beside(noised, conditions), base.precision(unet)
        added = {"text_embeds": conditions["pooled"].to(own), "time_ids": sizes.to(own)}
        text = conditions["text"].to(own)
        return unet(given.to(own), timesteps, encoder_hidden_states=text, added_cond_kwargs=added).sample
