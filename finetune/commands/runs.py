"""finetune runs DIR: the runs in a folder, and how far each is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from finetune import ledger
from finetune.errors import Fault


@dataclass(frozen=True)
class Config:
    """List the runs in a folder and below it: their recipe, how far they are, what measuring said, where they measured
    themselves, and how to go on with those that can."""

    folder: Positional[Path] = Path()
    """Where to look."""


def main(config: Config) -> None:
    if not config.folder.is_dir():
        raise Fault(f"{config.folder}: there is no such folder.")
    found = list(ledger.below(config.folder))
    if not found:
        print(f"{config.folder}: no runs there.")
        return
    rows = [
        (str(folder), entry.recipe, entry.state, f"{entry.step}/{entry.steps}",
         time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.updated)), _judged(entry))
        for folder, entry in found
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if any(entry.state in ("stopped", "interrupted", "failed") for _, entry in found):
        print("\nGo on with one: finetune train --output FOLDER --resume")


def _judged(entry: ledger.Entry) -> str:
    """What measuring said of it."""
    return f"{entry.verdict}, best: step {entry.best}" if entry.verdict else ""
