"""Frozen weights in 4 or 8 bits, by bitsandbytes: the base under an adapter (QLoRA, Dettmers et al. 2023, 2305.14314).

The layers of a model that is in memory are replaced one after the other, so that any source will do and no second copy
of the whole is ever held: the linear layers of the denoiser's blocks, and of those text encoders that never train (T5,
Qwen3). What leads into the blocks and out of them, convolutions, norms and embeddings stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.families.base import Family, denoiser, modules, text_encoders

BITS = {"nf4": 4, "int8": 8}
"""nf4: codes of blocks of 64, whose scales are codes again (double quantization). int8: codes of rows, and of what goes
into a layer too (Dettmers et al. 2022, 2208.07339)."""
OUTLIERS = 6.0
"""Inputs from this size on are not put into 8 bits (section 3.2 there)."""


def quantize(family: Family, kind: str, device: torch.device | str, parts: Iterable[str] | None = None) -> None:
    """Quantise what can be of a family, of these parts alone if any are named. The codes are computed on the device.

    What a layer computes in is the precision that its weight had.
    """
    able = {family.denoiser_name: denoiser(family), **text_encoders(family)}
    for name, module in able.items():
        if name not in family.trained_text_encoders and (parts is None or name in parts):
            for path, layer in chosen(module).items():
                module.set_submodule(path, _replaced(layer, kind, device))
            setattr(module, f"is_loaded_in_{BITS[kind]}bit", True)  # what PEFT looks for


def chosen(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks, by path, but for those that their authors keep in float32 (T5's `wo`)."""
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    blocks = [f"{path}." for path, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    return {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and path.startswith(tuple(blocks)) and not set(path.split(".")) & set(kept)
    }


def is_quantized(layer: object) -> bool:
    return isinstance(layer, nn.Linear) and type(layer.weight).__name__ in ("Params4bit", "Int8Params")


def there(family: Family) -> bool:
    """Whether any of what the pipeline holds is quantised."""
    return any(is_quantized(layer) for part in modules(family).values() for layer in part.modules())


def precisions(family: Family) -> list[torch.dtype]:
    """What answers are as exact as, beside the weights' own: int8 rounds what goes into a layer to as many bits as
    bfloat16 has."""
    whole = (layer for part in modules(family).values() for layer in part.modules())
    return [torch.bfloat16] if any(is_quantized(layer) and layer.weight.dtype == torch.int8 for layer in whole) else []


def weight(layer: nn.Module) -> Tensor:
    """The weight that a layer stands for, (out, in): of a quantised one in the precision that it computes in."""
    held: Any = layer.weight
    if not is_quantized(layer):
        return held.data
    from bitsandbytes import functional

    if hasattr(held, "quant_state"):
        return functional.dequantize_4bit(held.data, held.quant_state)
    state: Any = layer.state
    scales = state.SCB if held.SCB is None else held.SCB  # it moves there at the first call
    return functional.int8_vectorwise_dequant(held.data, scales).to(layer.computes_in)


def shape(layer: nn.Module) -> tuple[int, ...]:
    """Of the weight that a layer stands for."""
    own: Any = layer
    return (own.out_features, own.in_features) if is_quantized(layer) else tuple(own.weight.shape)


def size(module: nn.Module) -> int:
    """Number of the frozen weights, whatever they are held in."""
    frozen = [p for p in module.parameters() if not p.requires_grad]
    return sum(p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel() for p in frozen)


@contextmanager
def opened(module: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Inside, these layers are plain ones with the weights that they stand for."""
    held = {path: module.get_submodule(path) for path in paths}
    open_(module, held)
    try:
        yield
    finally:
        for path, layer in held.items():
            module.set_submodule(path, layer)


def open_(module: nn.Module, paths: Iterable[str]) -> None:
    """Make plain layers of these, for good; those that are plain stay as they are."""
    for path in paths:
        layer: Any = module.get_submodule(path)
        if is_quantized(layer):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(weight(layer), requires_grad=False), layer.bias
            module.set_submodule(path, plain.train(layer.training))


def _replaced(layer: nn.Linear, kind: str, device: torch.device | str) -> nn.Module:
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # of each call, that int8 casts
    from bitsandbytes import nn as quantized

    shape, dtype = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.dtype
    held: dict[str, Any] = {"requires_grad": False}
    made: Any
    if kind == "nf4":
        held |= {"quant_type": "nf4", "compress_statistics": True}
        made = quantized.Linear4bit(
            *shape, compute_dtype=dtype, quant_type="nf4", compress_statistics=True, device="meta"
        )
        made.weight = quantized.Params4bit(layer.weight.data, module=made, **held).to(device)
        # Else a CPU with AVX-512 BF16 packs the weights anew at the first drawing: no gradient passes from then on.
        made.support_avx512bf16_for_cpu = False
    else:
        made = quantized.Linear8bitLt(*shape, has_fp16_weights=False, threshold=OUTLIERS, device="meta")
        made.weight = quantized.Int8Params(layer.weight.data, has_fp16_weights=False, **held).to(device)
        made.computes_in = dtype
    made.bias = None if layer.bias is None else nn.Parameter(layer.bias.data.to(device), requires_grad=False)
    return made.train(layer.training)
