"""The whole fine-tuned model as one file in the original layout, which every client reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from finetune import families
from finetune.errors import Failure, Fault
from finetune.export import merging, stream
from finetune.export import metadata as headers
from finetune.export.content import File
from finetune.export.merged_folder import configure
from finetune.export.reading import listed
from finetune.export.stream import Entry
from finetune.families import Family
from finetune.families.checkpoint import Piece

UNKNOWN = "no single file of {} models is written: their original layout is not known here. Take the format merged."


def single_file(family: Family, path: Path, *, dtype: torch.dtype, metadata: Mapping[str, str] | None = None) -> None:
    """Write the live model as a checkpoint in the original layout, adapters merged, verified.

    Tensor by tensor, as `merged`; neither the live model is touched nor is there a second one. Raises Fault when there
    is something at `path` or when a part has layers that the original code has not, Failure, leaving nothing there,
    when the file does not load back equal.
    """
    merging.require_whole(family)
    if not family.published.single_file:
        raise Fault(UNKNOWN.format(family.title))
    if path.exists():
        raise Fault(f"{path}: there is something there already. Name another file.")
    unverified = path.with_name(f".unverified-{path.name}")
    try:
        told = {"format": "pt", **headers.of_whole(metadata or {}, family.edition())}
        stream.write(unverified, _entries(family, dtype), told, hashed=("modelspec.hash_sha256",))
        verify_single_file(family, unverified)
        os.replace(unverified, path)
    finally:
        unverified.unlink(missing_ok=True)


def verify_single_file(family: Family, path: Path) -> None:
    """Load the parts through diffusers' `from_single_file` and compare them with the live ones, see `merging.verify`.

    The configuration and the tokenizer, which such a file has not, are the live pipeline's.
    """
    file = File(path)
    dtype = next(dtype for dtype in file.precisions() if dtype.is_floating_point)
    expected = _entries(family, dtype)
    if other := expected.keys() ^ file.shapes.keys():
        lines = (f"{name}: {'not in the file' if name in expected else 'of no part'}" for name in other)
        raise Failure("the single file does not load back as it was written:", listed(lines))
    pipeline: Any = type(family.pipeline)
    with tempfile.TemporaryDirectory() as folder:
        configure(family, Path(folder), dtype)

        def load(name: str, lent: Mapping[str, Any]) -> DiffusionPipeline:
            loaded: DiffusionPipeline = pipeline.from_single_file(
                str(path), config=folder, torch_dtype=dtype, local_files_only=True, **lent
            )
            return loaded

        merging.verify(family, "single file", dict.fromkeys(family.original_parts(), dtype), load)


def _entries(family: Family, dtype: torch.dtype) -> dict[str, Entry]:
    """The file's tensors, by their names there."""
    made: dict[str, Entry] = {}
    for name, part in family.original_parts().items():
        module: Any = families.modules(family)[name]
        own = dict(merging.entries(module, dtype))
        try:
            pieces = list(part.pieces({each: entry.shape for each, entry in own.items()}, module.config))
        except (KeyError, TypeError) as error:
            raise Fault(
                f"{name}: the original layout has no place for {error}. Write a merged folder instead."
            ) from None
        if left := own.keys() - {source for piece in pieces for source in piece.sources}:
            raise Fault(f"{name}: the original layout has no place for some of its weights:", listed(left))
        made |= {f"{part.prefix}{piece.name}": _entry(piece, own) for piece in pieces}
    return made


def _entry(piece: Piece, own: Mapping[str, Entry]) -> Entry:
    def made() -> Tensor:
        return piece.made(lambda name: own[name].make().detach().cpu())

    shape = piece.made(lambda name: torch.empty(own[name].shape, device="meta")).shape
    return Entry(tuple(shape), own[piece.sources[0]].dtype, made)
