"""What a run's folder says of the run: `run.json`, and a lock that is held while it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetune import disk
from finetune.errors import Fault

FILE, LOCK, SETTINGS, LOG = "run.json", ".lock", "settings.toml", "log.jsonl"


@dataclass(frozen=True)
class Entry:
    """How far a run is."""

    recipe: str
    steps: int
    """To be taken in all"""
    state: str = "running"
    """running, stopped, failed or finished. A run that was killed still says running: `seen` knows better."""
    step: int = 0
    """Steps done when this was written"""
    identity: dict[str, str] = field(default_factory=dict)
    """What the training follows from besides its settings: hashes of the base and of the data"""
    updated: float = 0.0
    """Seconds since 1970"""
    best: int | None = None
    """Steps of the best state, where the run measured itself"""
    verdict: str = ""
    """On the last state that was measured: under-trained, good, over-trained or unknown"""
    reason: str = ""
    """The verdict in words"""


def write(folder: Path, entry: Entry, **changes: Any) -> Entry:
    """Write the entry with the changes."""
    entry = replace(entry, **changes, updated=time.time())
    disk.write_text(folder / FILE, json.dumps(asdict(entry), indent=1) + "\n")
    return entry


def read(folder: Path) -> Entry | None:
    """The entry as it was written; None where there is none that can be read."""
    try:
        return Entry(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def seen(folder: Path) -> Entry | None:
    """The entry; `interrupted` is the state of a run that says it runs while no process holds its lock."""
    entry = read(folder)
    if entry is None or entry.state != "running":
        return entry
    try:
        with FileLock(folder / LOCK, timeout=0):
            return replace(entry, state="interrupted")
    except Timeout:
        return entry


def hold(folder: Path) -> FileLock:
    """The folder's lock, held until the process ends. Raises Fault when another process has it."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise Fault(f"{folder}: another process is training there. Wait for it, or name another --output.") from None
    except OSError as error:
        raise Fault(f"{folder}: cannot be written to ({error.strerror}). Name another --output.") from error
    return lock


def logged(folder: Path) -> list[dict[str, Any]]:
    """The steps that the run's log tells of; empty without one. A line that was not written whole is left out."""
    file = folder / LOG
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def below(folder: Path) -> Iterator[tuple[Path, Entry]]:
    """The runs in a folder: itself, and those in its sub-folders."""
    for file in sorted(folder.rglob(FILE)):
        if (entry := seen(file.parent)) is not None:
            yield file.parent, entry


def changes(before: Mapping[str, Any], now: Mapping[str, Any], ignored: frozenset[str]) -> list[str]:
    """Lines that say which settings differ: `[optim] lr: 0.0001, now 0.0002`."""
    lines = []
    for group in dict.fromkeys([*before, *now]):
        one, other = before.get(group), now.get(group)
        if isinstance(one, Mapping) or isinstance(other, Mapping):
            inner = changes(one or {}, other or {}, ignored)
            lines += [f"[{group}] {line}" for line in inner]
        elif one != other and group not in ignored:
            lines.append(f"{group}: {one}, now {other}")
    return lines


def settings_of(folder: Path) -> Path:
    """The settings that the run in a folder was begun with. Raises Fault where there is none."""
    file = folder / SETTINGS
    if not file.is_file():
        raise Fault(f"{folder}: --resume, but there is no run there to go on with. Without --resume a new one begins.")
    return file
