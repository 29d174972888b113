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

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
         torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor of the file. It is made when its turn comes, and dropped."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write(path: Path, entries: Mapping[str, Entry]) -> None:
    """Widest types first (readers map the file, so tensors must be aligned), then by name: the same bytes each time."""
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        entry, start = entries[name], end
        end += entry.dtype.itemsize * torch.Size(entry.shape).numel()
        header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = entries[name].make().detach().to("cpu", entries[name].dtype).contiguous()
            if tuple(tensor.shape) != entries[name].shape:
                raise ValueError(f"{name}: {tuple(tensor.shape)} instead of {entries[name].shape}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
