"""What a training would take, and what to change so that it fits: `finetune plan`, `finetune train --vram`.

The training's own code runs on tensors that have shapes and no data (`tracking`), of a model that is built by its
configuration (`blank`), through what a run does one after the other (`phases`), while what is held is counted, and what
is computed (`work`), which takes time by a machine's `rates`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from finetune import adapters, checkpointing, data, engine, kv_cache, offload, optim, sliders
from finetune.errors import Fault
from finetune.families import Source
from finetune.planning import blank, ladder, phases, rates, tracking
from finetune.planning.phases import Taken
from finetune.planning.rates import Rates
from finetune.planning.work import Work
from finetune.settings import Data

GIB = 2**30
CONTEXT = 0.6 * GIB
"""What a GPU's driver and libraries take beside tensors: their context, kernels, workspaces"""
UNITS = {"": GIB, "G": GIB, "M": 2**20}
"""Cards are sold by these: 8 GB are 8 GiB"""


@dataclass(frozen=True)
class Plan:
    """What a training takes, and the settings that make it fit."""

    found: ladder.Plan
    size: tuple[int, int]
    bound: float | None
    """Bytes that there are; None: nobody said"""
    context: float
    """Bytes beside the tensors"""
    measured: Taken | None
    """What this machine took, as it was planned"""
    corrected: float
    """What predictions of memory were multiplied by after that"""
    rates: Rates | None = None
    """By which time is predicted; None: nobody told any"""
    slowed: float = 1.0
    """What predictions of time were multiplied by after a measurement"""

    @property
    def fits(self) -> bool:
        return self.found.fits

    @property
    def config(self) -> Any:
        return self.found.config

    @property
    def seconds(self) -> float | None:
        """Of a step"""
        return None if self.rates is None else self.rates.seconds(self.found.taken.work) * self.slowed

    def total(self, taken: Taken) -> float:
        return taken.peak * self.corrected + self.context

    def facts(self) -> dict[str, Any]:
        """As plain values; sizes are bytes."""
        train, taken = self.config.train, self.found.taken
        chosen = {"batch_size": train.batch_size, "accumulation": train.accumulation, "precision": train.precision}
        return {
            "fits": self.fits,
            "bound": self.bound,
            "context": self.context,
            "size": list(self.size),
            **chosen,
            "flags": self.found.flags,
            "peak": self.total(taken),
            "phases": taken.peaks,
            "flops": taken.flops,
            "work": dict(taken.work.amounts()),
            "corrected": self.corrected,
            "measured": self.measured and {"peaks": self.measured.peaks, "seconds": self.measured.seconds},
            "time": self._time(),
            "rungs": [
                {"flags": r.flags, "cost": r.cost, "peak": self.total(r.taken), "saves": r.saves, "used": r.used}
                for r in self.found.rows
            ],
        }

    def text(self, recipe: str) -> str:
        taken, train = self.found.taken, self.config.train
        lines = [f"{'':44}{'peak':>10}{'saves':>10}  costs"]
        for row in self.found.rows:
            used = row.flags if row.used else f"({row.flags})"
            saved = f"{row.saves / GIB:10.2f}" if row.flags else " " * 10
            lines.append(f"{used:44}{self.total(row.taken) / GIB:10.2f}{saved}  {row.cost}")
        height, width = self.size
        lines += [
            "",
            f"{width} x {height} px, batch {train.batch_size} x {train.accumulation}, {train.precision}: "
            f"{self.total(taken) / GIB:.2f} GiB at most, while it does this: {taken.phase} "
            f"({', '.join(f'{name} {peak / GIB:.2f}' for name, peak in taken.peaks.items())}; "
            f"beside tensors {self.context / GIB:.1f})",
            f"{taken.flops / 1e12:.3g} TFLOP a step{self._lasts()}",
        ]
        if self.measured is not None:
            lines.append(
                f"measured here: {self.measured.peak / GIB:.2f} GiB of tensors, {self.measured.seconds:.2f} s a step; "
                f"predictions were multiplied by {self.corrected:.3f} and {self.slowed:.3f}"
            )
        if self.fits and self.found.flags:
            lines.append(f"add to `finetune train {recipe} ...`: {self.found.flags}")
        return "\n".join(lines)

    def _time(self) -> dict[str, Any] | None:
        if self.rates is None or self.seconds is None:
            return None
        steps = self.config.train.steps
        told = {"seconds": self.seconds, "steps": steps, "total": steps * self.seconds, "corrected": self.slowed}
        return told | {"by": self.rates.by, "rates": dict(self.rates.each), "call": self.rates.call}

    def _lasts(self) -> str:
        if self.rates is None or self.seconds is None:
            return ". How long that takes is said on a machine of that kind, or by --tflops"
        steps = self.config.train.steps
        said = f": {_clock(self.seconds)}, {_clock(steps * self.seconds)} for {steps:,} steps"
        least = "at least, by" if self.rates.least else "by"
        return f"{said}, {least} {self.rates.said()}"

    def require(self) -> None:
        """Raises Fault where it does not fit."""
        if self.fits:
            return
        taken = self.found.taken
        raise Fault(
            f"it does not fit: {self.total(taken) / GIB:.2f} GiB are needed and {(self.bound or 0) / GIB:.2f} are "
            f"there, with all that a plan can change. What takes most: {taken.phase}. Take a smaller model, or more "
            "memory."
        )


def make(
    config: Any,
    vram: str | None,
    *,
    cpu: bool = False,
    measure: bool = False,
    timed: Callable[[Work, bool], Rates | None] = lambda work, cpu: None,
) -> Plan:
    """`timed`: the rates of such work, on a CPU or not. Raises Fault for recipes, models and sizes that no plan is made
    of."""
    _require_known(config)
    bound = None if vram is None else amount(vram)
    if measure:
        cpu = on_cpu()
    if not cpu and config.optim.optimizer == "auto":
        config = replace(config, optim=replace(config.optim, optimizer="adamw8bit"))  # as on a GPU, see optim.resolve
    source = Source(**vars(config.model))
    side, sized = sizes(config, source)
    context = 0.0 if cpu else CONTEXT

    def take(config: Any) -> Taken:
        load = partial(blank.family, Source(**vars(config.model)), engine.DTYPES[config.train.precision], cpu)
        return phases.imagined(config, load, sized(config), kernels=cpu)

    factor, slowed, seen = 1.0, 1.0, None
    room = None if bound is None else bound - context
    found = ladder.find(config, side, take, room)
    rates = timed(found.taken.work, cpu)
    if measure:
        seen = phases.measured(found.config, Source(**vars(found.config.model)), sized(found.config))
        factor = seen.peak / found.taken.peak
        slowed = seen.seconds / rates.seconds(found.taken.work) if seen.seconds and rates else 1.0
        if room is not None and seen.peak > room:
            found = ladder.find(config, side, take, room / factor)
    return Plan(found, sized(found.config), bound, context, seen, factor, rates, slowed)


def timing(tflops: float | None = None) -> Callable[[Work, bool], Rates | None]:
    """By the rate that is told, or else by this machine's, where it is of the kind that is planned for."""
    if tflops is not None and not tflops > 0:
        raise Fault(f"--tflops {tflops:g}: more than 0, in 10^12 operations a second.")

    def known(work: Work, cpu: bool) -> Rates | None:
        if tflops is not None:
            return rates.told(tflops)
        return rates.measured(work, torch.device(engine.device())) if on_cpu() == cpu else None

    return known


def _clock(seconds: float) -> str:
    """As one says it."""
    size, unit = (1, "s") if seconds < 100 else (60, "min") if seconds < 6000 else (3600, "h")
    return f"{seconds / size:.3g} {unit}"


def on_cpu() -> bool:
    """Whether this machine trains on its CPU."""
    return engine.device() == "cpu"


def amount(said: str) -> float:
    """8GB, 7.5GiB, 600MB -> bytes"""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM]?)(?:i?B)?", said.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise Fault(f"--vram {said}: an amount of memory, e.g. 8GB.")
    return float(found[1]) * UNITS[found[2].upper()]


def sizes(config: Any, source: Source) -> tuple[int, Callable[[Any], tuple[int, int]]]:
    """The side that the model was made for, and, by settings, height and width of the largest pictures that are
    trained; without pictures squares are."""
    with tracking.imagined():
        family = blank.family(source, engine.DTYPES[config.train.precision])
        side, multiple = family.resolution(), family.multiple()
    told = getattr(config, "data", Data())  # a slider has no pictures
    named = told.data is not None or bool(told.concepts)
    examples = data.read(told, config.captions, config.train.seed)[0] if named else []

    def largest(config: Any) -> tuple[int, int]:
        sides = config.framing.resolution or (side,)
        if not named:
            return max(sides), max(sides)
        items = data.plan(examples, config.framing, sides, multiple, config.captions, config.train.seed)
        return max((item.size for item in items), key=math.prod)

    return side, largest


def _require_known(config: Any) -> None:
    groups = ("model", "train", "optim", "framing", "samples", "loss")
    kinds = [name for name in ("adapter", "full", "words") if hasattr(config, name)]
    if not kinds or not all(hasattr(config, name) for name in groups):
        raise Fault("no plan is made of this recipe: it has not the settings of those that come with the package.")
    checkpointing.check(config.train.checkpoint_share)
    offload.check(config.model, phases.accelerator(config, cpu=True))
    kv_cache.check(config, phases.accelerator(config, cpu=True))
    if hasattr(config, "full"):
        adapters.require_whole(config.model)
    if hasattr(config, "adapter"):
        adapters.check(config.adapter, config.optim, config.model, phases.accelerator(config, cpu=True))
    if hasattr(config, "slider"):
        sliders.check(config.slider, config.adapter)
    optim.check(config.optim)
