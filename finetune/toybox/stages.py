"""One training stage of the toybox: steps, averaged weights, checkpoints that a later run goes on from.

The stages (autoencoder, judge with text encoder, noise predictor) differ in their loss, and in nothing that is here. A
step's pictures and noise are functions of (seed, purpose, step), so a resumed stage is the same stage.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from finetune.toybox import parallel

SECONDS_BETWEEN_SAVES = 240.0


M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Stage(Generic[M]):
    """What is trained, how, and for how long."""

    name: str
    folder: Path
    model: M
    """Everything that trains and everything that is averaged."""
    groups: Sequence[tuple[nn.Module, float]]
    """Parts of `model`, each with its own peak learning rate."""
    steps: int
    loss: Callable[[int], tuple[Tensor, dict[str, float]]]
    """The loss of a step, and figures for the log."""
    average: float = 0.999
    """Decay of the moving average that is shipped."""
    weight_decay: float = 1e-4
    log_every: int = 50
    show: Callable[[M, int], None] | None = None
    """Called with the averaged model at every checkpoint, for pictures to look at."""


def rate(step: int, steps: int, warmup: int = 100, decay: float = 0.25) -> float:
    """Share of the peak learning rate: up over `warmup` steps, flat, and down over the last quarter.

    The flat middle is what makes a stage extendable: more steps move only the descent.
    """
    up = min(1.0, (step + 1) / warmup)
    left = (steps - step) / max(1.0, decay * steps)
    return up if left >= 1 else up * (0.01 + 0.99 * 0.5 * (1 - math.cos(math.pi * left)))


def run(stage: Stage[M]) -> M:
    """Train the stage to its end, from its checkpoint where there is one; returns the averaged model."""
    path = stage.folder / f"{stage.name}.state.pt"
    optimizer = torch.optim.AdamW(
        [{"params": list(part.parameters()), "lr": peak, "peak": peak} for part, peak in stage.groups],
        betas=(0.9, 0.98),
        weight_decay=stage.weight_decay,
    )
    average = {name: value.detach().clone() for name, value in stage.model.state_dict().items()}
    step = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        stage.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step = state["average"], state["step"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = started = time.monotonic()
    first = step
    recent: list[dict[str, float]] = []
    while step < stage.steps:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step, stage.steps)
        loss, figures = stage.loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        _move(average, stage.model, min(stage.average, (1 + step) / (10 + step)))
        recent.append({"loss": float(loss.detach()), "norm": float(norm), **figures})
        if parallel.rank() == 0 and step % stage.log_every == 0:
            seconds = (time.monotonic() - started) / (step - first)
            _log(stage, step, {name: sum(f[name] for f in recent) / len(recent) for name in recent[0]}, seconds)
            recent = []
        if parallel.rank() > 0:
            continue
        if step == stage.steps or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            write(path, {"model": stage.model.state_dict(), "optimizer": optimizer.state_dict(),
                         "average": average, "step": step})  # fmt: skip
            if stage.show is not None:
                stage.show(averaged(stage.model, average), step)
            saved = time.monotonic()
    return averaged(stage.model, average)


def averaged(model: M, average: dict[str, Tensor]) -> M:
    """A copy of `model` with the averaged weights, in evaluation mode."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(average)
    return twin.eval().requires_grad_(False)


def finished(folder: Path, name: str, model: M) -> M:
    """The averaged model of a stage's latest checkpoint."""
    state = torch.load(folder / f"{name}.state.pt", weights_only=True)
    return averaged(model, state["average"])


def steps_done(folder: Path, name: str) -> int:
    path = folder / f"{name}.state.pt"
    return int(torch.load(path, weights_only=True, mmap=True)["step"]) if path.exists() else 0


def write(path: Path, state: object) -> None:
    """Beside, synced, renamed: a file is either the old one or the new one, never half of one."""
    beside = path.with_suffix(".partial")
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


@torch.no_grad()
def _move(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    current = model.state_dict()
    floats = [name for name, value in current.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[n] for n in floats], [current[n] for n in floats], 1 - decay)


def _log(stage: Stage[M], step: int, figures: dict[str, float], seconds: float) -> None:
    left = (stage.steps - step) * seconds / 60
    line = {"stage": stage.name, "step": step, **{k: round(v, 5) for k, v in figures.items()}}
    with open(stage.folder / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
    print(f"{stage.name} {step}/{stage.steps}  {shown}  {seconds:.2f} s a step, {left:.0f} min left", flush=True)
