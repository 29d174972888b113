"""Tokens in rows. diffusers hands a transformer block its picture as a view, channel by channel, of which each layer
norm makes a copy of its own, and in the backward pass each sum and matrix product."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _Rows(Function):
    """x, (B, n, C), one token behind the other, both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x) if x.is_contiguous() else x.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.contiguous()


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """diffusers' block, of Stable Diffusion's transformers."""

    @staticmethod
    def fits(block: attention.BasicTransformerBlock) -> bool:
        return True

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
        made: Tensor = super().forward(_Rows.apply(hidden_states), *args, **named)
        return _Rows.apply(made) if torch.is_grad_enabled() else made
