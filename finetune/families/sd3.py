"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, which may be absent; a transformer predicts a flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from diffusers import (
    DiffusionPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from finetune.families import base
from finetune.families.base import Conditions, Edition, Published
from finetune.families.checkpoint import Part
from finetune.families.original import Joined
from finetune.objective import Objective

LENGTH = 256
"""Tokens that T5 takes: what diffusers and ComfyUI draw with, and the longest that the model was made for."""
LAYERS = Joined(
    {
        f"joint_blocks.{{}}.{theirs}": tuple(f"transformer_blocks.{{}}.{ours}" for ours in own)
        for theirs, own in {
            "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "x_block.attn.proj": ("attn.to_out.0",),
            "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "x_block.attn2.proj": ("attn2.to_out.0",),
            "x_block.mlp.fc1": ("ff.net.0.proj",),
            "x_block.mlp.fc2": ("ff.net.2",),
            "x_block.adaLN_modulation.1": ("norm1.linear",),
            "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "context_block.attn.proj": ("attn.to_add_out",),
            "context_block.mlp.fc1": ("ff_context.net.0.proj",),
            "context_block.mlp.fc2": ("ff_context.net.2",),
            "context_block.adaLN_modulation.1": ("norm1_context.linear",),
        }.items()
    }
)
"""Of Stability AI's sd3.5, as sd-scripts' networks/lora_sd3.py and ComfyUI have them."""
CLIP: dict[str, Any] = {
    "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    "text_encoder_2": {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
                       "num_hidden_layers": 32, "projection_dim": 1280},
}  # fmt: skip


def _edition(title: str, version: str, layers: int, site: str, **more: Any) -> Edition:
    """Of so many layers, which is also its number of heads."""
    config = {"num_layers": layers, "num_attention_heads": layers, "caption_projection_dim": 64 * layers, **more}
    return Edition(
        title, f"sd{version}", f"stable-diffusion-{version}", "diffusers", 4096, 1024, None,
        parts={"transformer": config, **CLIP}, tag="stable-diffusion-3", site=site,
    )  # fmt: skip


MEDIUM_3 = _edition("Stable Diffusion 3 Medium", "3-m", 24, "SD 3", pos_embed_max_size=192)
MEDIUM = _edition("Stable Diffusion 3.5 Medium", "3-5-medium", 24, "SD 3.5 Medium", pos_embed_max_size=384,
                  qk_norm="rms_norm", dual_attention_layers=tuple(range(13)))  # fmt: skip
LARGE = _edition("Stable Diffusion 3.5 Large", "3-5-large", 38, "SD 3.5 Large", pos_embed_max_size=192,
                 qk_norm="rms_norm")  # fmt: skip


@dataclass
class StableDiffusion3:
    """Esser et al. 2024, 2403.03206."""

    pipeline: StableDiffusion3Pipeline

    title: ClassVar[str] = "Stable Diffusion 3"
    denoiser_name: ClassVar[str] = "transformer"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    attends_to: ClassVar[str | None] = None
    adapter_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )
    text_adapter_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")
    trained_text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    optional_parts: ClassVar[tuple[str, ...]] = ("text_encoder_3", "tokenizer_3")
    embedding_names: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[Published] = Published(
        text=("lora_te1", "lora_te2", "lora_te3"),
        original=None,
        widths=(4096,),
        versions=("sd3",),
        architectures=("stable-diffusion-3",),
        editions=(MEDIUM, LARGE, MEDIUM_3),
        classes={
            "transformer": SD3Transformer2DModel,
            "text_encoder": CLIPTextModelWithProjection,
            "text_encoder_2": CLIPTextModelWithProjection,
        },
        joined=LAYERS,
        translated=False,
        single_file=False,
        clients=("diffusers", "sd-scripts", "ComfyUI"),
    )

    from_picture: ClassVar[type[DiffusionPipeline] | None] = StableDiffusion3Img2ImgPipeline
    inpaint: ClassVar[type[DiffusionPipeline] | None] = StableDiffusion3InpaintPipeline

    def edition(self) -> Edition:
        """3.5 normalises queries and keys, 3 does not; Large has more layers."""
        config = self.pipeline.transformer.config
        chosen = MEDIUM_3 if config.qk_norm is None else LARGE if config.num_layers > 24 else MEDIUM
        return replace(chosen, resolution=self.resolution())

    def original_parts(self) -> dict[str, Part]:
        return {}

    def objective(self) -> Objective:
        return base.flow(self.pipeline)

    def resolution(self) -> int:
        return self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor

    def multiple(self) -> int:
        return self.grain()

    def grain(self) -> int:
        return self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size

    def latents(self) -> tuple[int, int]:
        return self.pipeline.transformer.config.in_channels, self.pipeline.vae_scale_factor

    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return base.encode_with_vae(self.pipeline.vae, pictures)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """text: (B, 77 + 256, D), the CLIPs' last but one hidden states side by side, then T5's, zeros where there is
        none; pooled: (B, D1 + D2), of the CLIPs."""
        given = [list(prompts)] * 3
        text, _, pooled, _ = self.pipeline.encode_prompt(
            *given,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=LENGTH,
        )
        return {"text": text, "pooled": pooled}

    def words(self, prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
        return base.guided(prompts, negative, guidance)

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.pipeline.transformer.config
        return {"text": (77 + LENGTH, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def predict(self, noised: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        transformer = self.pipeline.transformer
        own = base.precision(transformer)
        return transformer(
            hidden_states=noised.to(own),
            timestep=timesteps,
            encoder_hidden_states=conditions["text"].to(own),
            pooled_projections=conditions["pooled"].to(own),
        ).sample
