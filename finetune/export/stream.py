"""Safetensors files written tensor by tensor: a model larger than the memory that is left can be written."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune import weights
from finetune.errors import Failure
from finetune.export import hashes

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
         torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file. It is made when its turn comes, and dropped."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write(
    path: Path,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str] | None = None,
    hashed: Collection[str] = (),
) -> None:
    """Widest types first (readers map the file, so tensors must be aligned), then by name: the same bytes each time.

    `hashed`: names of `hashes.BLANKS` that the metadata are to tell; they are computed while the tensors are written.
    Raises Failure when a value is NaN or infinite, also by the precision that it is written in.
    """
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    table, end = {}, 0
    for name in order:
        entry, start = entries[name], end
        end += entry.dtype.itemsize * torch.Size(entry.shape).numel()
        table[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    told = {**(metadata or {"format": "pt"}), **{name: hashes.BLANKS[name] for name in hashed}}
    digest = hashes.Digest(table, told)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(weights.header_bytes(table, told))
        for name in order:
            tensor = entries[name].make().detach().to("cpu", entries[name].dtype).contiguous()
            if tuple(tensor.shape) != entries[name].shape:
                raise ValueError(f"{name}: {tuple(tensor.shape)} instead of {entries[name].shape}")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise Failure(f"{path}: not written: {name} holds values that {tensor.dtype} cannot hold, or NaN.")
            piece = tensor.reshape(-1).view(torch.uint8).numpy().data
            file.write(piece)
            if hashed:
                digest.update(piece)
        if hashed:  # as long as the blanks that stand there
            file.seek(0)
            file.write(weights.header_bytes(table, {**told, **{name: digest.values()[name] for name in hashed}}))
        file.flush()
        os.fsync(file.fileno())
