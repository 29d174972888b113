"""finetune bench OUT: a training step against the plain path's, or against another trainer's own script."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from finetune.errors import Failure, Fault
from finetune.signals import Watch

if TYPE_CHECKING:
    from finetune.bench.tables import Result
    from finetune.bench.trainers import Trainer, Work

MODELS = ("quarter", "sd15", "sdxl")
"""What may be made, see `bench.model`"""
RECORD, TABLE = "bench.json", "bench.md"
COUNTED = 2
"""Steps of the trainings that are compared and counted"""
SIDE = 256
"""Of the pictures, in pixels, where a model is named"""


@dataclass(frozen=True)
class Config:
    """Measure a training against the same one by the plain path, or against another trainer's own script.

    First it is asked whether the two do the same work: from the same weights, pictures, noise and timesteps, the same
    number of trained parameters, the same loss and the same gradients, to 1e-5 in fp32 and to 2 % in bf16. If not, it
    says so, and measures nothing. Then they are run in turn, A B B A, each in a process of its own. Seconds are the
    process's (the GPU's where there is one); ratios are of runs beside each other, their median and range.
    """

    output: Positional[Path]
    """A new or empty folder for bench.json, bench.md and what the runs wrote."""
    against: tuple[Literal["diffusers", "kohya"], Path] | None = None
    """Another trainer and where it lies: `diffusers PATH`, its folder examples/dreambooth, or `kohya PATH`, the folder
    of sd-scripts. It is run as it is. Default: the plain path, --no-fast."""
    python: Path | None = None
    """The Python to run the other trainer with, where it needs other versions of the libraries. Default: this one."""
    recipe: Literal["lora", "dreambooth"] = "lora"
    """What is trained."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of both."""
    model: Literal["quarter", "sd15", "sdxl"] | Path = "quarter"
    """What is made, with random weights: `quarter`, Stable Diffusion 1.5 with every width divided by four, whose
    attention weighs as much at 256 px as the whole model's at 512 px; `sd15` or `sdxl` in their true size, 2 and 7 GB
    in bf16 files. Or a diffusers folder."""
    divisor: Literal[1, 2, 4, 8] | None = None
    """Divide the widths by this. Default: the model's own, 4 or 1."""
    data: Path | None = None
    """Folder of the pictures, which are made squares of the resolution. Default: those of a shipped subject."""
    class_data: Path | None = None
    """Folder of the class pictures. Default: those of another shipped subject. Against kohya there are none."""
    resolution: int | None = None
    """Side in pixels. Default: 256, of sd15 512, of sdxl 1024."""
    rank: int = 16
    """Rank of the LoRA."""
    batch_size: int = 1
    """Subject pictures a step. As many class pictures go with them, or, against kohya, subject pictures."""
    steps: int = 12
    """Steps of a run. The first is start-up; a step's time is the median of the others."""
    pairs: int = 2
    """How often both are run."""
    threads: int = 1
    """Processor threads of each run."""
    seed: int = 0
    """Seed of both."""


def main(config: Config) -> None:
    from finetune.bench import tables, trainers

    _check(config)
    if Watch.now:
        Watch.now.advice = "Measure again, into a new folder."
    rival = config.against
    python = str(config.python) if config.python else None
    other = trainers.RIVALS[rival[0]](rival[1], config.recipe, python) if rival else trainers.ours(fast=False)
    pair = trainers.ours(), other
    result = _measured(config, pair, _work(config, other))
    text = tables.markdown(result)
    (config.output / RECORD).write_text(json.dumps(tables.record(result), indent=1) + "\n", encoding="utf-8")
    (config.output / TABLE).write_text(text, encoding="utf-8")
    print(text, end="")
    if not result.equal.holds:
        raise Failure(f"{pair[0].name} and {pair[1].name}: they do not do the same work, so their times say nothing.")


def _check(config: Config) -> None:
    if config.output.exists() and any(config.output.iterdir()):
        raise Fault(f"{config.output}: there is something there already. Name a new folder.")
    for name, least in (("steps", COUNTED), ("pairs", 1), ("threads", 1), ("batch_size", 1)):
        if getattr(config, name) < least:
            raise Fault(f"--{name.replace('_', '-')} {getattr(config, name)}: at least {least}.")
    if config.python and not config.against:
        raise Fault("--python: is for another trainer's script. Name one: --against diffusers PATH.")
    if isinstance(config.model, Path) and not config.model.is_dir():
        raise Fault(f"--model {config.model}: there is no such folder. Name one, or {', '.join(MODELS)}.")
    if isinstance(config.model, Path) and config.divisor:
        raise Fault(f"--divisor {config.divisor}: is for a model that is made, and {config.model} is there already.")
    if config.against and not isinstance(config.model, Path):
        from finetune.bench import model

        if not model.MODELS[config.model].rivals:
            told = f"--against {config.against[0]} --model {config.model}"
            raise Fault(f"{told}: its script trains Stable Diffusion 1.x. Take sd15.")


def _work(config: Config, other: Trainer) -> Work:
    """The model and the pictures, made."""
    from finetune import shelf
    from finetune.bench import pictures, trainers

    place = config.output.absolute()
    model, resolution = _model(config, place)
    data = config.data or shelf.datasets() / "gizmo" / "pictures"
    class_data = config.class_data or shelf.datasets() / "pip" / "pictures"
    subjects = pictures.squares(data, place / "pictures", resolution)
    classes = pictures.squares(class_data, place / "class-pictures", resolution) if other.prior else None
    return trainers.Work(
        model=model,
        subjects=subjects,
        classes=classes,
        recipe=config.recipe,
        precision=config.precision,
        resolution=resolution,
        rank=config.rank,
        batch=config.batch_size * (1 if other.prior else 2),
        steps=config.steps,
        seed=config.seed,
    )


def _model(config: Config, place: Path) -> tuple[Path, int]:
    """Its folder, made where none is named, and the side of its pictures."""
    if isinstance(config.model, Path):
        return config.model.absolute(), config.resolution or SIDE
    import torch

    from finetune.bench import model

    made = model.MODELS[config.model]
    if config.divisor:
        made = dataclasses.replace(made, divisor=config.divisor)
    if config.against:  # of other files it is not known what another trainer makes of them
        made = dataclasses.replace(made, dtype=torch.float32)
    _say(f"{config.model}: made with random weights")
    return model.save(place / "model", made), config.resolution or made.resolution


def _measured(config: Config, pair: tuple[Trainer, Trainer], work: Work) -> Result:
    import torch

    from finetune.bench import equal, floor, measuring, pictures
    from finetune.bench.tables import Result

    place = config.output.absolute()
    # One picture of each, so that none can come in another order.
    subjects = pictures.first(work.subjects, place / "first")
    classes = work.classes and pictures.first(work.classes, place / "first-class")
    alone = dataclasses.replace(work, subjects=subjects, classes=classes, steps=COUNTED)
    did = []
    for number, trainer in enumerate(pair):
        _say(f"{trainer.name}: what a step does")
        did.append(measuring.step(trainer, alone, place / f"step-{number}", config.threads))
    same = equal.compare(did[0], did[1], config.precision)
    runs: tuple[list[measuring.Run], list[measuring.Run]] = [], []
    for which, number in measuring.alternated(config.pairs) if same.holds else ():
        _say(f"{pair[which].name}: run {number + 1} of {config.pairs}, {config.steps} steps")
        folder = place / f"run-{number}-{which}"
        runs[which].append(measuring.run(pair[which], work, folder, config.threads))
    told = {name: value for name, value in vars(work).items() if not isinstance(value, Path)}
    told |= {"prior": work.classes is not None, "threads": config.threads}
    told |= {"model": None if isinstance(config.model, Path) else config.model, "divisor": config.divisor}
    names = pair[0].name, pair[1].name
    if not same.holds:
        return Result(names, told, same, (did[0], did[1]), runs)
    torch.set_num_threads(config.threads)
    floors = floor.of(pair[0], work, place), floor.of(pair[1], work, place)
    return Result(names, told, same, (did[0], did[1]), runs, floors, floor.most(config.precision))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
