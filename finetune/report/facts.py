"""What a run's folder says, while the run may be writing to it: what is missing or half written is said, not raised."""

from __future__ import annotations

import json
import math
import re
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from finetune import ledger
from finetune.errors import Fault
from finetune.evaluation import tables
from finetune.evaluation.tables import Table, Verdict
from finetune.report import record
from finetune.report.record import Record

SAMPLES = "samples"
LISTED = 60
"""Files of a folder that are listed one by one"""


@dataclass(frozen=True)
class Log:
    """Curves by step; only finite numbers."""

    loss: Sequence[tuple[int, float]] = ()
    validation: Sequence[tuple[int, float]] = ()
    rate: Sequence[tuple[int, float]] = ()
    seconds: float = 0.0
    """That all steps took"""
    last: float = 0.0
    """Mean of the last steps, in seconds"""
    not_finite: Sequence[int] = ()
    """Steps whose loss was none"""


@dataclass(frozen=True)
class Sample:
    """A picture that was drawn on the way."""

    step: int
    number: int
    path: Path


@dataclass(frozen=True)
class File:
    """A file of the run, or a folder of it with all that is in it."""

    name: str
    size: int
    count: int | None = None
    """Files in a folder"""


@dataclass(frozen=True)
class Facts:
    folder: Path
    name: str
    state: str
    """running, stopped, interrupted, failed, finished or unknown"""
    step: int
    steps: int
    settings: Mapping[str, Any]
    log: Log
    data: Record = field(default_factory=Record)
    samples: Sequence[Sample] = ()
    table: Table | None = None
    verdict: Verdict | None = None
    drawn: Path | None = None
    """Where the table's pictures are, a folder for each state"""
    files: Sequence[File] = ()
    notes: Sequence[str] = ()
    """What could not be read"""
    updated: float = field(default_factory=time.time)

    def setting(self, table: str, name: str) -> Any:
        """As settings.toml has it; None where it does not say."""
        group = self.settings.get(table)
        return group.get(name) if isinstance(group, Mapping) else None


def read(run: Path) -> Facts:
    """Raises Fault for a folder that is no run."""
    if not run.is_dir():
        raise Fault(f"{run}: there is no such folder. Name a run's folder, the --output of a training.")
    if not (run / ledger.SETTINGS).is_file() and not (run / ledger.FILE).is_file():
        raise Fault(
            f"{run}: no run: it has neither {ledger.SETTINGS} nor {ledger.FILE}. Name the --output of a training."
        )
    notes: list[str] = []
    settings, log = _settings(run, notes), _log(run / ledger.LOG, notes)
    entry = _entry(run)
    if entry is None:
        notes.append(f"{ledger.FILE} is missing or cannot be read: how far the run is, follows from its log.")
    done = max([entry.step if entry else 0, *(step for step, _ in log.loss[-1:])])
    table, verdict, drawn = _table(run, notes)
    return Facts(
        folder=run,
        name=run.resolve().name,
        state=entry.state if entry else "unknown",
        step=done,
        steps=entry.steps if entry else _whole((settings.get("train") or {}).get("steps")),
        settings=settings,
        log=log,
        data=record.read(run),
        samples=_samples(run / SAMPLES),
        table=table,
        verdict=verdict,
        drawn=drawn,
        files=_files(run),
        notes=notes,
    )


def version(run: Path) -> str:
    """Changes whenever something changes that the report tells."""
    told = [ledger.FILE, ledger.LOG, ledger.SETTINGS, record.FILE, SAMPLES, "best", "model"]
    told += [path.name for path in sorted(run.glob("*.safetensors"))]
    told += [f"{folder}/{tables.FILE}" for folder in tables.FOLDERS]
    entry = _entry(run)
    return "-".join([entry.state if entry else "unknown", *(_stamp(run / name) for name in told)])


def _stamp(path: Path) -> str:
    try:
        return f"{path.stat().st_mtime_ns:x}"
    except OSError:
        return "0"


def _entry(run: Path) -> ledger.Entry | None:
    try:
        return ledger.seen(run)
    except OSError:  # a folder that may only be read cannot be asked whether it is held
        return ledger.read(run)


def _settings(run: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        return tomllib.loads((run / ledger.SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{ledger.SETTINGS} cannot be read: {_said(error)}")
        return {}


def _log(file: Path, notes: list[str]) -> Log:
    """The last line may be half written; others that cannot be read are said."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return Log()
    except OSError as error:
        notes.append(f"{ledger.LOG} cannot be read: {_said(error)}")
        return Log()
    read = [_line(line) for line in lines]
    if broken := sum(line is None for line in read[:-1]):
        notes.append(f"{broken} of {len(lines)} lines of {ledger.LOG} cannot be read and are left out.")
    by_step = {int(line["step"]): line for line in read if line is not None}
    told = [by_step[step] for step in sorted(by_step)]
    seconds = [value for _, value in _curve(told, "seconds")]
    return Log(
        _curve(told, "loss"),
        _curve(told, "validation"),
        _curve(told, "lr"),
        sum(seconds),
        sum(seconds[-20:]) / max(1, len(seconds[-20:])),
        [int(line["step"]) for line in told if not _is_number(line.get("loss"))],
    )


def _line(text: str) -> dict[str, Any] | None:
    try:
        told = json.loads(text)
    except ValueError:
        return None
    return told if isinstance(told, dict) and isinstance(told.get("step"), int) else None


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(int(line["step"]), float(line[name])) for line in lines if _is_number(line.get(name))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _table(run: Path, notes: list[str]) -> tuple[Table | None, Verdict | None, Path | None]:
    for folder in tables.FOLDERS:
        file = run / folder / tables.FILE
        try:
            text = file.read_text(encoding="utf-8")
            return tables.from_json(text), _verdict(json.loads(text).get("verdict")), file.parent
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{folder}/{tables.FILE} cannot be read: {_said(error)}")
    return None, None, None


def _verdict(told: Any) -> Verdict | None:
    """None where nothing was judged."""
    return Verdict(*(str(told.get(one.name) or "") for one in fields(Verdict))) if isinstance(told, Mapping) else None


def _samples(folder: Path) -> list[Sample]:
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return []
    named = [(re.fullmatch(r"step-(\d+)-(\d+)\.png", path.name), path) for path in found]
    return [Sample(int(match[1]), int(match[2]), path) for match, path in named if match]


def _files(run: Path) -> list[File]:
    """What lies in the run's folder, folders as one, without what is on its way or nobody's product."""
    found = []
    for path in sorted(run.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.name.startswith("."):
            continue
        try:
            if path.is_dir():
                sizes = [one.stat().st_size for one in path.rglob("*") if one.is_file()]
                found.append(File(f"{path.name}/", sum(sizes), len(sizes)))
            else:
                found.append(File(path.name, path.stat().st_size))
        except OSError:  # gone meanwhile
            continue
    return found[:LISTED]


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _said(error: Exception) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
