"""What is found where the pictures lie, before anything is decoded or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from finetune.data.reading.pictures import printable
from finetune.errors import Fault

Code = Literal["place", "picture", "caption file", "no caption", "table", "mask", "source", "skip", "setting"]
"""Kinds of problems: the folder or data set itself; a picture that cannot be read; a caption file; a picture without a
caption; metadata.jsonl / .csv or columns; a mask; a --skip of nothing; a setting that does not fit the pictures."""


@dataclass(frozen=True)
class Problem:
    """One thing that keeps the training from starting."""

    code: Code
    text: str
    """Names the file, the reason, and mostly what to do; without a full stop"""
    files: tuple[str, ...] = ()
    """What the user calls the pictures or files concerned"""
    concept: int = 0


@dataclass(frozen=True)
class Picture:
    """One picture with what belongs to it."""

    path: Path
    name: str
    """What the user calls it: the file's name below the folder, or "row 17"."""
    captions: tuple[str, ...] = ()
    """Its own, each on one line"""
    lack: str = ""
    """Said when it has none: where it would be."""
    weight: float = 1.0
    repeats: int = 1
    focus: tuple[float, float] | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Found:
    """The pictures of one folder or data set, and what is wrong there."""

    pictures: list[Picture] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def one_line(text: str) -> str:
    return " ".join(text.split())


def listed(names: Sequence[str], most: int = 4) -> str:
    """ "a, b and c", the first few of many."""
    shown = [printable(name) for name in names[:most]] + (["others"] if len(names) > most else [])
    return " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)


def not_utf8(name: str, raw: bytes, error: UnicodeDecodeError, quoted: str) -> Fault:
    """The fault of a text file that is not UTF-8: the place, and how to mend it. `quoted`: its name for a shell."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding, what = "UTF-16", "UTF-16"
    else:
        encoding, what = "WINDOWS-1252", f"byte 0x{raw[error.start]:02x} at offset {error.start}"
    fix = f"`iconv -f {encoding} -t UTF-8 {quoted} > fixed.txt`"
    return Fault(f"{name}: not UTF-8 ({what}). Save it as UTF-8, e.g. {fix}")
