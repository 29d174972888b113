"""Parts of a diffusers folder, read a tensor at a time straight into the precision that they are to have.

diffusers and transformers map a file whole: its pages stay in memory beside the weights of another precision that are
made of them.
"""

from __future__ import annotations

import importlib
import json
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.weights import SUFFIX, read_header

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in FLOATS.items()}
Headers = Mapping[Path, tuple[Mapping[str, Any], int]]
"""Of each file the tensors' entries, and the byte where they begin"""


def parts(folder: Path, dtype: Callable[[str], torch.dtype], but: Collection[str]) -> dict[str, nn.Module]:
    """Those of the pipeline's parts `but` these that the libraries need not read themselves, by name."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    found = {}
    for name, (home, kind) in ((name, made) for name, made in index.items() if isinstance(made, list)):
        if name not in but and home in ("diffusers", "transformers"):
            found[name] = part(folder / name, getattr(importlib.import_module(home), kind, None), dtype(name))
    return {name: module for name, module in found.items() if module is not None}


def part(folder: Path, kind: Any, dtype: torch.dtype) -> nn.Module | None:
    """One in evaluation mode. None where a library has more to do than to read: weights that are in this precision
    already (mapped, all processes share them), quantised ones, other names or shapes, some that stay in float32."""
    reader = next(
        (reader for base, reader in READERS.items() if isinstance(kind, type) and issubclass(kind, base)), None
    )
    if reader is None or any(getattr(kind, f"_keep_in_fp32_modules{more}", None) for more in ("", "_strict")):
        return None
    stem, made = reader
    headers = {file: read_header(file)[::2] for file in _files(folder, stem)}
    types = {entry["dtype"] for entries, _ in headers.values() for entry in entries.values()}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not types or not types <= FLOATS.keys() or types <= {NAMES.get(dtype)} or "quantization_config" in config:
        return None
    module = made(folder, kind, dtype, headers)
    return module and module.eval()


def _of_diffusers(folder: Path, kind: Any, dtype: torch.dtype, headers: Headers) -> nn.Module | None:
    """By its configuration, buffers as diffusers computes them, parameters without values until they are read."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            module: nn.Module = kind.from_config(kind.load_config(folder))
    finally:
        torch.set_default_dtype(before)
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    if shapes != {name: entry["shape"] for entries, _ in headers.values() for name, entry in entries.items()}:
        return None
    module.load_state_dict(_read(headers, dtype), assign=True)
    return module


def _of_transformers(folder: Path, kind: Any, dtype: torch.dtype, headers: Headers) -> nn.Module:
    config = kind.config_class.from_pretrained(folder)
    module: nn.Module = kind.from_pretrained(None, config=config, state_dict=_read(headers, dtype), dtype=dtype)
    return module


READERS: dict[type[nn.Module], tuple[str, Callable[..., nn.Module | None]]] = {
    ModelMixin: ("diffusion_pytorch_model", _of_diffusers),
    PreTrainedModel: ("model", _of_transformers),
}
"""By base class: what its files are called, and how it is made of them"""


def _files(folder: Path, stem: str) -> list[Path]:
    """Those of its weights, as saved without a variant."""
    index = folder / f"{stem}{SUFFIX}.index.json"
    if index.is_file():
        return [folder / name for name in sorted({*json.loads(index.read_text())["weight_map"].values()})]
    whole = folder / f"{stem}{SUFFIX}"
    return [whole] if whole.is_file() else []


def _read(headers: Headers, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor for file, header in headers.items() for name, tensor in _tensors(file, *header, dtype)}


def _tensors(file: Path, entries: Mapping[str, Any], begin: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """In the file's order. One at a time is held as it is there, in memory that is given back."""
    places = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    scratch = mmap.mmap(-1, max(last - first for first, last, _ in places))
    with file.open("rb") as handle:
        for first, last, name in places:
            handle.seek(begin + first)
            handle.readinto(memoryview(scratch)[: last - first])
            held = FLOATS[entries[name]["dtype"]]
            raw = torch.frombuffer(scratch, dtype=held, count=(last - first) // held.itemsize)
            yield name, raw.view(entries[name]["shape"]).to(dtype, copy=True)
