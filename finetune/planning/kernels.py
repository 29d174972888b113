"""What PyTorch's CPU kernels hold beside what they are given and what they make: copies in oneDNN's layout, and
attention's tiles. (Read from PyTorch 2.13 and its profiler; of GPUs nobody tells.)"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

BLOCK = 16
"""Channels of an image stand together by so many in oneDNN's layout"""
SMALL = 20480
"""Elements of a single image up to which it is unfolded into columns instead"""
KEYS = 512
"""Keys that attention takes at once"""
aten = torch.ops.aten


def convolution(x: Tensor, weight: Tensor, *rest: Any) -> int:
    """x, W and y at once, then y in both layouts; of pictures whose channels stand together, as after the VAE's
    attention, W alone is copied."""
    transposed, padding = rest[4], rest[2]
    if transposed:
        return 0
    made = _convolved(x, weight, rest[1], padding, rest[3])
    if x.shape[0] == 1 and x.numel() <= SMALL:
        columns = prod(weight.shape[1:]) * prod(made[2:]) if prod(weight.shape[2:]) > 1 else 0
        return x.element_size() * (columns + prod(made))
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x.element_size() * (weight.numel() + prod(made))
    inner = _blocked(x.shape) if x.shape[1] >= BLOCK else 0  # else x stays as it is
    outer = _blocked(made)
    return x.element_size() * max(inner + weight.numel() + outer, outer + prod(made))


def convolution_backward(g: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    inner, outer = _blocked(x.shape), _blocked(g.shape)
    wanted, plain = rest[-1], prod(x.shape)
    first = max(outer + weight.numel() + inner, inner + plain) if wanted[0] else 0
    second = plain * wanted[0] + outer + inner if wanted[1] else 0
    return int(g.element_size() * max(first, second))


def attention(q: Tensor, k: Tensor, *rest: Any, **named: Any) -> int:
    """Of each thread the tile of weights, their maxima and sums, and of y. Half precision has a copy of the weights."""
    rows, columns = _tile(q, k)
    half = columns if q.element_size() == 2 else 0
    made = prod(q.shape) * q.element_size() + prod(q.shape[:-1]) * 4
    return made + torch.get_num_threads() * rows * (4 * (columns + 2 + q.shape[-1]) + 2 * half)


def attention_backward(g: Tensor, q: Tensor, k: Tensor, *rest: Any, **named: Any) -> int:
    """The tiles of the weights and of their gradients."""
    rows, columns = _tile(q, k)
    made = (2 * prod(q.shape) + 2 * prod(k.shape)) * q.element_size()
    return made + torch.get_num_threads() * rows * columns * (8 if q.element_size() == 4 else 12)


KERNELS: dict[Any, Callable[..., int]] = {
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu.default: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: attention_backward,
}
"""By operator: the bytes that are held at most while it is computed, its results included"""


def _blocked(shape: Any) -> int:
    """Elements of an image (B, C, h, w) in oneDNN's layout."""
    channels = -(-shape[1] // BLOCK) * BLOCK
    return int(shape[0] * channels * prod(shape[2:]))


def _convolved(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> list[int]:
    sides = [
        (side + 2 * pad - step * (length - 1) - 1) // by + 1
        for side, pad, step, length, by in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    ]
    return [x.shape[0], weight.shape[0], *sides]


def _tile(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Queries and keys, (B, heads, n, d)"""
    length = q.shape[2]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(rows, length), min(KEYS, k.shape[2])
