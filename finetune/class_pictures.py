"""Class pictures: drawn by the frozen base, seeded, kept and topped up, never drawn twice."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetune import disk, families, home, keys, signals
from finetune.data.encoding import Track
from finetune.families import Family, Source
from finetune.pictures import save_png
from finetune.sampling import everything, sample
from finetune.settings import Prior

BATCH = 4
RECORD = "pictures.json"
log = logging.getLogger(__name__)


def draw(
    family: Family,
    source: Source,
    prompts: Sequence[str],
    settings: Prior,
    seed: int,
    resolution: int,
    track: Track,
) -> list[Path]:
    """`class_images` class pictures, the prompts taking turns: picture i is of prompt i modulo their number. Call it
    before anything trains.

    What is there already is kept; only what is missing is drawn, and what is no longer the picture that was drawn
    (its SHA-256 is recorded) is drawn again, which is said. One process draws at a time, others wait and find it done.
    """
    if any(
        parameter.requires_grad for module in families.modules(family).values() for parameter in module.parameters()
    ):
        raise ValueError("class pictures are the frozen base's: draw them before anything trains")
    origin = _origin(family, source, prompts, settings, seed, resolution)
    folder = home.cache("class-pictures", _name(prompts[0], origin))
    with disk.written(folder), _alone(folder):
        record = _read(folder, origin)
        missing = _missing(folder, record, settings.class_images)
        batches = [missing[start : start + BATCH] for start in range(0, len(missing), BATCH)]
        for batch in track(batches, "class pictures", len(batches)) if batches else ():
            _draw(family, folder, origin, record, batch)
    return [folder / _file(index) for index in range(settings.class_images)]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make the folder, and wait until no other process draws in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=1)
    while not lock.is_locked:
        signals.heed()
        with suppress(Timeout):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _origin(
    family: Family, source: Source, prompts: Sequence[str], settings: Prior, seed: int, resolution: int
) -> dict[str, Any]:
    """All that the pictures follow from."""
    scheduler = family.pipeline.scheduler
    return {
        "base": source.identity(),
        "precision": str(next(families.denoiser(family).parameters()).dtype),
        "scheduler": type(scheduler).__name__,
        "schedule": {name: str(v) for name, v in sorted(scheduler.config.items()) if not name.startswith("_")},
        "prompts": list(prompts),
        "resolution": resolution,
        "steps": settings.class_steps,
        "guidance": settings.class_guidance,
        "seed": seed,
        **source.how(),
    }


def _name(prompt: str, origin: Mapping[str, Any]) -> str:
    """Readable by people, and one folder for each origin."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
    return f"{words or 'class'}-{hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]}"


def _file(index: int) -> str:
    return f"{index:05d}.png"


def _seed(origin: Mapping[str, Any], index: int) -> int:
    """Within 32 bits, so that any tool can draw the picture again."""
    return keys.integer(0, 2**32, origin["seed"], "class picture", index)


def _read(folder: Path, origin: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was drawn: file name -> {seed, sha256}. Empty when there is no readable record."""
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {str(one["file"]): {key: one[key] for key in ("prompt", "seed", "sha256")} for one in table["pictures"]}
    except (ValueError, KeyError, TypeError):
        log.warning("%s: cannot be read; the class pictures are drawn again", path)
        return {}


def _missing(folder: Path, record: Mapping[str, Mapping[str, Any]], count: int) -> list[int]:
    """Indices below `count` that are not there as they were drawn; what was lost or altered is said."""
    missing, other = [], []
    for index in range(count):
        name = _file(index)
        if name not in record:
            missing.append(index)
        elif not (folder / name).is_file() or _digest(folder / name) != record[name]["sha256"]:
            missing.append(index)
            other.append(name)
    if other:
        log.warning("%s: drawn again, because they were altered or removed: %s", folder, ", ".join(other))
    return missing


def _draw(
    family: Family, folder: Path, origin: Mapping[str, Any], record: dict[str, dict[str, Any]], batch: Sequence[int]
) -> None:
    """Draw, write and record the pictures of these indices. An interruption loses this batch at most."""
    seeds = [_seed(origin, index) for index in batch]
    asked = [origin["prompts"][index % len(origin["prompts"])] for index in batch]
    pictures = sample(
        family,
        asked,
        seeds,
        steps=origin["steps"],
        guidance=origin["guidance"],
        size=origin["resolution"],
        batch=len(batch),
        initial=everything(family, origin["resolution"]),
    )
    same = {name: origin[name] for name in ("steps", "guidance", "scheduler")}
    for index, prompt, seed, picture in zip(batch, asked, seeds, pictures, strict=True):
        path = folder / _file(index)
        save_png(picture, path, {**same, "prompt": prompt, "seed": seed})
        record[path.name] = {"prompt": prompt, "seed": seed, "sha256": _digest(path)}
    table = {**origin, "pictures": [{"file": name, **record[name]} for name in sorted(record)]}
    disk.write_text(folder / RECORD, json.dumps(table, indent=1) + "\n")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
