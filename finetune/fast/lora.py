"""LoRA's forward and backward pass with the fewest passes over memory; PEFT keeps the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from finetune.fast.recompute import Normed
from finetune.offload import Resting

HELD = Tensor, FakeTensor
"""What a plain weight is: the second in a plan, where nothing has data"""
Thin = tuple[float, float]
"""s and p of one adapter: what it is scaled by, and the share of its inputs that is dropped"""


class _LowRank(Function):
    """y = W x + b + sum of s B A d(x) over the adapters, W and b being frozen (Hu et al. 2021, 2106.09685, eq. 3).

    d drops inputs; x: (..., in), W: (out, in), A: (r, in), B: (out, r), y: (..., out). With g = dL/dy

        dL/dB = s g' (A d(x))        dL/dA = s (g B)' d(x)        dL/dx = g W + d'(s g B A)

    where both sums over thin products are taken by the matrix products themselves, in place. What is kept is x, which
    queries, keys and values share, or what it was `normed` of, and which inputs were dropped; A d(x) is computed again.
    A and B are computed with in x's precision and have their gradients in their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        thin: tuple[Thin, ...],
        normed: Normed | None,
        own: tuple[Tensor, ...],
        *halves: Tensor,
    ) -> Tensor:
        """`own`: A and B of each adapter in x's precision; `halves`: as they train. Without W, `bias` is W x + b"""
        rows, y = x.reshape(-1, x.shape[-1]), _base(ctx, x, weight, bias)
        masks = []
        for (scale, share), down, up in zip(thin, own[::2], own[1::2], strict=True):
            given = rows
            if share:
                given, mask = torch.native_dropout(rows, share, True)
                masks.append(mask)
            y.view(-1, y.shape[-1]).addmm_(given @ down.t(), up.t(), alpha=scale)
        ctx.thin, ctx.normed = thin, normed and normed[3:]
        ctx.save_for_backward(*(normed[:3] if normed else (x, None, None)), weight, *own, *masks)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors  # asked for once: where they are computed again, that is done then
        norm, weight, saved = rest[:2], rest[2], rest[3:]
        x = Normed(x, *norm, *ctx.normed).again() if ctx.normed else x
        count = 2 * len(ctx.thin)
        halves, masks = saved[:count], iter(saved[count:])
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        wanted = ctx.needs_input_grad
        dx = g @ weight if wanted[0] else None
        grads: list[Tensor | None] = []
        for number, (scale, share) in enumerate(ctx.thin):
            down, up = halves[2 * number : 2 * number + 2]
            trains = any(wanted[6 + 2 * number : 8 + 2 * number])
            mask, kept = (next(masks), 1 / (1 - share)) if share else (None, 1.0)
            inner = _product(g, up, scale)  # (n, r)
            if trains:
                given = rows if mask is None else torch.ops.aten.native_dropout_backward(rows, mask, kept)
                grads += [inner.t() @ given, _product(g.t(), given @ down.t(), scale)]
            else:
                grads += [None, None]
            if dx is not None and mask is None:
                dx.addmm_(inner, down)
            elif dx is not None:
                dx.add_(torch.ops.aten.native_dropout_backward(inner @ down, mask, kept))
        return None if dx is None else dx.view(x.shape), *[None] * 5, *grads


def _base(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        return functional.linear(x, weight, bias)
    assert bias is not None
    ctx.mark_dirty(bias)
    return bias


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a b"""
    return a @ b if scale == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


class Linear(lora.Linear):
    """PEFT's linear layer with plain LoRA. What else it does (switched off, merged, under autocast) is PEFT's own."""

    @staticmethod
    def fits(layer: lora.Linear) -> bool:
        return _is_plain(layer, nn.Linear)

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        base: Any = self.base_layer
        active = [] if args or named else _active(self, x)
        if not active:
            made: Tensor = super().forward(x, *args, **named)
            return made
        thin = tuple((self.scaling[name], _share(self.lora_dropout[name])) for name in active)
        halves = [half[name].weight for name in active for half in (self.lora_A, self.lora_B)]
        own = tuple(_in(x.dtype, half) for half in halves)
        known = (None, base(x)) if isinstance(base, Resting) else (base.weight, base.bias)
        made = _LowRank.apply(x, *known, thin, getattr(x, "normed", None), own, *halves)
        return made


class Conv2d(lora.Conv2d):
    """PEFT's convolution in the base's precision: PEFT makes x float32 for each of its thin convolutions."""

    @staticmethod
    def fits(layer: lora.Conv2d) -> bool:
        return _is_plain(layer, nn.Conv2d)

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        base: Any = self.base_layer
        active = [] if args or named else _active(self, x)
        if not active:
            made: Tensor = super().forward(x, *args, **named)
            return made
        y: Tensor = base(x)
        for name in active:
            dropout: Any = self.lora_dropout[name]
            inner = _convolved(dropout(x), self.lora_A[name])
            y = torch.add(y, _convolved(inner, self.lora_B[name]), alpha=self.scaling[name])
        return y


@contextmanager
def rounded(part: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the thin weights of a part's adapted layers are there in this precision too: rounded all at once, where
    each by itself is a launch of its own."""
    layers = [layer for layer in part.modules() if isinstance(layer, Linear)]
    weights: list[Any] = [thin.weight for x in layers for half in (x.lora_A, x.lora_B) for thin in half.values()]
    if not weights or any(type(weight.data) not in HELD for weight in weights):  # shared out among processes
        yield
        return
    with torch.no_grad():
        copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(copies, weights)
    for weight, copy in zip(weights, copies, strict=True):
        weight.rounded = copy
    try:
        yield
    finally:
        for weight in weights:
            del weight.rounded


def _in(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """A thin weight in this precision, as a number of its own."""
    copy: Tensor | None = None if torch.compiler.is_compiling() else getattr(weight, "rounded", None)
    return copy if copy is not None and copy.dtype == dtype else weight.detach().to(dtype)


def _is_plain(layer: Any, kind: Any) -> bool:
    """Not DoRA or another variant, nor on a base that trains or whose weight is no tensor of floats."""
    base = layer.base_layer
    known = type(base) in (kind, Resting) and type(base.weight.data) in HELD and base.weight.is_floating_point()
    plain = not layer.lora_variant and not any(layer.lora_bias.values())
    return bool(known and plain and not base.weight.requires_grad)


def _active(layer: Any, x: Tensor) -> list[str]:
    """The adapters that are computed with; none where PEFT's own pass is to see to it."""
    passive = layer.disable_adapters or layer.merged or x.dtype != layer.base_layer.weight.dtype
    if passive or torch.is_autocast_enabled(x.device.type):
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _convolved(x: Tensor, layer: Any) -> Tensor:
    weight = layer.weight.to(x.dtype)
    return functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def _share(dropout: Any) -> float:
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
