"""The denoiser's blocks compiled: regional `torch.compile`, and CUDA graphs of it, on while a step learns.

Compiling a block of a kind takes seconds where the whole model takes minutes, and the other blocks of its kind share
it (https://docs.pytorch.org/tutorials/recipes/regional_compilation.html).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from finetune import engine
from finetune.errors import Fault
from finetune.settings import Model, Train

SHAPES = 64
"""Widths and sizes of pictures that are compiled for, each kind of block; what is beyond runs as it is"""
MODES = {"blocks": "default", "graphs": "reduce-overhead"}
"""PyTorch's names: the second records what is compiled as CUDA graphs"""


class Blocks:
    """Inside, blocks compute by compiled code where they learn; elsewhere, and always outside, as they are.

    Only there: samples and validation have other shapes, for which to compile would take longer than they do, and
    what PyTorch's CUDA graphs made is overwritten by the next one unless a backward pass still needs it.
    """

    def __init__(self, blocks: Sequence[nn.Module], mode: str, parameters: Sequence[nn.Parameter]) -> None:
        """`blocks`: see `families.blocks`; `mode`: a key of MODES; `parameters`: those that learn"""
        how: dict[str, Any] = {"mode": MODES[mode], "recompile_limit": SHAPES}
        self._compiled = {block: torch.compile(block.forward, **how) for block in blocks}
        self._held = parameters if mode == "graphs" else ()

    def __enter__(self) -> None:
        for block, compiled in self._compiled.items():
            block.forward = partial(_learning, block, block.forward, compiled)
        # To add gradients to: PyTorch takes a first one as it is, and what a graph made its next run overwrites
        # (https://github.com/pytorch/pytorch/issues/169545).
        for parameter in self._held:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def __exit__(self, *_: object) -> None:
        for block in self._compiled:
            del block.forward  # the class's own shows again


def _learning(
    block: nn.Module, plain: Callable[..., Any], compiled: Callable[..., Any], *given: Any, **named: Any
) -> Any:
    told = (value for value in tree_iter((given, named)) if isinstance(value, Tensor))
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*told, *block.parameters()))
    return (compiled if learns else plain)(*given, **named)


def require(train: Train, model: Model, accelerator: Accelerator) -> None:
    """Refuse what cannot be compiled. Needs no model."""
    if train.compile == "off":
        return
    asked = f"--compile {train.compile}"
    if engine.is_sharding(accelerator):
        title = engine.SHARDING[engine.running(accelerator)]
        raise Fault(f"{asked}: not tried with {title}, which takes the blocks apart. Leave the one or the other out.")
    if model.offload_blocks:
        raise Fault(f"{asked} --offload-blocks: blocks that are brought anew each time would be compiled each time.")
    if accelerator.device.type == "cpu":
        if train.compile == "graphs":
            raise Fault(f"{asked}: CUDA graphs need a GPU. Say --compile blocks, or leave it out.")
        from torch._inductor import config

        wanted = config.cpp.cxx
        if not any(shutil.which(name) for name in wanted if name):
            raise Fault(f"{asked}: on a CPU PyTorch compiles by a C++ compiler. Install g++, or leave it out.")
