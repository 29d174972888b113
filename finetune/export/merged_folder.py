"""The whole fine-tuned model as a diffusers folder: the adapter merged into the weights, layer by layer as written."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from finetune import families
from finetune.errors import Failure, Fault
from finetune.export import naming, stream
from finetune.export.compare import REROUNDED, difference, encoding, prediction, rounded_alike
from finetune.export.reading import adaptable, listed
from finetune.families import Family
from finetune.quiet import quiet

LOCAL_KEYS = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")
"""What the libraries write of where a model was loaded from."""
SUMMED = 1e-5
"""Of the largest change in a layer: sums of float32 products in another order differ by less."""


def merged(family: Family, folder: Path, *, dtype: torch.dtype) -> None:
    """Write the live model as plain diffusers and transformers load it, in the given precision, verified.

    The live model is not touched: each adapted layer is merged in a float32 copy when its turn comes. All parts must
    be in memory (`families.restore`). Raises Fault when there is something at `folder`, Failure, leaving nothing there,
    when the folder does not load back equal.
    """
    _require_whole(family)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Fault(f"{folder}: there is something there already; a model is written to a new or empty folder.")
    unverified = folder.with_name(f".unverified-{folder.name}")
    shutil.rmtree(unverified, ignore_errors=True)
    try:
        _write(family, unverified, dtype)
        verify_merged(family, unverified)
        if folder.exists():
            folder.rmdir()
        unverified.rename(folder)
    finally:
        shutil.rmtree(unverified, ignore_errors=True)


def verify_merged(family: Family, folder: Path) -> None:
    """Load each part of the folder through diffusers and compare it with the live one: every weight, and its answers.

    One part is loaded at a time, the others are lent to the pipeline: no second whole model is in memory. Raises
    Failure that lists what differs.
    """
    parts: dict[str, Any] = {**families.modules(family)}
    wrong: list[str] = []
    live = {family.denoiser_name: prediction(family)} | dict.fromkeys(families.text_encoders(family), encoding(family))
    for name, module in parts.items():
        dtype = _dtype(folder / name)
        lent = {other: part for other, part in parts.items() if other != name}
        try:
            with quiet():
                loaded = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, **lent)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise Failure(f"the merged model does not load back: {name}: {error}") from error
        fresh = loaded.components[name]
        wrong += (other := _other_weights(name, module, fresh, dtype))
        if name in live and not other:
            fresh.to(module.device)
            again = families.wrap(loaded)
            answer = prediction(again) if name == family.denoiser_name else encoding(again)
            gap = difference(live[name], answer)
            if not gap <= max(REROUNDED[dtype], REROUNDED[module.dtype]):
                wrong.append(f"{name}: its answer differs by {gap:.1e} of its norm")
    if wrong:
        raise Failure("the merged model does not load back as it was written:", listed(wrong))


def _write(family: Family, folder: Path, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True)
    pipeline = family.pipeline
    part: Any
    for name, part in pipeline.components.items():
        if isinstance(part, ModelMixin):
            part.save_config(folder / name)
            stream.write(folder / name / "diffusion_pytorch_model.safetensors", dict(_entries(part, dtype)))
        elif name in adaptable(family):
            _save_text_config(part, folder / name, dtype)
            stream.write(folder / name / "model.safetensors", dict(_entries(part, dtype)))
        elif isinstance(part, nn.Module):
            alone: Any = copy.deepcopy(part)
            alone.to(dtype).save_pretrained(folder / name)
        elif hasattr(part, "save_pretrained"):
            part.save_pretrained(folder / name)
    pipeline.save_config(folder)
    for file in folder.rglob("*.json"):
        _forget_local(file)


def _entries(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, stream.Entry]]:
    """The module's tensors by their names in files, adapters merged."""
    carriers = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, tensor in _own_tensors(module).items():
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        layer, _, leaf = name.rpartition(".")
        carrier = carriers.get(layer)
        make = (lambda tensor=tensor: tensor) if carrier is None else (lambda c=carrier, leaf=leaf: _merge(c, leaf))
        yield naming.written(module, name), stream.Entry(tuple(tensor.shape), kept, make)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's tensors without its adapters', by the names that they have without them."""
    carriers = [name for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]
    inside = tuple(f"{name}." for name in carriers)
    base = tuple(f"{name}.base_layer." for name in carriers)
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in module.state_dict().items()
        if not name.startswith(inside) or name.startswith(base)
    }


def _merge(layer: BaseTunerLayer, leaf: str) -> Tensor:
    """The weight (or bias) of a layer with its active adapters in it: a copy's, in float32, on the CPU (no TF32)."""
    alone = copy.deepcopy(layer).cpu().float()
    with torch.no_grad():
        alone.merge()
    return getattr(alone.get_base_layer(), leaf)


def _other_weights(part: str, module: nn.Module, fresh: nn.Module, dtype: torch.dtype) -> list[str]:
    own = _own_tensors(module)
    loaded = {
        name: tensor for name, tensor in fresh.state_dict().items() if not tensor.is_meta
    }  # meta: not in the file
    wrong = [f"{part}.{name}: only in one of the two" for name in own.keys() ^ loaded.keys()]
    changed = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name in sorted(own.keys() & loaded.keys()):
        layer, _, leaf = name.rpartition(".")
        expected, slack = own[name].detach().cpu(), 0.0
        if leaf == "weight" and layer in changed:
            change = _change(changed[layer], leaf)
            expected, slack = expected.float() + change, SUMMED * float(change.abs().max())
        rounded = dtype if expected.is_floating_point() else expected.dtype
        if not rounded_alike(expected, loaded[name], rounded, slack):
            wrong.append(f"{part}.{name}: other values")
    return wrong


def _change(layer: Any, leaf: str) -> Tensor:
    """Hu et al. 2021, eq. 3: alpha / rank * B A, summed over the active adapters; of other methods what PEFT says."""
    weight = layer.get_base_layer().weight.detach().cpu()
    total = torch.zeros(weight.shape)
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if layer.use_dora.get(name):
            return _merge(layer, leaf).detach() - weight.float()
        down, up = (half[name].weight.detach().cpu().float() for half in (layer.lora_A, layer.lora_B))
        total += layer.scaling[name] * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return total


def _save_text_config(module: Any, folder: Path, dtype: torch.dtype) -> None:
    """transformers' own saving of a module that carries an adapter would write the adapter alone."""
    config = copy.deepcopy(module.config)
    config.architectures, config.dtype = [type(module).__name__], dtype
    config.save_pretrained(folder)


def _forget_local(file: Path) -> None:
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


def _require_whole(family: Family) -> None:
    optional = family.pipeline._optional_components
    released = [name for name, part in family.pipeline.components.items() if part is None and name not in optional]
    if released:
        raise ValueError(f"{', '.join(released)} was released: call families.restore before writing a whole model")
