"""finetune plan: memory and time that a training would take, and what makes it fit. It reads no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tyro

from finetune import config, shelf

OWN = {"--recipe": 1, "--vram": 1, "--cpu": 0, "--measure": 0, "--tflops": 1, "--json": 0}
"""The command's own options, and how many words follow each"""


@dataclass(frozen=True)
class Config:
    """Predict what a training takes of memory and time, and choose what makes it fit. Needs the model's configuration
    alone, no weights. All options of `finetune train RECIPE` may follow; what they say is kept where it fits."""

    recipe: str = "lora"
    """The recipe: one of those that come with the package, or a file of your own with settings like theirs."""
    vram: str | None = None
    """Memory of the GPU that it is to fit, e.g. 8GB. Default: the settings are taken as they are."""
    cpu: bool = False
    """Predict for a training on a CPU: what its tensors and kernels hold."""
    measure: bool = False
    """Also take steps on this machine, with the weights, and correct the predictions by what they take."""
    tflops: float | None = None
    """Predict the time by this rate, in 10^12 operations a second, for a GPU that is not here: its published one in
    --precision gives the least time that a step can take. Default: by what this machine does, measured for two seconds;
    none where it has no such device."""
    json: bool = False
    """Print JSON."""


def run(words: list[str], prog: str) -> None:
    """The command's own options, and a recipe's."""
    if set(words) & {"-h", "--help"}:
        tyro.cli(Config, args=["--help"], prog=prog)
    own, rest = config.parted(words, OWN)
    asked = tyro.cli(Config, args=own, prog=prog)
    page = shelf.load(asked.recipe)
    if not any(word.partition("=")[0] == "--output" for word in rest):
        rest = [*rest, "--output", "run"]
    settings = config.parse(page.Config, rest, f"{prog} --recipe {asked.recipe}")
    show(asked, settings)


def show(asked: Config, settings: Any) -> None:
    from finetune import planning

    timed = planning.timing(asked.tflops)
    plan = planning.make(settings, asked.vram, cpu=asked.cpu, measure=asked.measure, timed=timed)
    print(json.dumps(plan.facts(), indent=1) if asked.json else plan.text(asked.recipe))
    plan.require()
