"""What can be told of a base model at once, from its configuration on this machine: no weights, no network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.settings import Model

EMBEDDED = "toybox"


@dataclass(frozen=True)
class Glance:
    """A base model from outside."""

    resolution: int
    """Side in pixels that it was made for"""
    multiple: int
    """What the sides of its pictures must be multiples of"""
    tokenizers: tuple[Any, ...]
    """Those of its text encoders, of transformers' classes"""


def glance(settings: Model) -> Glance | None:
    """None where this machine does not know: a hub model that is not downloaded, a checkpoint without --model-config.

    What is wrong with a model is said where it is loaded, not here.
    """
    files = _files(settings)
    denoiser, vae = (_json(files, part) for part in ("unet/config.json", "vae/config.json"))
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        side, levels = int(denoiser["sample_size"]), len(denoiser["down_block_types"])
    except (KeyError, TypeError, ValueError):
        return None
    found = (_tokenizer(files, name) for name in ("tokenizer", "tokenizer_2"))
    return Glance(side * factor, factor * 2 ** (levels - 1), tuple(one for one in found if one is not None))


def _files(settings: Model) -> Path | Model:
    """The model's folder here, or its name at the hub, whose local cache is looked into."""
    if settings.model == EMBEDDED:
        from finetune import toybox

        return toybox.path()
    name = settings.model_config if settings.model.endswith(".safetensors") else settings.model
    if name is None:
        return Path("/nonexistent")
    folder = Path(name)
    return folder if folder.is_dir() else Model(name, settings.revision if name == settings.model else None)


def _find(files: Path | Model, name: str) -> Path | None:
    if isinstance(files, Path):
        return files / name if (files / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(files.model, name, revision=files.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _json(files: Path | Model, name: str) -> dict[str, Any]:
    path = _find(files, name)
    try:
        read = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _tokenizer(files: Path | Model, name: str) -> Any:
    path = _find(files, f"{name}/tokenizer_config.json")
    if path is None:
        return None
    import transformers

    kind = str(_json(files, f"{name}/tokenizer_config.json").get("tokenizer_class", "CLIPTokenizer"))
    try:  # not AutoTokenizer, which imports torch
        return getattr(transformers, kind).from_pretrained(path.parent, local_files_only=True)
    except Exception:  # whatever it is, loading the model will say it
        return None
