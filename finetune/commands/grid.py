"""finetune grid: a labelled table of pictures that differ by one thing down the side and one along the top."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from finetune.commands import drawing
from finetune.commands.drawing import Drawing
from finetune.errors import Fault

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.families import Family
    from finetune.initial import Initial

Axis = Literal["checkpoint", "prompt", "scale", "strength", "guidance", "steps", "seed"]
AXES: tuple[Axis, ...] = get_args(Axis)
"""The first of those that have several values goes down the side."""
BASE, ALL = "base", "all"


@dataclass(frozen=True)
class Config(Drawing):
    """Draw a table of pictures. Of checkpoint, prompt, scale, strength, guidance, steps and seed, two may have several
    values: one goes down the side, one along the top."""

    prompt: tuple[str, ...] = ()
    """What to draw, as for `finetune generate`."""
    run: Path | None = None
    """A run's folder, whose checkpoints are drawn with, on the base that it was trained from."""
    checkpoint: tuple[str, ...] = ()
    """Its steps, `best`, `last`, `all`, or `base`, which is what it was before. Default: what it ended with. Without
    --run: adapter files, or `base`."""
    scale: tuple[float, ...] = (1.0,)
    """Strength of the adapters, of all alike. 0 is the base alone."""
    strength: tuple[float, ...] = ()
    """How much of --init is drawn anew. Default: .6, under a mask 1."""
    guidance: tuple[float, ...] = (5.0,)
    """How strictly the prompt is followed."""
    steps: tuple[int, ...] = (30,)
    """Denoising steps."""
    seed: tuple[int, ...] = (0,)
    """Seeds."""
    rows: Axis | None = None
    """What goes down the side. Default: of the two the one that this list has first."""
    output: Path = Path("grid.png")
    """PNG file to write."""
    overwrite: bool = False
    """Write over a picture that is there."""


@dataclass(frozen=True)
class Cell:
    """A picture of the table."""

    checkpoint: str | None
    prompt: str
    scale: float
    strength: float | None
    guidance: float
    steps: int
    seed: int


def main(config: Config) -> None:
    # What can be refused is refused before a model is loaded.
    _require_sense(config)
    values = {axis: _values(config, axis) for axis in AXES}
    down, along = _sides(config, values)
    initials = {strength: drawing.initial(config, strength) for strength in values["strength"]}
    drawing.require_words(config, config.prompt)
    adapters = drawing.told(config.adapter, [1.0] * len(config.adapter))

    from finetune.pictures import grid, save_png

    cells = [Cell(**dict(zip(AXES, chosen, strict=True))) for chosen in product(*values.values())]
    drawn = dict(_draw(config, cells, initials))
    fixed = cells[0]
    rows: list[dict[str, Any]] = [{str(down): value} for value in values[down]] if down else [{}]
    table = [[drawn[replace(fixed, **row, **{str(along): value})] for value in values[along]] for row in rows]
    beside = [_label(down, value) for value in values[down]] if down else [""]
    above = [_label(along, value) for value in values[along]]
    sheet = grid(table, beside, above, _title(config, values))
    same = {str(axis): getattr(fixed, axis) for axis in AXES if len(values[axis]) == 1}
    facts = {"negative": config.negative or None, "model": config.model.model, "adapters": adapters}
    save_png(sheet, config.output, {**facts, **same})
    print(config.output)


def _draw(
    config: Config, cells: Sequence[Cell], initials: dict[float | None, Initial | None]
) -> Iterator[tuple[Cell, Image]]:
    """The pictures, a checkpoint after the other; those that differ by prompt and seed alone together."""
    from rich.console import Console
    from rich.progress import track

    from finetune import export
    from finetune.sampling import sample

    groups: dict[Cell, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(replace(cell, prompt="", seed=0), []).append(cell)
    loaded: tuple[str | None, Family, list[str]] | None = None
    for alike, group in track(groups.items(), "draw", console=Console(stderr=True), total=len(groups)):
        if loaded is None or loaded[0] != alike.checkpoint:
            loaded = None  # the one before leaves the memory first
            loaded = (alike.checkpoint, *_model(config, alike.checkpoint))
        _, family, names = loaded
        if names:
            export.set_strengths(family, dict.fromkeys(names, alike.scale))
        pictures = sample(
            family,
            [cell.prompt for cell in group],
            [cell.seed for cell in group],
            negative=config.negative,
            steps=alike.steps,
            guidance=alike.guidance,
            size=config.size,
            batch=config.batch,
            initial=initials[alike.strength],
            weighted=True,
        )
        yield from zip(group, pictures, strict=True)


def _model(config: Config, checkpoint: str | None) -> tuple[Family, list[str]]:
    """The model of a checkpoint, and the names of the adapters on it."""
    if config.run is None:
        files = [Path(checkpoint)] if checkpoint not in (None, BASE) else []
        chosen = replace(config, adapter=(*config.adapter, *files))
        return drawing.load(chosen), [f"adapter_{number}" for number in range(len(chosen.adapter))]

    from finetune import engine, families, sampling
    from finetune.adapters import NAME
    from finetune.export import trained
    from finetune.settings import Loss

    place = trained.find(config.run, None if checkpoint == BASE else checkpoint)
    if checkpoint == BASE:
        family, names = families.load(families.Source(**place.settings["model"])), []
    else:
        loaded = trained.load(place, place.base())
        assert loaded.family is not None
        family, names = loaded.family, [NAME] if loaded.adapter is not None else []
    family.pipeline.to(engine.device(), engine.dtype(config.precision))
    family.pipeline.vae.float()
    if "loss" in place.settings:
        sampling.as_trained(family, Loss(**place.settings["loss"]))
    return drawing.ready(family, config), names


def _values(config: Config, axis: Axis) -> tuple[Any, ...]:
    if axis == "checkpoint":
        return _checkpoints(config)
    return getattr(config, axis) or (None,)


def _checkpoints(config: Config) -> tuple[str | None, ...]:
    """Raises Fault for those that are not there."""
    if config.run is None:
        for path in config.checkpoint:
            if path != BASE:
                drawing.told([Path(path)], [1.0])
        return config.checkpoint or (None,)
    from finetune import checkpoints
    from finetune.export import trained

    steps = tuple(map(str, checkpoints.steps(config.run)))
    asked = [step for one in config.checkpoint for step in (steps if one == ALL else (one,))]
    found = tuple(asked) or (None,)
    for step in found:
        trained.find(config.run, None if step == BASE else step)
    return found


def _sides(config: Config, values: dict[Axis, tuple[Any, ...]]) -> tuple[Axis | None, Axis]:
    """What goes down the side, if there is such, and what along the top. Raises Fault for more than two."""
    several: list[Axis] = [axis for axis in AXES if len(values[axis]) > 1]
    if len(several) > 2 or not several:
        raise Fault(
            f"a table has two sides: one or two of {', '.join(AXES)} have several values, "
            f"and here it is {', '.join(several) or 'none'}."
        )
    if config.rows is not None and config.rows not in several:
        raise Fault(f"--rows {config.rows}: it has one value only. Several have: {', '.join(several)}.")
    if twice := [axis for axis in several if len(set(values[axis])) < len(values[axis])]:
        raise Fault(f"--{twice[0]}: a value stands there twice.")
    if len(several) == 1:
        return (several[0], "seed") if config.rows else (None, several[0])
    first = config.rows or several[0]
    return first, next(axis for axis in several if axis != first)


def _label(axis: Axis, value: Any) -> str:
    if axis == "prompt":
        return str(value)
    if axis == "checkpoint":
        return f"step {value}" if value.isdecimal() else Path(value).stem
    return f"{axis} {value:g}"


def _title(config: Config, values: dict[Axis, tuple[Any, ...]]) -> str:
    """The model, and what all pictures have in common."""
    one = {axis: values[axis][0] for axis in AXES if len(values[axis]) == 1 and values[axis][0] is not None}
    told = [_label(axis, value) for axis, value in one.items() if axis != "scale" or config.adapter]
    model = [config.run.resolve().name] if config.run else [drawing.title(config, None)]
    return ", ".join([*model, *told])


def _require_sense(config: Config) -> None:
    drawing.require_sense(config, config.prompt, [1.0])
    if config.run is not None and config.adapter:
        raise Fault("--run and --adapter: give the one or the other.")
    if config.output.suffix.lower() != ".png":
        raise Fault(f"--output {config.output}: a PNG file to write, e.g. grid.png.")
    if config.output.exists() and not config.overwrite:
        raise Fault(f"{config.output}: it is there already. Name another --output, or give --overwrite.")
    if min(config.steps) < 1:
        raise Fault(f"--steps {min(config.steps)}: at least 1.")
    if min(config.seed) < 0:
        raise Fault(f"--seed {min(config.seed)}: a seed is 0 or more.")
    for name in (field.name for field in fields(Cell)):
        if name in ("guidance", "steps", "seed", "scale") and not getattr(config, name):
            raise Fault(f"--{name}: at least one value.")
