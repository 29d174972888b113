"""Quantised layers without data: bitsandbytes' own classes and operators, on codes that have a shape alone.

Its weights are tensors of classes of its own, which cannot be without data; plain ones stand for them, with all that
its layers and PEFT ask them for.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from bitsandbytes import nn as quantized
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from finetune.families.base import Family, denoiser, text_encoders
from finetune.families.quantized import BITS, OUTLIERS, chosen

BLOCK, SCALES = 64, 256
"""Weights that share a scale, and scales that share one"""
bits = torch.ops.bitsandbytes


def quantize(family: Family, kind: str, cpu: bool) -> None:
    """As `families.quantized.quantize` has it. `cpu`: as the layers are computed there."""
    for name, module in {family.denoiser_name: denoiser(family), **text_encoders(family)}.items():
        if name not in family.trained_text_encoders:
            for path, layer in chosen(module).items():
                module.set_submodule(path, _four(layer) if kind == "nf4" else _eight(layer, cpu))
            setattr(module, f"is_loaded_in_{BITS[kind]}bit", True)


def beside(module: nn.Module) -> list[Tensor]:
    """What quantised layers hold that is neither parameter nor buffer."""
    states: list[Any] = [getattr(p, "quant_state", None) for p in module.parameters()]
    states += [getattr(layer, "state", None) for layer in module.modules() if hasattr(layer, "state")]
    states += [state.state2 for state in states if getattr(state, "state2", None) is not None]
    return [
        value for state in states if state is not None for value in vars(state).values() if isinstance(value, Tensor)
    ]


def _four(layer: nn.Linear) -> nn.Module:
    """Codes of four bits, their scales in eight, the scales of these, and what both codes mean."""
    made, shape = _empty(quantized.Linear4bit, layer), layer.weight.shape
    count = shape.numel()
    scales = -(-count // BLOCK)
    above = QuantState(torch.empty(-(-scales // SCALES)), code=torch.empty(256), blocksize=SCALES, dtype=torch.float32)
    weight: Any = nn.Parameter(torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = QuantState(
        torch.empty(scales, dtype=torch.uint8), shape, torch.empty(16), BLOCK, "nf4", layer.weight.dtype,
        offset=torch.empty(()), state2=above,
    )  # fmt: skip
    weight.compress_statistics, weight.quant_type = True, "nf4"
    made.compute_dtype, made.compute_type_is_set = layer.weight.dtype, True
    made.support_avx512bf16_for_cpu = False
    made.weight = weight
    return made


def _eight(layer: nn.Linear, cpu: bool) -> nn.Module:
    """Codes of eight bits, a scale for each row. Which inputs are left out of them, nobody knows: none."""
    made, (rows, columns) = _empty(quantized.Linear8bitLt, layer), layer.weight.shape
    made.state, made.index = quantized.modules.bnb.MatmulLtState(), None
    made.state.has_fp16_weights, made.state.threshold = False, OUTLIERS
    made.weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.int8), requires_grad=False)
    made.state.CB, made.state.SCB = made.weight.data, torch.empty(rows)
    made.forward = lambda x: _matmul(made, x, cpu)
    return made


def _matmul(layer: Any, x: Tensor, cpu: bool) -> Tensor:
    """As `bitsandbytes.matmul` chooses, which asks the device."""
    from bitsandbytes.autograd._functions import MatMul8bitFp, MatMul8bitLt

    layer.state.threshold = 0.0  # else the number of outliers is asked for
    way: Any = MatMul8bitFp if cpu and layer.training else MatMul8bitLt
    made: Tensor = way.apply(x, layer.weight, None, layer.bias, layer.state)
    return made


def _empty(kind: Any, layer: nn.Linear) -> Any:
    """A layer of this class without a weight."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.in_features, made.out_features, made.bias = layer.in_features, layer.out_features, layer.bias
    return made.train(layer.training)


def _opened(x: Tensor, codes: Tensor, shape: Any, *rest: Any, **named: Any) -> int:
    """The weight and what is computed with it."""
    return int(x.element_size() * (prod(shape) + prod(x.shape[:-1]) * shape[0]))


KERNELS: dict[Any, Callable[..., int]] = {bits.gemm_4bit.default: _opened}
"""By operator: the bytes that are held at most while it is computed, its results included. (PyTorch's matrix product
on weights that are made for it; on a GPU few rows need none.)"""
COUNTED: dict[Any, Callable[..., int]] = {
    bits.gemm_4bit: lambda x, codes, shape, *rest, **named: 2 * x.numel() * shape[0],
    bits.int8_linear_matmul: lambda a, b, *rest, **named: 2 * a.numel() * b.shape[0],
}
"""By operator: its multiplications and additions"""
