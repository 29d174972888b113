"""LoRA's forward and backward pass with the fewest passes over memory; PEFT keeps the adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

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
FIXED = 4
"""Arguments of `_LowRank` before A and B"""
Frozen = tuple[Tensor | None, Any]
"""W and b; without W, W x + b"""


class Thin(NamedTuple):
    """One adapter on one of the layers."""

    layer: int
    down: int
    """Where its A is; its B is the next"""
    scale: float
    share: float
    """Of its inputs, that is dropped"""

    @property
    def up(self) -> int:
        return self.down + 1


class _LowRank(Function):
    """y = W x + b + sum of s B A d(x) over the adapters, W and b being frozen (Hu et al. 2021, 2106.09685, eq. 3), for
    layers that are given the same x.

    d drops inputs; x: (..., in), W: (out, in), A: (r, in), B: (out, r), y: (..., out). With g = dL/dy

        dL/dB = s g' (A d(x))        dL/dA = s (g B)' d(x)        dL/dx = g W + d'(s g B A)

    where all sums, over layers too, are taken by the matrix products themselves, in place, and the A of one d(x) are
    one matrix. What is kept is x, or what it was `normed` of, and which inputs were dropped; A d(x) is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        frozen: tuple[Frozen, ...],
        thin: tuple[Thin, ...],
        normed: Normed | None,
        *halves: Tensor,
    ) -> tuple[Tensor, ...]:
        """`halves`: A and B of each adapter, all in x's precision"""
        rows, ys = x.reshape(-1, x.shape[-1]), [b if w is None else functional.linear(x, w, b) for w, b in frozen]
        masks = []
        for group in _groups(thin):
            given = rows
            if share := group[0].share:
                given, mask = torch.native_dropout(rows, share, True)
                masks.append(mask)
            inner = (given @ _down(group, halves).t()).split(_ranks(group, halves), 1)
            for one, part in zip(group, inner, strict=True):
                y = ys[one.layer]
                y.view(-1, y.shape[-1]).addmm_(part, halves[one.up].t(), alpha=one.scale)
        ctx.thin, ctx.normed = thin, normed and normed[3:]
        weights = [weight for weight, _ in frozen]
        ctx.save_for_backward(*(normed[:3] if normed else (x, None, None)), *halves, *weights, *masks)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors  # asked for once: where they are computed again, that is done then
        norm, halves, rest = saved[:2], saved[2 : 2 + 2 * len(ctx.thin)], iter(saved[2 + 2 * len(ctx.thin) :])
        x = Normed(x, *norm, *ctx.normed).again() if ctx.normed else x
        rows, gs = x.reshape(-1, x.shape[-1]), [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        weights = [next(rest) for _ in gs]
        dx = _summed(gs, weights) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = [None] * len(halves)
        for group in _groups(ctx.thin):
            down, ranks = _down(group, halves), _ranks(group, halves)
            mask = next(rest) if group[0].share else None
            inner = _beside([_product(gs[one.layer], halves[one.up], one.scale) for one in group], 1)  # (n, sum of r)
            if dx is not None and mask is None:
                dx.addmm_(inner, down)
            elif dx is not None:
                dx.add_(_dropped(inner @ down, mask, group[0].share))
            if any(ctx.needs_input_grad[FIXED + half] for one in group for half in (one.down, one.up)):
                given = _dropped(rows, mask, group[0].share)
                thin = (inner.t() @ given).split(ranks), (given @ down.t()).split(ranks, 1)
                for one, of_down, z in zip(group, *thin, strict=True):
                    found[one.down], found[one.up] = of_down, _product(gs[one.layer].t(), z, one.scale)
        return None if dx is None else dx.view(x.shape), *[None] * (FIXED - 1), *found


def _groups(thin: Sequence[Thin]) -> list[list[Thin]]:
    """Those that are given the same: all of what nothing is dropped for, and each of the others."""
    groups = [[one for one in thin if not one.share], *([one] for one in thin if one.share)]
    return [group for group in groups if group]


def _down(group: Sequence[Thin], halves: Sequence[Tensor]) -> Tensor:
    """Their A, one under the other: (sum of r, in)"""
    return _beside([halves[one.down] for one in group], 0)


def _ranks(group: Sequence[Thin], halves: Sequence[Tensor]) -> list[int]:
    return [halves[one.down].shape[0] for one in group]


def _beside(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _summed(gs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Sum of g W over the layers"""
    total = gs[0] @ weights[0]
    for g, weight in zip(gs[1:], weights[1:], strict=True):
        total.addmm_(g, weight)
    return total


def _dropped(x: Tensor, mask: Tensor | None, share: float) -> Tensor:
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - share))


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a b"""
    return a @ b if scale == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


class Linear(lora.Linear):
    """PEFT's linear layer with plain LoRA. What else it does (switched off, merged, under autocast) is PEFT's own."""

    @staticmethod
    def fits(layer: lora.Linear) -> bool:
        return _is_plain(layer, nn.Linear)

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        if args or named or not _active(self, x):
            made: Tensor = super().forward(x, *args, **named)
            return made
        return _computed([self], x)[0]


def together(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """What layers that are given the same make of it: at once, where all are LoRA's."""
    if all(isinstance(layer, Linear) and _active(layer, x) for layer in layers):
        return _computed(layers, x)
    return [layer(x) for layer in layers]


def _computed(layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...]:
    thin: list[Thin] = []
    halves: list[Tensor] = []
    for number, layer in enumerate(layers):
        for name in _active(layer, x):
            thin.append(Thin(number, len(halves), layer.scaling[name], _share(layer.lora_dropout[name])))
            halves += [_in(x.dtype, half[name].weight) for half in (layer.lora_A, layer.lora_B)]
    frozen = tuple(_frozen(layer.base_layer, x) for layer in layers)
    made: tuple[Tensor, ...] = _LowRank.apply(x, frozen, tuple(thin), getattr(x, "normed", None), *halves)
    return made


def _frozen(base: Any, x: Tensor) -> Frozen:
    return (None, base(x)) if isinstance(base, Resting) else (base.weight, base.bias)


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
def rounded(layers: Iterable[Linear], dtype: torch.dtype) -> Iterator[None]:
    """Inside, the thin weights of these layers are there in this precision too: rounded all at once, where each by
    itself is a launch of its own."""
    weights: list[Any] = [thin.weight for x in layers for half in (x.lora_A, x.lora_B) for thin in half.values()]
    if not weights or any(type(weight.data) not in HELD for weight in weights):  # shared out among processes
        yield
        return
    for weight, copy in zip(weights, _Rounded.apply(dtype, *weights), strict=True):
        weight.rounded = copy
    try:
        yield
    finally:
        for weight in weights:
            del weight.rounded


class _Rounded(Function):
    """Weights in another precision, and their gradients in the weights' own."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = weights[0].dtype
        ctx.set_materialize_grads(False)
        copies = _copied(weights, dtype)
        ctx.mark_non_differentiable(*[copy for copy, of in zip(copies, weights, strict=True) if not of.requires_grad])
        return copies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = iter(_copied([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *[None if grad is None else next(found) for grad in grads]


def _copied(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)


def _in(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """A thin weight in this precision."""
    copy: Tensor | None = None if torch.compiler.is_compiling() else getattr(weight, "rounded", None)
    return copy if copy is not None and copy.dtype == dtype else weight.to(dtype)


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
