"""A training's state on disk: written beside, synced, renamed, its manifest last; the old one goes last of all.

`checkpoints/step-000100/` holds `state.safetensors`, `state.json` and `manifest.json`, which tells size and SHA-256 of
the others: without it, or where it does not hold, a checkpoint is none. Nothing in it executes when it is loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune import disk
from finetune.errors import Failure, Fault

FOLDER = "checkpoints"
TENSORS, FACTS, MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT = 1
MARGIN = 16_000_000
"""Bytes that stay free on the disk."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole state: a tree of dictionaries, lists, numbers, texts and tensors."""

    step: int
    """Steps done"""
    state: dict[str, Any]


def save(run: Path, checkpoint: Checkpoint, keep_last: int = 2, keep_every: int = 0, best: int | None = None) -> Path:
    """Write a checkpoint of the run, then remove those that are neither among the last ones nor to be kept.

    `best`: the step of one that stays whatever its age. One of this step that is whole already stays as it is. Raises
    Failure when it cannot be written; the checkpoints that are there are not touched then.
    """
    target = run / name(checkpoint.step)
    if not is_whole(target):
        tensors, tree = pack(checkpoint.state)
        beside = target.with_name(f".{target.name}.writing")
        try:
            _write(beside, tensors, {"format": FORMAT, "step": checkpoint.step, "state": tree})
            if target.exists():  # broken: set aside, never removed
                os.replace(target, _free(target))
            os.replace(beside, target)
            _sync(target.parent)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(beside, ignore_errors=True)
            why = disk.refusal(error) or error
            raise Failure(
                f"{target}: the checkpoint could not be written ({why}); earlier ones are as they were. Make room, "
                "then go on with --resume."
            ) from error
    _thin(run, keep_last, keep_every, best)
    return target


def name(step: int) -> str:
    """Where in a run's folder a checkpoint is."""
    return f"{FOLDER}/step-{step:06d}"


def steps(run: Path) -> list[int]:
    """The steps of the run's checkpoints that say that they are whole."""
    return [_step(path) for path in _all(run) if (path / MANIFEST).is_file()]


def newest(run: Path) -> tuple[Checkpoint | None, list[Path]]:
    """The newest checkpoint that is whole, and the broken ones that are newer. None is removed."""
    broken: list[Path] = []
    for path in reversed(_all(run)):
        if is_whole(path):
            return load(path), broken
        broken.append(path)
    return None, broken


def load(path: Path) -> Checkpoint:
    """Raises Fault for a checkpoint that is of another format."""
    facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
    if facts["format"] != FORMAT:
        raise Fault(f"{path}: a checkpoint of format {facts['format']}; this version reads format {FORMAT}.")
    return Checkpoint(facts["step"], unpack(facts["state"], load_file(path / TENSORS)))


def is_whole(path: Path) -> bool:
    """Whether the manifest is there and holds."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return {TENSORS, FACTS} == set(manifest) and all(_entry(path / name) == told for name, told in manifest.items())
    except (OSError, ValueError):
        return False


def identity(path: Path) -> str:
    """A name for exactly this state."""
    return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()


def pack(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """A tree as named tensors and as what JSON holds. Numbers keep every bit, keys that are no texts their type."""
    tensors: dict[str, Tensor] = {}

    def told(part: Any, name: str) -> Any:
        if isinstance(part, Tensor):
            tensors[name] = part.detach().cpu().contiguous().clone()  # parts that share memory are written twice
            return {"tensor": name}
        if isinstance(part, Mapping):
            return {"pairs": [[key, told(value, f"{name}/{key}")] for key, value in part.items()]}
        if isinstance(part, list | tuple):
            kind = "list" if isinstance(part, list) else "tuple"
            return {kind: [told(value, f"{name}/{number}") for number, value in enumerate(part)]}
        if part is None or isinstance(part, bool | int | float | str):
            return part
        raise TypeError(f"{name}: a {type(part).__name__} cannot be kept in a checkpoint")

    return tensors, told(tree, "state")


def unpack(told: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that was packed."""
    match told:
        case {"tensor": name}:
            return tensors[name]
        case {"pairs": pairs}:
            return {key: unpack(value, tensors) for key, value in pairs}
        case {"list": parts}:
            return [unpack(part, tensors) for part in parts]
        case {"tuple": parts}:
            return tuple(unpack(part, tensors) for part in parts)
    return told


def _write(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + MARGIN
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save_file(tensors or {"nothing": torch.zeros(0)}, folder / TENSORS)
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    for name in (TENSORS, FACTS):
        _sync(folder / name)
    manifest = {name: _entry(folder / name) for name in (TENSORS, FACTS)}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _all(run: Path) -> list[Path]:
    """The run's checkpoints, whole or not, by step."""
    found = (run / FOLDER).iterdir() if (run / FOLDER).is_dir() else iter(())
    return sorted(path for path in found if re.fullmatch(r"step-\d+", path.name))


def _free(target: Path) -> Path:
    """A name beside `target` that nothing has."""
    names: Iterator[Path] = (target.with_name(f"{target.name}.broken-{number}") for number in range(1, 10_000))
    return next(name for name in names if not name.exists())


def _step(path: Path) -> int:
    return int(path.name.partition("-")[2])


def _thin(run: Path, keep_last: int, keep_every: int, best: int | None) -> None:
    """Remove the older whole ones, and what a kill left half removed. Broken ones stay, for whoever wants to look."""
    for half in (run / FOLDER).glob(".step-*.leaving"):
        shutil.rmtree(half, ignore_errors=True)
    whole = [path for path in _all(run) if (path / MANIFEST).is_file()]
    for path in whole[: max(0, len(whole) - max(1, keep_last))]:
        step = _step(path)
        if step != best and not (keep_every and step % keep_every == 0):
            leaving = path.with_name(f".{path.name}.leaving")
            os.replace(path, leaving)  # a kill half-way leaves no half checkpoint under its name
            shutil.rmtree(leaving)
