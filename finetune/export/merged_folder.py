"""The whole fine-tuned model as a diffusers folder: the adapter merged into the weights, layer by layer as written."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import safe_open
from torch import nn

from finetune import families
from finetune.errors import Failure, Fault
from finetune.export import merging, stream
from finetune.export.reading import adaptable
from finetune.families import Family
from finetune.families.source import without

LOCAL_KEYS = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")
"""What the libraries write of where a model was loaded from."""
SHARD = 10_000_000_000
"""Bytes of a part's file before the rest goes into another one: diffusers' own limit."""


def merged(family: Family, folder: Path, *, dtype: torch.dtype, shard: int = SHARD) -> None:
    """Write the live model as plain diffusers and transformers load it, in the given precision, verified.

    A part of more than `shard` bytes is written in several files with an index, as the libraries do it.
    The live model is not touched: each adapted layer is merged in a float32 copy when its turn comes. All parts must
    be in memory (`families.restore`). Raises Fault when there is something at `folder`, Failure, leaving nothing there,
    when the folder does not load back equal.
    """
    merging.require_whole(family)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Fault(f"{folder}: there is something there already; a model is written to a new or empty folder.")
    unverified = folder.with_name(f".unverified-{folder.name}")
    shutil.rmtree(unverified, ignore_errors=True)
    try:
        _write(family, unverified, dtype, shard)
        verify_merged(family, unverified)
        if folder.exists():
            folder.rmdir()
        unverified.rename(folder)
    finally:
        shutil.rmtree(unverified, ignore_errors=True)


def verify_merged(family: Family, folder: Path) -> None:
    """Load each part of the folder through diffusers and compare it with the live one, see `merging.verify`."""
    precisions = {name: _dtype(folder / name) for name in families.modules(family)}

    def load(name: str, lent: Mapping[str, Any]) -> DiffusionPipeline:
        given = {**without(folder), **lent}
        return DiffusionPipeline.from_pretrained(folder, torch_dtype=precisions[name], local_files_only=True, **given)

    merging.verify(family, "merged model", precisions, load)


def configure(family: Family, folder: Path, dtype: torch.dtype) -> None:
    """Write what the folder holds besides weights: configurations, tokenizers, scheduler, index."""
    part: Any
    for name, part in family.pipeline.components.items():
        if isinstance(part, ModelMixin):
            part.save_config(folder / name)
        elif name in adaptable(family):
            _save_text_config(part, folder / name, dtype)
        elif not isinstance(part, nn.Module) and hasattr(part, "save_pretrained"):
            _forget_calls(part)
            part.save_pretrained(folder / name)
    family.pipeline.save_config(folder)
    _forget_local(folder)


def _write(family: Family, folder: Path, dtype: torch.dtype, shard: int) -> None:
    configure(family, folder, dtype)
    for name, part in families.modules(family).items():
        if isinstance(part, ModelMixin) or name in adaptable(family):
            stem = "diffusion_pytorch_model" if isinstance(part, ModelMixin) else "model"
            stream.write_shards(folder / name / f"{stem}.safetensors", dict(merging.entries(part, dtype)), shard)
        else:
            alone: Any = copy.deepcopy(part)
            alone.to(dtype).save_pretrained(folder / name)
    _forget_local(folder)


def _save_text_config(module: Any, folder: Path, dtype: torch.dtype) -> None:
    """transformers' own saving of a module that carries an adapter would write the adapter alone."""
    config = copy.deepcopy(module.config)
    config.architectures, config.dtype = [type(module).__name__], dtype
    config.save_pretrained(folder)


def _forget_calls(part: Any) -> None:
    """How the last texts were cut and filled is state of a tokenizer, and would be written with it."""
    tokenizer = getattr(part, "backend_tokenizer", None)
    if tokenizer is not None:
        tokenizer.no_truncation()
        tokenizer.no_padding()


def _forget_local(folder: Path) -> None:
    for file in folder.rglob("*.json"):
        table = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(table, dict) and any(key in table for key in LOCAL_KEYS):
            kept = {key: value for key, value in table.items() if key not in LOCAL_KEYS}
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _dtype(folder: Path) -> torch.dtype:
    """Precision of the floating-point tensors in a part's file."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (a handle is no dict)
                dtype = stream.DTYPES[handle.get_slice(name).get_dtype()]
                if dtype.is_floating_point:
                    return dtype
    raise Failure(f"the merged model does not load back: no weights in {folder.name}")
