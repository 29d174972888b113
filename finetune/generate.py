"""`finetune generate`: pictures of prompts and seeds, with adapters, as PNGs that know their settings, and a grid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import Fault
from finetune.settings import Model

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.families import Family

GRID = "grid.png"


@dataclass(frozen=True)
class Config:
    """Draw pictures with a model and adapters."""

    prompt: tuple[str, ...]
    """What to draw; several prompts, each in quotes, give a row of pictures each."""
    model: Model = field(default_factory=Model)
    adapter: tuple[Path, ...] = ()
    """Adapter files (.safetensors) that are put on the model together."""
    scale: tuple[float, ...] = (1.0,)
    """Strength of the adapters: one number for all, or one each. 0 is the base alone."""
    negative: str = ""
    """What the pictures should not show."""
    seed: int = 0
    """Seed of the first picture; the next have the next seeds, the same for every prompt."""
    count: int = 1
    """Pictures for each prompt."""
    steps: int = 30
    """Denoising steps."""
    guidance: float = 5.0
    """How strictly the prompt is followed (classifier-free guidance, Ho & Salimans 2022, 2207.12598)."""
    size: int | None = None
    """Side in pixels. Default: what the model was made for."""
    output: Path = Path("pictures")
    """Folder for the pictures and, when there are several, their grid."""
    overwrite: bool = False
    """Write over pictures of the same names."""
    batch: int = 4
    """Pictures drawn at a time: fewer need less memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the model. `auto`: bf16 on a GPU, else fp32."""


def main(config: Config) -> None:
    # What can be refused is refused before a model is loaded.
    _require_sense(config)
    files = _files(config)
    facts = [_checked(path, scale) for path, scale in zip(config.adapter, _scales(config), strict=True)]

    from finetune import engine, export, families
    from finetune.pictures import grid, save_png
    from finetune.sampling import begin_at_noise

    source = families.Source(config.model.model, config.model.revision, config.model.model_config)
    family = families.load(source, engine.dtype(config.precision), engine.device())
    _attach(family, config)
    from_noise = any(export.settings_of(path).get("zero_terminal_snr") for path in config.adapter)
    if from_noise:
        begin_at_noise(family)
    settings = {
        "negative": config.negative or None,
        "steps": config.steps,
        "guidance": config.guidance,
        "scheduler": type(family.pipeline.scheduler).__name__,
        "zero_terminal_snr": from_noise or None,
        "model": config.model.model,
        "revision": config.model.revision,
        "adapters": facts,
    }
    _make(config.output)
    rows: dict[int, list[Image]] = {row: [] for row in range(len(config.prompt))}
    for (row, seed), picture in _draw(family, config, list(files)):
        save_png(picture, files[row, seed], {**settings, "prompt": config.prompt[row], "seed": seed})
        rows[row].append(picture)
    if len(files) > 1:
        columns = [f"seed {seed}" for seed in _seeds(config)]
        sheet = grid(list(rows.values()), config.prompt, columns, _title(config))
        save_png(sheet, config.output / GRID, {"model": config.model.model, "adapters": facts})
    print(*files.values(), *([config.output / GRID] if len(files) > 1 else []), sep="\n")


def _draw(family: Family, config: Config, wanted: Sequence[tuple[int, int]]) -> Any:
    """The pictures of (prompt, seed) pairs, as they are drawn."""
    from rich.console import Console
    from rich.progress import track

    from finetune.sampling import sample

    batches = [wanted[start : start + config.batch] for start in range(0, len(wanted), config.batch)]
    for pairs in track(batches, "draw", console=Console(stderr=True)):
        pictures = sample(
            family,
            [config.prompt[row] for row, _ in pairs],
            [seed for _, seed in pairs],
            negative=config.negative,
            steps=config.steps,
            guidance=config.guidance,
            size=config.size,
            batch=config.batch,
        )
        yield from zip(pairs, pictures, strict=True)


def _attach(family: Family, config: Config) -> None:
    """All adapters on the model, at their scales. Raises Fault that names the tensors that do not belong there."""
    from finetune import export

    names = [f"adapter_{number}" for number in range(len(config.adapter))]
    for path, name in zip(config.adapter, names, strict=True):
        export.attach(family, path, name)
    if names:
        family.pipeline.set_adapters(names, adapter_weights=list(_scales(config)))


def _checked(path: Path, scale: float) -> dict[str, Any]:
    """What is told of an adapter. Its file is read here already, whole, so that a broken one is refused at once."""
    import hashlib

    from finetune import weights

    weights.load_tensors(path)
    with path.open("rb") as file:
        return {"name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest(), "scale": scale}


def _require_sense(config: Config) -> None:
    if not config.prompt or not all(prompt.strip() for prompt in config.prompt):
        raise Fault('--prompt: say what to draw, e.g. --prompt "a photo of a dog on a beach".')
    for name in ("count", "steps", "batch"):
        if getattr(config, name) < 1:
            raise Fault(f"--{name} {getattr(config, name)}: at least 1.")
    if config.seed < 0:
        raise Fault(f"--seed {config.seed}: a seed is 0 or more.")
    if len(config.scale) not in (1, len(config.adapter)):
        raise Fault(
            f"--scale: {len(config.scale)} numbers for {len(config.adapter)} adapters. Give one for all, or one each."
        )


def _scales(config: Config) -> tuple[float, ...]:
    return config.scale * len(config.adapter) if len(config.scale) == 1 else config.scale


def _seeds(config: Config) -> range:
    return range(config.seed, config.seed + config.count)


def _files(config: Config) -> dict[tuple[int, int], Path]:
    """The file of each (prompt, seed). Raises Fault when something is there and is not to be written over."""
    files = {
        (row, seed): config.output / f"{row + 1:02d}-{_slug(prompt)}-seed{seed}.png"
        for row, prompt in enumerate(config.prompt)
        for seed in _seeds(config)
    }
    if config.output.exists() and not config.output.is_dir():
        raise Fault(f"{config.output}: a file, where --output names a folder.")
    there = [path for path in (*files.values(), config.output / GRID) if path.exists()]
    if there and not config.overwrite:
        raise Fault(
            f"{config.output}: {len(there)} of the pictures are there already. "
            "Name another --output, or give --overwrite to write over them.",
            [path.name for path in there],
        )
    return files


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Fault(f"{folder}: cannot be made ({error.strerror}). Name another --output.") from error


def _slug(prompt: str) -> str:
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"


def _title(config: Config) -> str:
    from finetune.provenance import public_model

    adapters = zip(config.adapter, _scales(config), strict=True)
    return " + ".join([public_model(config.model.model), *(f"{path.stem} x {scale:g}" for path, scale in adapters)])
