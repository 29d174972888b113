"""A frozen part in its own precision: bf16 weights need no autocast, which casts again what is bf16 already."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from finetune.fast import lora


def keep(part: nn.Module) -> None:
    """Let a part whose weights are bf16 compute without autocast, whoever calls it. (fp16 has not the range.)

    The adapter's weights stay float32 and are rounded as autocast rounds them, all of them at once.
    """
    if next(part.parameters()).dtype == torch.bfloat16:
        part.forward = partial(_in_own, part, [layer for layer in part.modules() if isinstance(layer, lora.Linear)])


def _in_own(part: Any, adapted: list[lora.Linear], *given: Any, **named: Any) -> Any:
    device = next(part.parameters()).device.type
    with torch.autocast(device, enabled=False), lora.rounded(adapted, torch.bfloat16):
        return type(part).forward(part, *given, **named)
