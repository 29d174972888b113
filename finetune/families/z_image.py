"""Z-Image: Qwen3 as the text encoder; a transformer over text and latents in one row predicts a flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    DiffusionPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor
from torch.nn.functional import pad

from finetune.families import base
from finetune.families.base import Conditions, Edition, Published
from finetune.families.checkpoint import Part
from finetune.objective import Objective

LENGTH = 512
"""The most tokens that Qwen3 takes, as diffusers draws."""
EDITION = Edition(
    "Z-Image", "zimage", "z-image", "https://github.com/Tongyi-MAI/Z-Image", 2560, 1024, None,
    tag="z-image", site="ZImageBase",
)  # fmt: skip


@dataclass
class ZImage:
    """Cai et al. 2025, 2511.22699."""

    pipeline: ZImagePipeline

    title: ClassVar[str] = "Z-Image"
    denoiser_name: ClassVar[str] = "transformer"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    attends_to: ClassVar[str | None] = None
    adapter_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    text_adapter_targets: ClassVar[tuple[str, ...]] = ()
    trained_text_encoders: ClassVar[tuple[str, ...]] = ()
    optional_parts: ClassVar[tuple[str, ...]] = ()
    embedding_names: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[Published] = Published(
        text=("lora_te1",),
        original=None,
        widths=(EDITION.width,),
        versions=("zimage",),
        architectures=("z-image",),
        editions=(EDITION,),
        classes={"transformer": ZImageTransformer2DModel},
        translated=False,
        single_file=False,
        clients=("diffusers",),
    )

    from_picture: ClassVar[type[DiffusionPipeline] | None] = ZImageImg2ImgPipeline
    inpaint: ClassVar[type[DiffusionPipeline] | None] = ZImageInpaintPipeline

    def edition(self) -> Edition:
        return EDITION

    def original_parts(self) -> dict[str, Part]:
        return {}

    def objective(self) -> Objective:
        return base.flow(self.pipeline)

    def resolution(self) -> int:
        return EDITION.resolution

    def multiple(self) -> int:
        return self.grain()

    def grain(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def latents(self) -> tuple[int, int]:
        return self.pipeline.transformer.config.in_channels, self.pipeline.vae_scale_factor

    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return base.encode_with_vae(self.pipeline.vae, pictures)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """text: (B, 512, D), the last but one hidden states, filled up with zeros; told: (B, 512), 1 where text is."""
        said, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=LENGTH,
        )
        text = torch.stack([pad(one, (0, 0, 0, LENGTH - len(one))) for one in said])
        told = torch.stack([pad(torch.ones(len(one)), (0, LENGTH - len(one))) for one in said])
        return {"text": text, "told": told.to(text.device)}

    def words(self, prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
        return base.guided(prompts, negative, guidance)

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"text": (LENGTH, self.pipeline.transformer.config.cap_feat_dim), "told": (LENGTH,)}

    def predict(self, noised: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        """The transformer is told how much of the picture is there, and predicts the way towards it."""
        transformer = self.pipeline.transformer
        own = base.precision(transformer)
        pairs = zip(conditions["text"].to(own), conditions["told"], strict=True)
        predicted = transformer(
            list(noised.to(own)[:, :, None]),
            1 - timesteps / 1000,
            [text[told > 0.5] for text, told in pairs],
        ).sample
        return -torch.stack(list(predicted))[:, :, 0]
