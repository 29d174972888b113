"""Elementwise layers that keep what they were given and no more: the rest is computed again in the backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models import activations, resnet
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

aten = torch.ops.aten


class _Gated(Function):
    """y = a gelu(b) of [a, b] = h, (..., 2 d) -> (..., d) (Shazeer 2020, 2002.05202, eq. 5). Keeps h, not gelu(b)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        a, b = _parted(h)
        return a * functional.gelu(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        a, b = _parted(h)
        return torch.cat([g * functional.gelu(b), aten.gelu_backward(g * a, b)], dim=-1)


def _parted(h: Tensor) -> tuple[Tensor, Tensor]:
    """a and b. A CPU takes twice as long for the gelu of what lies in parts as for that of a copy."""
    a, b = h.chunk(2, dim=-1)
    return a, b.contiguous() if h.device.type == "cpu" else b


class _NormSiLU(Function):
    """y = z sigmoid(z) of z = group norm of x (Wu & He 2018, 1803.08494), each (B, C, h, w). Keeps x, not z."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        ctx.how = groups, eps
        ctx.save_for_backward(x, weight, bias)
        return functional.silu(_normed(x, weight, bias, groups, eps)[0], inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        z, mean, rstd = _normed(x, weight, bias, *ctx.how)
        of = aten.silu_backward(g.contiguous(), z), x.contiguous(), mean, rstd, weight
        return *aten.native_group_norm_backward(*of, *_sizes(x), ctx.how[0], ctx.needs_input_grad[:3]), None, None


def _normed(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """With the mean and 1 / std of each group, (B, groups)"""
    made: tuple[Tensor, Tensor, Tensor] = torch.native_group_norm(x.contiguous(), weight, bias, *_sizes(x), groups, eps)
    return made


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """B, C, h w"""
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    made: Tensor = _NormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return made


class Normed(NamedTuple):
    """How a layer norm's output is computed again (Ba et al. 2016, 1607.06450). Its input is kept in any case."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    shape: tuple[int, ...]
    eps: float

    def again(self) -> Tensor:
        return functional.layer_norm(self.x, self.shape, self.weight, self.bias, self.eps)


class LayerNorm(nn.LayerNorm):
    """PyTorch's layer norm, whose output tells as its `normed` what it was made of: LoRA's layers keep that instead."""

    @staticmethod
    def fits(norm: nn.LayerNorm) -> bool:
        return True

    def forward(self, input: Tensor) -> Tensor:
        y: Any = super().forward(input)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and y.dtype == input.dtype:
            y.normed = Normed(input.detach(), self.weight, self.bias, self.normalized_shape, self.eps)
        return y


class GEGLU(activations.GEGLU):
    """diffusers' gated layer, of Stable Diffusion's feed-forward layers."""

    @staticmethod
    def fits(layer: activations.GEGLU) -> bool:
        return True

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
        made: Tensor = _Gated.apply(self.proj(hidden_states))
        return made


class ResnetBlock2D(resnet.ResnetBlock2D):
    """diffusers' block, of the kind of Stable Diffusion's UNets: the timestep is added, no side changes."""

    @staticmethod
    def fits(block: resnet.ResnetBlock2D) -> bool:
        plain = block.time_embedding_norm == "default" and not block.skip_time_act and not block.up and not block.down
        norms = block.norm1, block.norm2
        known = isinstance(block.nonlinearity, nn.SiLU) and all(type(norm) is nn.GroupNorm for norm in norms)
        return plain and known and block.time_emb_proj is not None

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **named: Any) -> Tensor:
        x, norm = input_tensor, self.norm1
        if x.dtype != norm.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return super().forward(input_tensor, temb, *args, **named)
        h = self.conv1(norm_silu(norm, x)) + self.time_emb_proj(functional.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(norm_silu(self.norm2, h)))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x.contiguous())
        return x + h if self.output_scale_factor == 1 else (x + h) / self.output_scale_factor
