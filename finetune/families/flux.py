"""FLUX.1: T5 and a pooled CLIP; a transformer over packed latents predicts a flow, guided by a number it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor
from transformers import CLIPTextModel

from finetune.errors import Fault
from finetune.families import base
from finetune.families.base import Conditions, Edition, Published
from finetune.families.checkpoint import Part
from finetune.families.original import Joined
from finetune.objective import Objective

LENGTH = 512
"""Tokens that T5 takes, as diffusers draws."""
GUIDANCE = 1.0
"""What the distilled model is told while it trains, so that its guidance stays what it is: kohya's and diffusers'
training scripts (sd-scripts, docs/flux_train_network.md; diffusers, examples/dreambooth/README_flux.md)."""
LAYERS = Joined(
    {
        **{
            f"double_blocks.{{}}.{theirs}": tuple(f"transformer_blocks.{{}}.{ours}" for ours in own)
            for theirs, own in {
                "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "img_attn.proj": ("attn.to_out.0",),
                "img_mlp.0": ("ff.net.0.proj",),
                "img_mlp.2": ("ff.net.2",),
                "img_mod.lin": ("norm1.linear",),
                "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "txt_attn.proj": ("attn.to_add_out",),
                "txt_mlp.0": ("ff_context.net.0.proj",),
                "txt_mlp.2": ("ff_context.net.2",),
                "txt_mod.lin": ("norm1_context.linear",),
            }.items()
        },
        **{
            f"single_blocks.{{}}.{theirs}": tuple(f"single_transformer_blocks.{{}}.{ours}" for ours in own)
            for theirs, own in {
                "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                "linear2": ("proj_out",),
                "modulation.lin": ("norm.linear",),
            }.items()
        },
    },
    {"single_blocks.{}.linear1": (1, 1, 1, 4)},
)
"""Of Black Forest Labs' flux, as sd-scripts' networks/lora_flux.py, ComfyUI and diffusers have them."""
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}


def _edition(name: str, guided: bool, site: str) -> Edition:
    return Edition(
        f"FLUX.1 {name}", "flux1", f"flux-1-{name}", "https://github.com/black-forest-labs/flux", 4096, 1024, None,
        parts={"transformer": {"guidance_embeds": guided}, "text_encoder": CLIP}, tag="flux", site=site,
    )  # fmt: skip


DEV, SCHNELL = _edition("dev", True, "Flux.1 D"), _edition("schnell", False, "Flux.1 S")


@dataclass
class Flux:
    """Black Forest Labs 2024, https://github.com/black-forest-labs/flux."""

    pipeline: FluxPipeline

    title: ClassVar[str] = "FLUX.1"
    denoiser_name: ClassVar[str] = "transformer"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    attends_to: ClassVar[str | None] = None
    adapter_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )
    text_adapter_targets: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")
    trained_text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    optional_parts: ClassVar[tuple[str, ...]] = ()
    embedding_names: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[Published] = Published(
        text=("lora_te1", "lora_te3"),
        original=None,
        widths=(4096,),
        versions=("flux1",),
        architectures=("flux-1",),
        editions=(DEV, SCHNELL),
        classes={"transformer": FluxTransformer2DModel, "text_encoder": CLIPTextModel},
        joined=LAYERS,
        single_file=False,
        clients=("diffusers", "sd-scripts", "ComfyUI"),
    )

    from_picture: ClassVar[type[DiffusionPipeline] | None] = FluxImg2ImgPipeline
    inpaint: ClassVar[type[DiffusionPipeline] | None] = FluxInpaintPipeline

    def edition(self) -> Edition:
        return DEV if self.pipeline.transformer.config.guidance_embeds else SCHNELL

    def original_parts(self) -> dict[str, Part]:
        return {}

    def objective(self) -> Objective:
        return base.flow(self.pipeline)

    def resolution(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def multiple(self) -> int:
        return self.grain()

    def grain(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def latents(self) -> tuple[int, int]:
        return self.pipeline.transformer.config.in_channels // 4, self.pipeline.vae_scale_factor

    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return base.encode_with_vae(self.pipeline.vae, pictures)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """text: (B, 512, D), T5's; pooled: (B, D2), CLIP's."""
        text, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), list(prompts), device=self.pipeline.text_encoder.device, max_sequence_length=LENGTH
        )
        return {"text": text, "pooled": pooled}

    def words(self, prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
        if negative:
            raise Fault(f"--negative {negative!r}: FLUX.1 is told how strictly to follow a prompt, and knows no other.")
        return {"prompt": list(prompts), "guidance_scale": guidance}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.pipeline.transformer.config
        return {"text": (LENGTH, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def predict(self, noised: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        """Squares of 2 x 2 latent pixels are one token; the text's tokens are all in one place."""
        pipeline, transformer = self.pipeline, self.pipeline.transformer
        count, channels, height, width = noised.shape
        own, device = base.precision(transformer), noised.device
        text = conditions["text"].to(own)
        told = transformer.config.guidance_embeds
        predicted = transformer(
            hidden_states=pipeline._pack_latents(noised.to(own), count, channels, height, width),
            timestep=timesteps / 1000,
            guidance=torch.full((count,), GUIDANCE, device=device) if told else None,
            pooled_projections=conditions["pooled"].to(own),
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            img_ids=pipeline._prepare_latent_image_ids(count, height // 2, width // 2, device, torch.float32),
        ).sample
        factor = pipeline.vae_scale_factor
        return pipeline._unpack_latents(predicted, height * factor, width * factor, factor)
