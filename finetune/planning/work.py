"""What is computed: multiplications and additions by kind, and the bytes that all else moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from finetune.planning import codes

MATRICES, CONVOLUTIONS, ATTENTION, MOVING = "matrix products", "convolutions", "attention", "the rest"
ARITHMETIC = MATRICES, CONVOLUTIONS, ATTENTION
"""Kinds that are counted in FLOP, two a multiplication; the rest, which waits for memory, is counted in bytes"""
aten = torch.ops.aten
COUNTED: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **codes.COUNTED,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **named: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *rest, **named: (
        sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)
    ),
}
"""By operator: its FLOP"""
STILL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach, aten.alias, aten._unsafe_view}
"""Operators that compute nothing and are no views either"""


@dataclass(frozen=True)
class Like:
    """A tensor without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """An operator with what it is given, tensors without their values."""

    kind: str
    amount: int
    """FLOP or bytes"""
    func: Any
    given: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]


@dataclass
class Work:
    """What was computed."""

    calls: Counter[Call] = field(default_factory=Counter)
    """How often each was"""

    def see(self, func: Any, given: Any, named: Mapping[str, Any], made: Any) -> None:
        """Add an operator that made tensors, or changed some."""
        name = func.overloadpacket
        if counted := COUNTED.get(name):
            kind, amount = _kind(str(name)), counted(*given, **named, out_val=made)
        elif func.is_view or name in STILL or not (made is None or any(map(torch.is_tensor, tree_iter(made)))):
            return
        else:
            kind, amount = MOVING, sum(_bytes(value) for value in tree_iter((given, made)))
        self.calls[Call(kind, amount, func, _told(given), _told(tuple(named.items())))] += 1

    def amounts(self) -> Counter[str]:
        """FLOP or bytes, by kind."""
        made: Counter[str] = Counter()
        for call, often in self.calls.items():
            made[call.kind] += call.amount * often
        return made

    @property
    def flops(self) -> int:
        amounts = self.amounts()
        return sum(amounts[kind] for kind in ARITHMETIC)


def _kind(name: str) -> str:
    return CONVOLUTIONS if "convolution" in name else ATTENTION if "attention" in name else MATRICES


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _told(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Like(tuple(value.shape), tuple(value.stride()), value.dtype)
    return tuple(map(_told, value)) if isinstance(value, list | tuple) else value
