"""Trainers in turn, each in a process of its own under the observer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from finetune import signals
from finetune.bench.trainers import Trainer, Work
from finetune.errors import Failure

WATCHED = Path(__file__).with_name("watched.py")


@dataclass(frozen=True)
class Run:
    """What one training took. Seconds are of the process, or of the GPU where there is one."""

    trainer: str
    step: float
    """Median over the steps after the first"""
    start: float
    """Processor seconds from nothing to the end of the first step, pictures encoded"""
    total: float
    """The same to the end of the last step"""
    whole: float
    """The same to the end of the process, all written"""
    wall: float
    """Of the whole on the clock"""
    peak: int
    """Bytes: the most that was held up to the last step, on the GPU where there is one"""
    before: int
    """Bytes that were held before there was a model, libraries most of all; of a GPU's none"""
    versions: dict[str, str]
    device: str | None


@dataclass(frozen=True)
class Step:
    """What one step of a training does, the draws and what adapters begin with being given."""

    trained: int
    loss: float
    gradients: Path
    kept: int
    """Bytes for the backward pass"""
    computed: int
    """Calls of PyTorch's operators"""


def alternated(pairs: int) -> Iterator[tuple[int, int]]:
    """Which of the two has its turn, and for which pair: A B B A ..."""
    for pair in range(pairs):
        yield from ((which, pair) for which in ((0, 1) if pair % 2 == 0 else (1, 0)))


def run(trainer: Trainer, work: Work, place: Path, threads: int) -> Run:
    """A training as it is."""
    told, used, wall = _observed(trainer, work, place, threads, None)
    steps = told["steps"]
    clock = "device" if "device" in steps[0] else "process"
    return Run(
        trainer=trainer.name,
        step=median(after[clock] - before[clock] for before, after in pairwise(steps)),
        start=steps[0]["process"],
        total=steps[-1]["process"],
        whole=used.ru_utime + used.ru_stime,
        wall=wall,
        peak=told["peak"],
        before=told["before"],
        versions=told["versions"],
        device=told["device"],
    )


def step(trainer: Trainer, work: Work, place: Path, threads: int) -> Step:
    """What its first step learns and its second one does."""
    told, _, _ = _observed(trainer, work, place, threads, work.seed)
    return Step(told["trained"], told["loss"], place / "gradients.npz", told["kept"], told["computed"])


def _observed(
    trainer: Trainer, work: Work, place: Path, threads: int, seed: int | None
) -> tuple[dict[str, Any], Any, float]:
    """The observer's report, what the process used as `os.wait4` tells it, and its seconds on the clock."""
    signals.heed()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    command = trainer.command(work, place)
    plan = {
        "script": str(command.script) if command.script else None,
        "module": command.module,
        "words": command.words,
        "constants": command.constants,
        "steps": work.steps,
        "seed": seed,
        "gradients": str(place / "gradients.npz"),
        "report": str(place / "report.json"),
    }
    (place / "plan.json").write_text(json.dumps(plan, indent=1), encoding="utf-8")
    log, began = place / "log.txt", time.perf_counter()
    with log.open("wb") as file:
        words = [command.python or sys.executable, str(WATCHED), str(place / "plan.json")]
        where = command.script.parent if command.script else None
        child = subprocess.Popen(words, stdout=file, stderr=file, env=_environment(place, threads), cwd=where)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    told = json.loads((place / "report.json").read_text()) if (place / "report.json").exists() else {"steps": ()}
    if child.returncode or len(told["steps"]) != work.steps:
        signals.heed()  # which may have ended it too
        ended = f"ended with status {child.returncode} after {len(told['steps'])} of {work.steps} steps"
        raise Failure(f"{trainer.name}: {ended}. What it said last (all of it is in {log}):", _last(log))
    return told, used, time.perf_counter() - began


def _environment(place: Path, threads: int) -> dict[str, str]:
    """Nothing kept from run to run, nothing from the network, so many threads."""
    own = {"FINETUNE_CACHE": place / "cache", "HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": threads}
    return {**os.environ, **{name: str(value) for name, value in own.items()}}


def _last(log: Path, lines: int = 5) -> Sequence[str]:
    return log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:]
