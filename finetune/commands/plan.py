"""finetune plan: what a training would take of memory, and what to change so that it fits. No weights are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tyro

from finetune import config, shelf


@dataclass(frozen=True)
class Config:
    """Predict what a training takes of memory, and choose what makes it fit. Needs the model's configuration alone, no
    weights. All options of `finetune train RECIPE` may follow; what they say is kept unless it does not fit."""

    recipe: str = "lora"
    """The recipe: one of those that come with the package, or a file of your own with settings like theirs."""
    vram: str | None = None
    """Memory of the GPU that it is to fit, e.g. 8GB. Default: the settings are taken as they are."""
    cpu: bool = False
    """Predict for a training on a CPU: what its tensors and kernels hold."""
    measure: bool = False
    """Also take steps on this machine, with the weights, and correct the prediction by what they take."""
    json: bool = False
    """Print JSON."""


def run(words: list[str], prog: str) -> None:
    """The command's own options, and a recipe's."""
    if set(words) & {"-h", "--help"}:
        tyro.cli(Config, args=["--help"], prog=prog)
    own, rest = config.parted(words, {"--recipe": 1, "--vram": 1, "--cpu": 0, "--measure": 0, "--json": 0})
    asked = tyro.cli(Config, args=own, prog=prog)
    page = shelf.load(asked.recipe)
    if not any(word.partition("=")[0] == "--output" for word in rest):
        rest = [*rest, "--output", "run"]
    settings = config.parse(page.Config, rest, f"{prog} --recipe {asked.recipe}")
    show(asked, settings)


def show(asked: Config, settings: Any) -> None:
    from finetune import planning

    plan = planning.make(settings, asked.vram, cpu=asked.cpu, measure=asked.measure)
    print(json.dumps(plan.facts(), indent=1) if asked.json else plan.text(asked.recipe))
    plan.require()
