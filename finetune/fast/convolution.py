"""Frozen convolutions that keep nothing of what they were given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

NOT_TRANSPOSED = False, [0, 0]


class _Frozen(Function):
    """y = W * x + b, W and b being frozen. dL/dx = W' * dL/dy needs no x, which PyTorch would keep all the same.

    x: (B, C, h, w), W: (D, C / groups, k, l)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.shape, ctx.how = x.shape, how
        ctx.save_for_backward(weight)
        return functional.conv2d(x, weight, bias, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        how = stride, padding, dilation, *NOT_TRANSPOSED, groups, [True, False, False]
        dx, _, _ = torch.ops.aten.convolution_backward(g, g.new_empty(ctx.shape), weight, None, *how)
        return dx, *[None] * 6


class Conv2d(nn.Conv2d):
    """PyTorch's convolution while it is frozen and what it is given is not."""

    @staticmethod
    def fits(layer: nn.Conv2d) -> bool:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)

    def forward(self, input: Tensor) -> Tensor:
        frozen = not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)
        if not frozen or not input.requires_grad or torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        how = self.stride, self.padding, self.dilation, self.groups
        made: Tensor = _Frozen.apply(input, self.weight, self.bias, *how)
        return made
