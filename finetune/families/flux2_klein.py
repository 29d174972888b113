"""FLUX.2 klein: Qwen3 as the text encoder; a transformer over latents of 128 channels predicts a flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor

from finetune.errors import Fault
from finetune.families import base
from finetune.families.base import Conditions, Edition, Published
from finetune.families.checkpoint import Part
from finetune.objective import Objective

LENGTH = 512
"""Tokens that Qwen3 takes, as diffusers draws."""


def _edition(size: str, double: int, single: int, heads: int, width: int) -> Edition:
    config = {"num_layers": double, "num_single_layers": single, "num_attention_heads": heads,
              "joint_attention_dim": width, "guidance_embeds": False}  # fmt: skip
    return Edition(
        f"FLUX.2 klein {size}", f"flux2-klein-{size.lower()}", f"flux-2-klein-{size.lower()}",
        "https://github.com/black-forest-labs/flux2", width, 1024, None,
        parts={"transformer": config}, tag="flux2", site=f"Flux.2 Klein {size}",
    )  # fmt: skip


SMALL, LARGE = _edition("4B", 5, 20, 24, 7680), _edition("9B", 8, 24, 32, 12288)


@dataclass
class Flux2Klein:
    """Black Forest Labs 2026, https://github.com/black-forest-labs/flux2."""

    pipeline: Flux2KleinPipeline

    title: ClassVar[str] = "FLUX.2 klein"
    denoiser_name: ClassVar[str] = "transformer"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    attends_to: ClassVar[str | None] = None
    adapter_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        "to_qkv_mlp_proj",
    )
    text_adapter_targets: ClassVar[tuple[str, ...]] = ()
    trained_text_encoders: ClassVar[tuple[str, ...]] = ()
    optional_parts: ClassVar[tuple[str, ...]] = ()
    embedding_names: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[Published] = Published(
        text=("lora_te1",),
        original=None,
        widths=(SMALL.width, LARGE.width),
        versions=("flux2",),
        architectures=("flux-2-klein",),
        editions=(SMALL, LARGE),
        classes={"transformer": Flux2Transformer2DModel},
        translated=False,
        single_file=False,
        clients=("diffusers",),
    )

    from_picture: ClassVar[type[DiffusionPipeline] | None] = None
    inpaint: ClassVar[type[DiffusionPipeline] | None] = None

    def edition(self) -> Edition:
        wide = self.pipeline.transformer.config.joint_attention_dim > SMALL.width
        return LARGE if wide else SMALL

    def original_parts(self) -> dict[str, Part]:
        return {}

    def objective(self) -> Objective:
        return base.flow(self.pipeline)

    def resolution(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def multiple(self) -> int:
        return self.grain()

    def grain(self) -> int:
        return self.latents()[1]

    def latents(self) -> tuple[int, int]:
        """Squares of 2 x 2 of the VAE's latent pixels are one of the denoiser's."""
        return self.pipeline.transformer.config.in_channels, 2 * self.pipeline.vae_scale_factor

    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Put together in squares, then brought to mean 0 and variance 1 by the VAE's statistics of each channel."""
        vae, pack = self.pipeline.vae, self.pipeline._patchify_latents
        with torch.no_grad():
            posterior = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist
        mean = vae.bn.running_mean[:, None, None].float()
        std = (vae.bn.running_var[:, None, None].float() + vae.config.batch_norm_eps).sqrt()
        return (pack(posterior.mean.float()) - mean) / std, pack(posterior.std.float()) / std

    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """text: (B, 512, 3 D), the hidden states of three layers side by side."""
        text, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.pipeline.text_encoder.device, max_sequence_length=LENGTH
        )
        return {"text": text}

    def words(self, prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
        if negative:
            raise Fault(f"--negative {negative!r}: FLUX.2 klein is guided against the empty prompt, and no other.")
        return {"prompt": list(prompts), "guidance_scale": guidance}

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"text": (LENGTH, self.pipeline.transformer.config.joint_attention_dim)}

    def predict(self, noised: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        pipeline, transformer = self.pipeline, self.pipeline.transformer
        own = base.precision(transformer)
        text = conditions["text"].to(own)
        predicted = transformer(
            hidden_states=pipeline._pack_latents(noised.to(own)),
            timestep=timesteps / 1000,
            encoder_hidden_states=text,
            txt_ids=pipeline._prepare_text_ids(text).to(noised.device),
            img_ids=pipeline._prepare_latent_ids(noised).to(noised.device),
        ).sample
        return predicted.transpose(1, 2).reshape(noised.shape)
