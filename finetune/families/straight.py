"""Parts of a diffusers folder, read a tensor at a time straight into the precision that they are to have.

diffusers and transformers map a file whole: its pages stay in memory beside the weights of another precision that are
made of them.
"""

from __future__ import annotations

import importlib
import json
import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

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
    stem, configured = reader
    headers = {file: read_header(file)[::2] for file in _files(folder, stem)}
    types = {entry["dtype"] for entries, _ in headers.values() for entry in entries.values()}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not types or not types <= FLOATS.keys() or types <= {NAMES.get(dtype)} or "quantization_config" in config:
        return None
    with _without_values(dtype):
        module = configured(kind, folder, dtype)
    names = _names(module, headers)
    if names is None:
        return None
    module.load_state_dict({names[name]: tensor for name, tensor in _read(headers, dtype)}, assign=True)
    return module.eval()


def _of_diffusers(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    model: nn.Module = kind.from_config(kind.load_config(folder))
    return model


def _of_transformers(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    config = kind.config_class.from_pretrained(folder)
    config.dtype = dtype
    model: nn.Module = kind(config)
    return model


READERS: dict[type[nn.Module], tuple[str, Callable[[Any, Path, torch.dtype], nn.Module]]] = {
    ModelMixin: ("diffusion_pytorch_model", _of_diffusers),
    PreTrainedModel: ("model", _of_transformers),
}
"""By base class: what its files are called, and how it is made of its configuration"""


@contextmanager
def _without_values(dtype: torch.dtype) -> Iterator[None]:
    """Inside, models have buffers as their libraries compute them, and parameters without values.

    To draw those of an embedding, though none are kept, PyTorch would import sympy.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def _names(module: nn.Module, headers: Headers) -> dict[str, str] | None:
    """Of each tensor in the files, what it is called in the model: without the first word where that is in no name
    there, as older text encoders of transformers were saved. None if they are others, or of other shapes."""
    told = {name: entry["shape"] for entries, _ in headers.values() for name, entry in entries.items()}
    wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    words = {name.partition(".")[0] for name in told}
    cut = len(words) == 1 and not words & {name.partition(".")[0] for name in wanted}
    names = {name: name.partition(".")[2] if cut else name for name in told}
    return names if {names[name]: shape for name, shape in told.items()} == wanted else None


def _files(folder: Path, stem: str) -> list[Path]:
    """Those of its weights, as saved without a variant."""
    index = folder / f"{stem}{SUFFIX}.index.json"
    if index.is_file():
        return [folder / name for name in sorted({*json.loads(index.read_text())["weight_map"].values()})]
    whole = folder / f"{stem}{SUFFIX}"
    return [whole] if whole.is_file() else []


def _read(headers: Headers, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for file, header in headers.items():
        yield from _tensors(file, *header, dtype)


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
