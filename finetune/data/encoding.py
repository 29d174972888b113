"""What the denoiser trains on, computed once: latents of the pictures, conditions of the captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.data import Example, pixels
from finetune.errors import Fault
from finetune.families import Conditions, Family, denoiser, modules, release, text_encoders

Track = Callable[[Sequence[Example], str], Iterable[Example]]
"""Goes through the pictures and shows how far it is."""


@dataclass(frozen=True)
class Encoded:
    """One picture as the denoiser sees it. Its latents are mean + std * noise, drawn anew each step."""

    example: Example
    mean: Tensor
    """(C, H/f, W/f)"""
    std: Tensor
    """(C, H/f, W/f)"""
    size: Tensor
    """(6,), see `Geometry`"""


@dataclass(frozen=True)
class Encodings:
    """All that a run trains on."""

    subjects: list[Encoded]
    companions: list[Encoded]
    """Class pictures for prior preservation; may be empty."""
    conditions: dict[str, Conditions] | None
    """Each caption's conditions, (1, ...); None while a text encoder is being trained."""


def encode(
    family: Family,
    subjects: Sequence[Example],
    companions: Sequence[Example],
    resolution: int,
    background: str,
    track: Track = lambda examples, _: examples,
) -> Encodings:
    """Encode everything once, then drop what is not needed any more: the VAE, and the text encoders unless they train.

    Raises Fault when a picture's latents are not finite (half-precision VAEs overflow).
    """
    examples = [*subjects, *companions]
    encoded = [_latents(family, example, resolution, background) for example in track(examples, "encode pictures")]
    trained = any(p.requires_grad for encoder in text_encoders(family).values() for p in encoder.parameters())
    conditions = None if trained else prompts(family, [example.caption for example in examples])
    release_frozen(family)
    return Encodings(encoded[: len(subjects)], encoded[len(subjects) :], conditions)


def prompts(family: Family, captions: Iterable[str]) -> dict[str, Conditions]:
    """The conditions of each distinct caption, (1, ...), on the CPU. One at a time: equal whatever stands beside it."""
    with torch.no_grad():
        return {
            caption: {name: value.cpu() for name, value in family.encode_prompts([caption]).items()}
            for caption in dict.fromkeys(captions)
        }


def release_frozen(family: Family) -> None:
    """Drop from memory every part of the pipeline that neither trains nor predicts."""
    for name, part in modules(family).items():
        if part is not denoiser(family) and not any(p.requires_grad for p in part.parameters()):
            release(family, name)


def _latents(family: Family, example: Example, resolution: int, background: str) -> Encoded:
    picture, geometry = pixels(example, resolution, background)
    mean, std = (value[0].cpu() for value in family.encode_pictures(picture[None]))
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise Fault(
            f"{example.path}: its latents are not finite: the VAE overflows in this precision. "
            "Use a VAE made for half precision, or --precision fp32."
        )
    return Encoded(example, mean, std, geometry.tensor())
