"""Stable Diffusion 1.x and 2.x: one CLIP text encoder; a UNet that predicts the noise or the velocity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel

from finetune.families import base, checkpoint
from finetune.families.base import Conditions, Edition, Published
from finetune.families.checkpoint import Part
from finetune.objective import Objective

FIRST: dict[str, Any] = {
    "unet": {"cross_attention_dim": 768},
    "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
}
SECOND: dict[str, Any] = {
    "unet": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "text_encoder": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                     "num_hidden_layers": 23},
}  # fmt: skip
EDITIONS = (
    Edition("Stable Diffusion 1.x", "sd_v1", "stable-diffusion-v1", "diffusers", 768, 512, clip_skip=1, parts=FIRST,
            site="SD 1.5", webui="SD1"),
    Edition("Stable Diffusion 2.x", "sd_v2", "stable-diffusion-v2-512", "diffusers",
            1024, 512, "epsilon", True, 1, parts=SECOND, site="SD 2.1", webui="SD2"),
    Edition("Stable Diffusion 2.x that predicts the velocity", "sd_v2_v", "stable-diffusion-v2-768-v", "diffusers",
            1024, 768, "v", True, 1, parts=SECOND, site="SD 2.1 768", webui="SD2"),
)  # fmt: skip


@dataclass
class StableDiffusion:
    """Rombach et al. 2021, 2112.10752."""

    pipeline: StableDiffusionPipeline
    clip_skip: int = 1
    chunks: int = 1

    own_layer: ClassVar[int] = 1
    title: ClassVar[str] = "Stable Diffusion"
    denoiser_name: ClassVar[str] = "unet"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    attends_to: ClassVar[str | None] = "text"
    adapter_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    text_adapter_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")
    trained_text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    optional_parts: ClassVar[tuple[str, ...]] = ()
    embedding_names: ClassVar[tuple[str, ...]] = ("",)
    published: ClassVar[Published] = Published(
        text=("lora_te",),
        original=None,
        widths=(768, 1024),
        versions=("sd_v", "sd_1", "sd_2"),
        architectures=("stable-diffusion-v1", "stable-diffusion-v2"),
        editions=EDITIONS,
        classes={"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel},
    )

    from_picture: ClassVar[type[DiffusionPipeline] | None] = StableDiffusionImg2ImgPipeline
    inpaint: ClassVar[type[DiffusionPipeline] | None] = StableDiffusionInpaintPipeline

    def edition(self) -> Edition:
        """Version 2 attends to a wider text; a version 1 may predict the velocity too."""
        first, second, velocity = EDITIONS
        wide = self.pipeline.unet.config.cross_attention_dim == second.width
        if self.pipeline.scheduler.config.prediction_type == "v_prediction":
            chosen = velocity if wide else replace(first, prediction="v")
        else:
            chosen = second if wide else first
        return replace(chosen, resolution=self.resolution())

    def original_parts(self) -> dict[str, Part]:
        """SD 2's text encoder is OpenCLIP's, which has the exact gelu; SD 1's is OpenAI's, which has the quick one."""
        if self.pipeline.text_encoder.config.hidden_act == "gelu":
            text = Part("cond_stage_model.model.", checkpoint.open_clip)
        else:
            text = Part("cond_stage_model.transformer.", checkpoint.clip)
        return {
            "unet": Part(checkpoint.UNET, checkpoint.unet),
            "vae": Part(checkpoint.VAE, checkpoint.vae),
            "text_encoder": text,
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
        """text: (B, 77, D), the last hidden state after the final layer norm."""
        return self.encode_tokens([base.tokens(self.pipeline, self.pipeline.tokenizer, prompts)])

    def words(self, prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
        return base.guided(prompts, negative, guidance)

    def encode_tokens(self, tokens: Sequence[Tensor]) -> Conditions:
        """Another layer's hidden state goes through the final layer norm too."""
        encoder = self.pipeline.text_encoder
        told = encoder(tokens[0].to(encoder.device), output_hidden_states=self.clip_skip > 1)
        if self.clip_skip == 1:
            return {"text": told[0]}
        return {"text": getattr(encoder, "text_model", encoder).final_layer_norm(told.hidden_states[-self.clip_skip])}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"text": (77, self.pipeline.unet.config.cross_attention_dim)}

    def predict(self, noised: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        unet = self.pipeline.unet
        given, own = base.with_beside(noised, conditions), base.precision(unet)
        return unet(given.to(own), timesteps, encoder_hidden_states=conditions["text"].to(own)).sample
