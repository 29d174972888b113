"""python in_turn.py FOLDER STEP WORDS ...: train whole, and again but stopped within a step and gone on with.

For torchrun: one start of the processes serves three commands. The last process is the one that gets the signal.
"""

from __future__ import annotations

import sys
from pathlib import Path

import stopping
from accelerate import PartialState

from finetune import cli, errors, loop


def command(*words: str) -> int:
    """Its exit status."""
    try:
        cli.main(["train", *words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def keep_the_group() -> None:
    """A training ends it, and a process can have it only once."""
    PartialState.destroy_process_group = lambda *given: None


def main(folder: Path, step: int, words: list[str]) -> None:
    keep_the_group()
    whole, stopped = str(folder / "whole"), str(folder / "stopped")
    assert command(*words, "--output", whole) == 0
    loop.Training._step = stopping.at(step)  # type: ignore[method-assign]
    assert command(*words, "--output", stopped) == errors.STOPPED
    loop.Training._step = stopping.take  # type: ignore[method-assign]
    assert command("--output", stopped, "--resume") == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
