"""Safetensors files written tensor by tensor: a model larger than the memory that is left can be written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune.errors import Failure

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
         torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file. It is made when its turn comes, and dropped."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Widest types first (readers map the file, so tensors must be aligned), then by name: the same bytes each time.

    Raises Failure when a value is NaN or infinite, also by the precision that it is written in.
    """
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted((metadata or {"format": "pt"}).items()))}
    end = 0
    for name in order:
        entry, start = entries[name], end
        end += entry.dtype.itemsize * torch.Size(entry.shape).numel()
        header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = entries[name].make().detach().to("cpu", entries[name].dtype).contiguous()
            if tuple(tensor.shape) != entries[name].shape:
                raise ValueError(f"{name}: {tuple(tensor.shape)} instead of {entries[name].shape}")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise Failure(f"{path}: not written: {name} holds values that {tensor.dtype} cannot hold, or NaN.")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
