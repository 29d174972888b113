"""Safetensors files written tensor by tensor: a model larger than the memory that is left can be written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune import disk, weights
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
        end += _bytes([entry])
        table[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    told = {**(metadata or {"format": "pt"}), **{name: hashes.BLANKS[name] for name in hashed}}
    digest = hashes.Digest(table, told)
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.written(path), path.open("wb") as file:
        file.write(weights.header_bytes(table, told))
        for name in order:
            tensor = entries[name].make().detach().to("cpu", entries[name].dtype).contiguous()
            if tuple(tensor.shape) != entries[name].shape:
                raise ValueError(f"{name}: {tuple(tensor.shape)} instead of {entries[name].shape}")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise Failure(f"{path}: not written: {name} holds values that {tensor.dtype} cannot hold, or NaN.")
            piece = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
            file.write(piece)
            if hashed:
                digest.update(piece)
        if hashed:  # as long as the blanks that stand there
            file.seek(0)
            file.write(weights.header_bytes(table, {**told, **{name: digest.values()[name] for name in hashed}}))
        file.flush()
        os.fsync(file.fileno())


def write_shards(path: Path, entries: Mapping[str, Entry], limit: int) -> None:
    """The same in files of at most `limit` bytes of tensors, `name-00001-of-00003.safetensors`, with their index.

    What fits into one file is written to `path`. A tensor that is larger than the limit has a file of its own.
    """
    shards: list[dict[str, Entry]] = [{}]
    for name in sorted(entries):
        if shards[-1] and _bytes(shards[-1].values()) + _bytes([entries[name]]) > limit:
            shards.append({})
        shards[-1][name] = entries[name]
    if len(shards) == 1:
        return write(path, entries)
    files = [f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write(path.with_name(file), shard)
    index = {
        "metadata": {"total_size": _bytes(entries.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _bytes(entries: Iterable[Entry]) -> int:
    return sum(entry.dtype.itemsize * torch.Size(entry.shape).numel() for entry in entries)
