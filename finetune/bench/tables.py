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
from finetune.bench.floor import Floor
from finetune.bench.measuring import Run, Step

MIB, TERA = 2**20, 1e12


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
    floors: tuple[Floor | None, Floor | None] = (None, None)
    """What each takes at least; None: nobody knows"""
    most: float | None = None
    """FLOP/s that the device reaches, measured"""


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
        lines += _floors(result)
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines) if pairs else ""
    said = "the same work" if result.equal.holds else "not the same work, so no ratio is told"
    return f"{table}\n{said}: {result.equal.said()}\n"


def record(result: Result) -> dict[str, Any]:
    """All of it, for a file."""
    runs = [{name: value for name, value in vars(run).items() if name != "versions"} for run in _every(result)]
    did = [{name: value for name, value in vars(step).items() if name != "gradients"} for step in result.did]
    versions = {run.trainer: run.versions for run in _every(result)}
    floors = {name: floor and vars(floor) for name, floor in zip(result.names, result.floors, strict=True)}
    return {
        "trainers": result.names,
        "settings": dict(result.settings),
        "equal": {**vars(result.equal), "holds": result.equal.holds},
        "steps": dict(zip(result.names, did, strict=True)),
        "floors": floors,
        "most": result.most,
        "runs": runs,
        "machine": machine(),
        "versions": {"this": provenance.software(), "python": platform.python_version(), **versions},
    }


def _floors(result: Result) -> list[list[str]]:
    """Time beside the arithmetic, memory beside the plan."""
    if result.most is None or not any(result.floors):
        return []
    most = result.most

    def row(name: str, how: str, value: Callable[[Floor, Sequence[Run]], float]) -> list[str]:
        sides = zip(result.floors, result.runs, strict=True)
        return [name, *(how.format(value(floor, runs)) if floor else "" for floor, runs in sides), ""]

    def reached(floor: Floor, runs: Sequence[Run]) -> float:
        return floor.flops / median(run.step for run in runs)

    def held(floor: Floor, runs: Sequence[Run]) -> float:
        return median(run.peak - run.before for run in runs) / floor.bytes

    return [
        row("arithmetic of a step", "{:.4g} TFLOP", lambda floor, runs: floor.flops / TERA),
        row("reached", "{:.4g} TFLOP/s", lambda floor, runs: reached(floor, runs) / TERA),
        row(f"of {most / TERA:.4g} TFLOP/s at most", "{:.2f}", lambda floor, runs: reached(floor, runs) / most),
        row("peak of tensors, planned", "{:,.0f} MiB", lambda floor, runs: floor.bytes / MIB),
        row("peak above what there was before the model / planned", "{:.2f}", held),
    ]


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
