"""A base model without its weights: every part by its configuration, inside `tracking.imagined`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from finetune import families, offload
from finetune.errors import Fault
from finetune.families import Family, Source
from finetune.families.source import _hub_faults, without
from finetune.planning import codes
from finetune.quiet import quiet

TOLD = ["*.json", "*.txt", "*.model"]
"""What of a model on the hub is had for it: configurations and tokenizers"""


def folder(source: Source) -> Path:
    """A diffusers folder with the model's configuration; of one on the hub all but the weights is downloaded.

    Raises Fault where there is none: a single file says too little of itself.
    """
    if source.file is not None:
        if source.model_config is None:
            raise Fault(
                f"{source.model}: a plan is made of a model's configuration, which a single file does not hold. Name a "
                "diffusers model of the same kind: --model-config FOLDER."
            )
        return folder(Source(source.model_config))
    if source.folder is not None:
        return source.folder
    with _hub_faults(source):
        return Path(snapshot_download(source.model, revision=source.revision, allow_patterns=TOLD))


def family(source: Source, dtype: torch.dtype, cpu: bool = True) -> Family:
    """As `families.load` has it: frozen, the VAE in float32. `cpu`: as its layers are computed there."""
    root = folder(source)
    families.known(source.pipeline_class())
    index = json.loads((root / "model_index.json").read_text())
    with quiet():
        parts = {name: part(root / name, *made) for name, made in index.items() if _is_module(made)}
        for name, module in parts.items():
            nn.Module.to(module, torch.float32 if name == "vae" else dtype)  # diffusers' own warns of rounding
        given = {**without(root), **parts}
        pipeline = DiffusionPipeline.from_pretrained(root, local_files_only=True, **given)
    pipeline.set_progress_bar_config(disable=True)
    made = families.wrap(pipeline)
    families._set_reading(made, source)
    if source.quantize:
        codes.quantize(made, source.quantize, cpu)
    if source.offload_blocks:
        offload.put_on(families.denoiser(made), families.blocks(made), "cpu")
    if source.cache_kv:
        offload.rest(families.keys_values(made), "cpu")
    families.freeze(made)
    return made


def part(root: Path, library: str, name: str) -> nn.Module:
    """A part by its configuration. The numbers in it are none."""
    kind: Any = getattr(importlib.import_module(library), name)
    if library == "transformers":
        config = kind.config_class.from_pretrained(root, local_files_only=True)
        module: nn.Module = kind(config)
        return module
    module = kind.from_config(kind.load_config(root))
    return module


def _is_module(made: Any) -> bool:
    library, name = made if isinstance(made, list) else (None, None)
    if library not in ("diffusers", "transformers") or name is None:
        return False
    return issubclass(getattr(importlib.import_module(library), name), nn.Module)
