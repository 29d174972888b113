"""Attention on a CPU, whose kernel has two weak spots: heads that fill no whole vectors, 10 or 40 numbers wide, cost
more than such of 16 and 48; and bf16 costs more than float32 where keys are few."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_processor
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from finetune.fast import lora

aten = torch.ops.aten
LANES = 16
"""Numbers that a vector of AVX-512 holds in float32"""
LONG = 512
"""Queries from which on filling pays, which takes time too; keys from which on bf16's own backward pass does"""


class _Filled(Function):
    """softmax(s q k') v in float32, of many queries with zeros beside each head, which change no sum.

    What is kept is without them, in the precision that was given.

    q: (B, n, H d), k, v: (B, m, H d) -> (B, n, H d)
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
        wide = [_parted(x, heads, torch.float32, q.shape[1] >= LONG) for x in (q, k, v)]
        y, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(*wide, scale=scale)
        y = _joined(y, q)
        ctx.how = heads, scale
        ctx.save_for_backward(q, k, v, y, logsumexp)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        *kept, logsumexp = ctx.saved_tensors
        q, k, _, _ = kept
        heads, scale = ctx.how
        own = q.dtype != torch.float32 and k.shape[1] >= LONG
        how = (q.dtype, False) if own else (torch.float32, q.shape[1] >= LONG)
        wide = [_parted(x, heads, *how) for x in (g, *kept)]
        made = aten._scaled_dot_product_flash_attention_for_cpu_backward(*wide, logsumexp, 0.0, False, scale=scale)
        return *(_joined(x, like) for x, like in zip(made, kept, strict=False)), None, None


def _parted(x: Tensor, heads: int, dtype: torch.dtype, fills: bool) -> Tensor:
    """(B, n, H d) -> (B, H, n, d'), d' being whole vectors where it `fills` them"""
    x = x.to(dtype).unflatten(-1, (heads, -1))
    return (functional.pad(x, (0, -x.shape[-1] % LANES)) if fills else x).transpose(1, 2)


def _joined(x: Tensor, like: Tensor) -> Tensor:
    """Back to (B, n, H d)"""
    return x[..., : like.shape[-1] // x.shape[1]].transpose(1, 2).flatten(2).to(like.dtype)


class Attention(attention_processor.Attention):
    """diffusers' attention as Stable Diffusion has it: no mask, no norms, nothing divided by one. Another processor
    stays what it is."""

    @staticmethod
    def fits(layer: attention_processor.Attention) -> bool:
        norms = layer.group_norm, layer.spatial_norm, layer.norm_cross, layer.norm_q, layer.norm_k
        plain = all(norm is None for norm in norms) and not layer.residual_connection and layer.scale_qk
        usual = layer.to_k is not None and layer.inner_dim == layer.inner_kv_dim
        return bool(plain and usual and layer.rescale_output_factor == 1)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        x, about = hidden_states, encoder_hidden_states
        known = type(self.processor) is attention_processor.AttnProcessor2_0 and attention_mask is None and not named
        if not known or x.dim() != 3:
            made: Tensor = super().forward(x, encoder_hidden_states, attention_mask, **named)
            return made
        attend = _Filled.apply if pays(x, self.inner_dim // self.heads) else _attended
        if about is None:
            q, k, v = lora.together((self.to_q, self.to_k, self.to_v), x)
        else:
            q, (k, v) = self.to_q(x), lora.together((self.to_k, self.to_v), about)
        y = attend(q, k, v, self.heads, self.scale)
        made = self.to_out[1](self.to_out[0](y))
        return made


def pays(x: Tensor, width: int) -> bool:
    """Whether attention from these queries, (B, n, d), by heads so wide is faster than PyTorch's own."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    weak = dtype == torch.bfloat16 or (dtype == torch.float32 and x.shape[1] >= LONG)
    return x.device.type == "cpu" and weak and width % LANES > 0


def _attended(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """PyTorch's own: (B, n, H d), (B, m, H d) twice -> (B, n, H d)"""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
