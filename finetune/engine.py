"""What a model runs on, and in which precision."""

from __future__ import annotations

import torch

from finetune.errors import Fault

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device() -> str:
    """The accelerator of this machine, else its CPU."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def dtype(precision: str) -> torch.dtype:
    """`auto` is bf16 on a GPU, else fp32. Raises Fault for fp16 without a GPU, whose kernels have no such numbers."""
    if precision == "fp16" and device() == "cpu":
        raise Fault("--precision fp16 needs a GPU: take bf16 or fp32 on a CPU.")
    return DTYPES[("bf16" if device() == "cuda" else "fp32") if precision == "auto" else precision]
