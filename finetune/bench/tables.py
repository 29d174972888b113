"""What was measured, as a table and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from finetune import engine, provenance
from finetune.bench.equal import Equal
from finetune.bench.measuring import Run, Step

MIB = 2**20


@dataclass(frozen=True)
class Measure:
    """A row: what is compared, each side as text, and how many times the other's is ours."""

    name: str
    value: Callable[[Run], float]
    how: str
    """Format of a value in its unit"""
    unit: float = 1


MEASURES = (
    Measure("seconds a step", lambda run: run.step, "{:.3f} s"),
    Measure("start-up, to the end of the first step", lambda run: run.start, "{:.1f} s"),
    Measure("total to the end of the last step", lambda run: run.total, "{:.1f} s"),
    Measure("total with all written", lambda run: run.whole, "{:.1f} s"),
    Measure("peak memory", lambda run: run.peak, "{:,.0f} MiB", MIB),
)


@dataclass(frozen=True)
class Result:
    """Two trainers beside each other: ours first."""

    names: tuple[str, str]
    settings: Mapping[str, Any]
    equal: Equal
    did: tuple[Step, Step]
    runs: tuple[Sequence[Run], Sequence[Run]]
    """The runs of each, pair by pair; none where the work is not equal"""


def markdown(result: Result) -> str:
    """One row a measure: medians, and the median of the paired ratios with their range."""
    lines = [["", *result.names, f"{result.names[0]} / {result.names[1]}"], ["---"] * 4]
    pairs = list(zip(*result.runs, strict=True))
    for measure in MEASURES if pairs else ():
        sides = [median(map(measure.value, runs)) / measure.unit for runs in result.runs]
        ratios = [measure.value(mine) / measure.value(other) for mine, other in pairs]
        lines.append([measure.name, *(measure.how.format(side) for side in sides), _spread(ratios)])
    if pairs:
        mine, other = result.did
        kept = [f"{step.kept / MIB:.1f} MiB" for step in result.did]
        lines.append(["kept for the backward pass", *kept, f"{mine.kept / other.kept:.2f}"])
        computed = [f"{step.computed:,}" for step in result.did]
        lines.append(["computations of a step", *computed, f"{mine.computed / other.computed:.2f}"])
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines) if pairs else ""
    said = "the same work" if result.equal.holds else "not the same work, so no ratio is told"
    return f"{table}\n{said}: {result.equal.said()}\n"


def record(result: Result) -> dict[str, Any]:
    """All of it, for a file."""
    runs = [{name: value for name, value in vars(run).items() if name != "versions"} for run in _every(result)]
    did = [{name: value for name, value in vars(step).items() if name != "gradients"} for step in result.did]
    versions = {run.trainer: run.versions for run in _every(result)}
    return {
        "trainers": result.names,
        "settings": dict(result.settings),
        "equal": {**vars(result.equal), "holds": result.equal.holds},
        "steps": dict(zip(result.names, did, strict=True)),
        "runs": runs,
        "machine": machine(),
        "versions": {"this": provenance.software(), "python": platform.python_version(), **versions},
    }


def machine() -> dict[str, Any]:
    """What it was measured on, without its name."""
    return {
        "processor": engine.processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": [round(one, 1) for one in os.getloadavg()],
    }


def _every(result: Result) -> list[Run]:
    return [run for runs in result.runs for run in runs]


def _spread(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
