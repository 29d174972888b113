"""Whether two trainers do the same work: without that no ratio is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.bench.measuring import Step

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Of the loss and of the gradients, relative"""


@dataclass(frozen=True)
class Equal:
    """One step of two trainers from the same weights, pictures, noise and timesteps."""

    trained: tuple[int, int]
    """Numbers of each"""
    loss: float
    """|a - b| / |b|"""
    gradient: float
    """|a - b| / |b| over all parameters; infinite where they are not the same"""
    tolerance: float

    @property
    def holds(self) -> bool:
        same = self.trained[0] == self.trained[1]
        return same and self.loss <= self.tolerance and self.gradient <= self.tolerance

    def said(self) -> str:
        mine, other = self.trained
        trained = f"{mine:,} trained parameters" if mine == other else f"{mine:,} and {other:,} trained parameters"
        errors = f"loss apart by {self.loss:.1e}, gradients by {self.gradient:.1e}"
        return f"{trained}, {errors} (at most {self.tolerance:g})"


def compare(mine: Step, other: Step, precision: str) -> Equal:
    loss = abs(mine.loss - other.loss) / abs(other.loss)
    error = _apart(mine.gradients, other.gradients)
    return Equal((mine.trained, other.trained), loss, error, TOLERANCE[precision])


def _apart(mine: Path, other: Path) -> float:
    with np.load(mine) as ours, np.load(other) as theirs:
        if set(ours.files) != set(theirs.files) or any(ours[name].shape != theirs[name].shape for name in ours.files):
            return math.inf
        error = sum(float(np.square(ours[name] - theirs[name], dtype=np.float64).sum()) for name in ours.files)
        size = sum(float(np.square(theirs[name], dtype=np.float64).sum()) for name in theirs.files)
    return math.sqrt(error / size) if size else math.inf
