"""What a denoiser is given and attends to while a picture is drawn, which is the same picture as without watching."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from finetune import families
from finetune.families import Family

CROSS = "attn2"
"""What diffusers calls the layers that attend to the text."""


@dataclass
class Seen:
    """Of the steps that were watched, by number from 0."""

    given: dict[int, Tensor] = field(default_factory=dict)
    """What the denoiser was given: (1, C, h, w), the noise scaled away as the scheduler does it"""
    attention: dict[int, Tensor] = field(default_factory=dict)
    """Shares of attention of each place of the text, mean of all heads and layers: (tokens, h, w)"""


@contextmanager
def watched(family: Family, steps: Collection[int]) -> Iterator[Seen]:
    """Inside, one picture is drawn. As in DAAM (Tang et al. 2022, 2210.04885), all layers count alike."""
    seen, now, layers = Seen(), -1, 0
    denoiser: Any = families.denoiser(family)

    def begin(module: nn.Module, values: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal now, layers
        now, layers = now + 1, 0
        sample = values[0] if values else named["sample"]
        if now in steps:
            seen.given[now] = sample[-1:, : family.pipeline.vae.config.latent_channels].detach().clone()

    def attend(module: Any, values: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal layers
        if now not in steps:
            return
        hidden = values[0] if values else named["hidden_states"]
        shares = _shares(module, hidden[-1:], named["encoder_hidden_states"][-1:])
        height, width = seen.given[now].shape[-2:]
        rows = round((shares.shape[0] * height / width) ** 0.5)
        map_ = shares.T.reshape(1, -1, rows, shares.shape[0] // rows)
        wide = functional.interpolate(map_, (height, width), mode="bilinear")[0]
        layers += 1
        before = seen.attention.get(now, torch.zeros_like(wide))
        seen.attention[now] = before + (wide - before) / layers

    cross = [m for name, m in denoiser.named_modules() if isinstance(m, Attention) and name.endswith(CROSS)]
    hooks = [denoiser.register_forward_pre_hook(begin, with_kwargs=True)]
    hooks += [module.register_forward_pre_hook(attend, with_kwargs=True) for module in cross]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _shares(attention: Any, hidden: Tensor, text: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)), mean of the heads: (places of the picture, tokens), each row adding up to 1."""
    query, key = attention.to_q(hidden), attention.to_k(text)
    query, key = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2).float() for x in (query, key))
    return (query @ key.transpose(-1, -2) * attention.scale).softmax(-1).mean(1)[0]
