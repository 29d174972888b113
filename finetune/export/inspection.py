"""What a weight file or folder is, as far as it can be told: adapters, checkpoints, embeddings, diffusers folders.

Nothing is believed of foreign files: what cannot be understood is said, not raised, but for files that are not whole.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune import families, weights
from finetune.errors import Fault
from finetune.export import formats, hashes
from finetune.export import metadata as headers
from finetune.export.change import MAGNITUDE
from finetune.export.content import Adapter, File, Layer
from finetune.families import Source

PARTS = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.": "text_encoder",
    "conditioner.embedders.1.": "text_encoder_2",
}
"""How the names of whole checkpoints begin"""
EMBEDDINGS = {"emb_params", "clip_l", "clip_g", "string_to_param", "t5xxl"}
BLOCK = re.compile(r"(?:down_blocks|up_blocks)\.\d+|mid_block|[^.]+")
SHORT = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}


def inspect(path: Path) -> dict[str, Any]:
    """Plain values by name, which keep their names: see `finetune.commands.inspect`. Raises Fault for broken files."""
    if path.is_dir():
        return _folder(path)
    file = File(path)
    try:
        told = _adapter(file)
    except Fault as fault:
        told = _no_adapter(file, fault)
    said = file.metadata
    own = headers.own(said)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        **told,
        "tensors": len(file.shapes),
        "precisions": _precisions(dtype for name, dtype in file.dtypes.items() if file.shapes[name]),
        "base": said.get("ss_sd_model_name") or own.get("model"),
        "base_version": said.get("ss_base_model_version"),
        "title": said.get("modelspec.title") or said.get("ss_output_name"),
        "trigger": said.get("modelspec.trigger_phrase") or own.get("trigger") or own.get("prompt"),
        "words": _words(own),
        "settings": own,
        "metadata": {name: value for name, value in sorted(said.items()) if name != headers.OWN},
        "hashes": [{"name": one.name, "told": one.told, "found": one.found, "holds": one.holds}
                   for one in hashes.claims(path)],
    }  # fmt: skip


def _adapter(file: File) -> dict[str, Any]:
    """Raises Fault for what is no adapter, or not a whole one."""
    form = formats.format_of(file.path, file.shapes)
    adapter = formats.read(file.path)
    family = families.known(adapter.family).title if adapter.family else None
    ranks = Counter(layer.rank for layer in adapter if layer.rank)
    alphas = Counter(None if layer.alpha is None else round(layer.alpha, 6) for layer in adapter if layer.rank)
    kinds = Counter(layer.title + (" with DoRA" if MAGNITUDE in layer.shapes else "") for layer in adapter)
    return {
        "what": "adapter",
        "format": form,
        "family": family,
        "kinds": dict(kinds.most_common()),
        "layers": len(adapter.layers),
        "parts": dict(Counter(layer.part for layer in adapter)),
        "ranks": [{"rank": rank, "layers": count} for rank, count in sorted(ranks.items())],
        "alphas": [{"alpha": alpha, "layers": count} for alpha, count in alphas.most_common()],
        "norms": _norms(adapter),
        "problems": [],
    }


def _norms(adapter: Adapter) -> list[dict[str, Any]]:
    """Frobenius norm of the change to each block, all of its layers together; none where it needs the base."""
    squares: dict[str, list[float | None]] = {}
    for layer in adapter:
        found = BLOCK.match(layer.path)
        block = layer.part if layer.part.startswith("text") else f"{layer.part}.{found[0] if found else layer.path}"
        squares.setdefault(block, []).append(None if layer.acts else _square(layer))
    return [
        {"block": block, "layers": len(sizes), "norm": None if None in sizes else sum(filter(None, sizes)) ** 0.5}
        for block, sizes in squares.items()
    ]


def _words(own: Mapping[str, Any]) -> list[str]:
    """The new words that a file was trained with: it goes with their embeddings, or is one."""
    word = own.get("word") if "vectors" in own else None
    return [word] if isinstance(word, str) else list(word or ())


def _square(layer: Layer) -> float:
    """||change||^2; of B A it is tr(B'B AA'), two small products instead of a large one."""
    if set(layer.shapes) != {"lora_down.weight", "lora_up.weight"}:
        return float(layer.change().square().sum())
    down, up = (layer.load(f"lora_{way}.weight").float().flatten(1) for way in ("down", "up"))
    return layer.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())


def _no_adapter(file: File, fault: Fault) -> dict[str, Any]:
    """A whole checkpoint, an embedding, one part of a diffusers model, a broken adapter, or something else."""
    names = set(file.shapes)
    parts = Counter(next((part for start, part in PARTS.items() if name.startswith(start)), "other") for name in names)
    told: dict[str, Any] = {"what": "unknown", "format": None, "family": None, "parts": {}, "problems": []}
    if "unet" in parts:
        return told | {"what": "checkpoint", "format": "single-file", "family": _of_checkpoint(file.path),
                       "parts": _numbers(file, parts)}  # fmt: skip
    if names & EMBEDDINGS or (len(names) == 1 and len(next(iter(file.shapes.values()))) <= 2):
        vectors = {name: file.shapes[name][0] if len(file.shapes[name]) > 1 else 1 for name in sorted(names)}
        return told | {"what": "textual inversion", "parts": vectors}
    if {"conv_in.weight", "conv_out.weight"} <= names or "encoder.conv_in.weight" in names:
        return told | {"what": "part of a diffusers model", "format": "diffusers"}
    try:
        told["format"] = formats.format_of(file.path, names)
        told["what"] = "adapter"
        return told | {"problems": fault.details or [fault.message]}
    except Fault:
        return told | {"problems": [fault.message.removeprefix(f"{file.path}: ")]}


def _numbers(file: File, parts: Iterable[str]) -> dict[str, int]:
    """Numbers that each part of a checkpoint holds."""
    counted = dict.fromkeys(sorted(parts), 0)
    for name, shape in file.shapes.items():
        part = next((part for start, part in PARTS.items() if name.startswith(start)), "other")
        size = 1
        for side in shape:
            size *= side
        counted[part] += size
    return counted


def _of_checkpoint(path: Path) -> str | None:
    try:
        return families.known(Source(str(path)).pipeline_class()).title
    except Fault:
        return None


def _folder(path: Path) -> dict[str, Any]:
    """A diffusers model. Raises Fault for a folder that is none, or whose weights are not whole."""
    weights.check_folder(path)
    source = Source(str(path))
    name = source.pipeline_class()
    files = sorted(path.rglob(f"*{weights.SUFFIX}"))
    parts: dict[str, int] = {}
    precisions: Counter[str] = Counter()
    metadata: dict[str, str] = {}
    for one in files:
        entries, said, start = weights.read_header(one)
        part = one.parent.relative_to(path).as_posix()
        parts[part] = parts.get(part, 0) + one.stat().st_size - start
        precisions.update(entry["dtype"] for entry in entries.values())
        metadata |= {f"{one.relative_to(path).as_posix()}: {key}": value for key, value in said.items()}
    known = families.KNOWN.get(name)
    return {
        "file": str(path),
        "bytes": sum(one.stat().st_size for one in files),
        "what": "model",
        "format": "diffusers folder",
        "family": known.title if known else name,
        "parts": parts,
        "problems": [],
        "tensors": sum(precisions.values()),
        "precisions": _precisions(precisions.elements()),
        "scheduler": _scheduler(path),
        "metadata": metadata,
    }


def _scheduler(path: Path) -> Mapping[str, Any]:
    """What the model predicts, and with which steps it is drawn."""
    try:
        told = json.loads((path / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        return {"class": told.get("_class_name"), "prediction": told.get("prediction_type", "epsilon")}
    except (OSError, ValueError, AttributeError):
        return {}


def _precisions(dtypes: Iterable[str]) -> dict[str, int]:
    """Tensors of each precision, the commonest first."""
    return {SHORT.get(name, name): count for name, count in Counter(dtypes).most_common()}
