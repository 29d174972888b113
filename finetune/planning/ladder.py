"""The rungs by which a training is brought under a bound of memory, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from finetune import kv_cache
from finetune.methods import METHODS
from finetune.planning.phases import Taken

SMALLEST, GRAIN = 256, 64
"""Side in pixels below which no plan goes, and what smaller sides are multiples of"""
Taking = Callable[[Any], Taken]
"""What a training by such settings takes"""


@dataclass(frozen=True)
class Rung:
    """A change of the settings that spares memory."""

    flags: str
    cost: str
    """What is paid for it; what it changes of the training, if anything"""
    config: Any
    """The settings with it"""


@dataclass(frozen=True)
class Row:
    """A rung that was tried, on top of those before it."""

    flags: str
    cost: str
    taken: Taken
    saves: int
    """Bytes"""
    used: bool
    """Whether it is part of the plan: one that saves nothing is not"""


@dataclass(frozen=True)
class Plan:
    config: Any
    taken: Taken
    rows: tuple[Row, ...]
    fits: bool

    @property
    def flags(self) -> str:
        """What was changed. Of a flag that was changed twice the last counts."""
        used: dict[str, str] = {}
        for row in self.rows:
            for flag in f" {row.flags}".split(" --")[1:] if row.used else ():
                name = flag.split()[0]
                if used.pop(name.removeprefix("no-"), None) is None or not name.startswith("no-"):
                    used[name] = f"--{flag}"  # else an earlier rung asked for what is taken back
        return " ".join(used.values())


def find(config: Any, side: int, take: Taking, bound: float | None) -> Plan:
    """Climb until it fits. `side`: in pixels, where the settings say no resolution; `bound`: bytes, None: the settings
    are taken as they are. Each rung is tried once, on top of those before it, and left out where it saves nothing."""
    taken = take(config)
    rows = [Row("", "as it is asked for", taken, 0, True)]
    while bound is not None and taken.peak > bound:
        tried = {row.flags for row in rows}
        rung = next((rung for rung in rungs(config, side) if rung.flags not in tried), None)
        if rung is None:
            return Plan(config, taken, tuple(rows), False)
        after = take(rung.config)
        used = after.peak < taken.peak
        rows.append(Row(rung.flags, rung.cost, after, taken.peak - after.peak, used))
        if used:
            config, taken = rung.config, after
    return Plan(config, taken, tuple(rows), True)


def rungs(config: Any, side: int) -> Iterator[Rung]:
    """What is left to change, in the order of its price."""
    train, optim, full = config.train, config.optim, getattr(config, "full", None)
    if not train.gradient_checkpointing:
        half = {"gradient_checkpointing": True, "checkpoint_share": 0.5}
        yield _rung(config, "--gradient-checkpointing --checkpoint-share 0.5", "a sixth more time", train=half)
    if not train.gradient_checkpointing or train.checkpoint_share < 1:
        whole = {"gradient_checkpointing": True, "checkpoint_share": 1.0}
        flags = "--gradient-checkpointing" + (" --checkpoint-share 1" if train.checkpoint_share < 1 else "")
        yield _rung(config, flags, "a third more time", train=whole)
    if train.batch_size > 1:
        passes = train.batch_size * train.accumulation
        flags = f"--batch-size 1 --accumulation {passes}"
        yield _rung(config, flags, "smaller passes", train={"batch_size": 1, "accumulation": passes})
    if train.ema and not train.ema_on_cpu:
        yield _rung(config, "--ema-on-cpu", "the average is sent in each step", train={"ema_on_cpu": True})
    if train.precision == "fp32":
        yield _rung(config, "--precision bf16", "bf16's rounding", train={"precision": "bf16"})
    separable = optim.optimizer not in ("prodigy",) and train.precision != "fp16"
    if full is not None and not full.optimizer_in_backward and separable:
        flags = "--optimizer-in-backward" + (" --max-grad-norm 0" if optim.max_grad_norm else "")
        cost = "gradients are not clipped" if optim.max_grad_norm else "nothing"
        yield _rung(config, flags, cost, full={"optimizer_in_backward": True}, optim={"max_grad_norm": 0.0})
    if optim.optimizer in ("auto", "adamw"):
        yield _rung(config, "--optimizer adamw8bit", "8-bit state", optim={"optimizer": "adamw8bit"})
    if full is not None and full.weights == "fp32" and separable and optim.optimizer not in ("schedulefree",):
        flags = "--weights bf16" + (" --precision bf16" if train.precision != "bf16" else "")
        cost = "weights are rounded by chance"
        yield _rung(config, flags, cost, full={"weights": "bf16"}, train={"precision": "bf16"})
    if not config.model.cache_kv and kv_cache.hindrance(config) is None:
        cost = "samples: weights are sent in each step"
        yield _rung(config, "--cache-kv", cost, model={"cache_kv": True})
    if full is None and config.model.quantize is None and not config.model.offload_blocks:
        flags = "--offload-blocks" + (" --no-cache-kv" if config.model.cache_kv else "")
        cost = "weights are sent in twice a step"
        yield _rung(config, flags, cost, model={"offload_blocks": True, "cache_kv": False})
    bases = METHODS[config.adapter.method].bases if hasattr(config, "adapter") else ()
    for kind, cost in (("int8", "the base in 8 bits, more time"), ("nf4", "the base in 4 bits, more time")):
        if config.model.quantize is None and kind in bases:
            elsewhere = {name: False for name in ("offload_blocks", "cache_kv") if getattr(config.model, name)}
            flags = f"--quantize {kind}" + "".join(f" --no-{name.replace('_', '-')}" for name in elsewhere)
            yield _rung(config, flags, cost, model={"quantize": kind, **elsewhere})
    smaller = max(config.framing.resolution, default=side) * 3 // 4 // GRAIN * GRAIN
    if smaller >= SMALLEST:
        yield _rung(config, f"--resolution {smaller}", "smaller pictures", framing={"resolution": (smaller,)})


def _rung(config: Any, flags: str, cost: str, **changes: dict[str, Any]) -> Rung:
    changed = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    return Rung(flags, cost, replace(config, **changed))
