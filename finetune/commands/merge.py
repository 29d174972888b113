"""finetune merge: several adapters as one file, or merged into their base model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from finetune.commands import rewriting
from finetune.commands.rewriting import Base, Format
from finetune.errors import Fault
from finetune.settings import Precision


@dataclass(frozen=True)
class Config:
    """Add the changes of several adapters, each multiplied by its weight: as one adapter, or in the base itself.

    Without --rank the sum is exact: the ranks add up. With it, it is the best approximation; the error is stated.
    """

    adapter: tuple[Path, ...]
    """Adapter files (.safetensors), in any formats."""
    output: Path
    """The .safetensors file to write; with --into-base, the folder."""
    scale: tuple[float, ...] = (1.0,)
    """Weight of each adapter: one number for all, or one each. May be negative."""
    rank: int | None = None
    """Rank of the result, at most. Kinds other than LoRA can only be merged so. Default: the sum of the ranks."""
    into_base: bool = False
    """Write the base model with the adapters merged into its weights, as a diffusers folder. Needs --model."""
    format: Format | None = None
    """Format of the result. Default: as the first file, `diffusers` where that is in PEFT's own."""
    precision: Precision | None = None
    """Precision of the result. Default: the finest of the files'; of a model, fp32."""
    base: Base = field(default_factory=Base)
    overwrite: bool = False
    """Write over a file that is there already."""


def main(config: Config) -> None:
    if not config.adapter:
        raise Fault("which adapters? --adapter ONE.safetensors TWO.safetensors")
    if len(config.scale) not in (1, len(config.adapter)):
        raise Fault(f"--scale: {len(config.scale)} numbers for {len(config.adapter)} adapters. Give one, or one each.")
    if not all(math.isfinite(scale) for scale in config.scale):
        raise Fault(f"--scale {' '.join(map(str, config.scale))}: finite numbers only.")
    if config.into_base:
        _into_base(config)
        return
    rewriting.require_free(config.output, config.overwrite)
    rule = rewriting.rule(config.rank, None)

    from finetune.export import tools

    made = tools.combine(
        list(zip(config.adapter, _scales(config), strict=True)),
        config.output,
        config.format or rewriting.format_of(config.adapter[0]),
        rule,
        tool="merge",
        dtype=rewriting.dtype(config.precision),
        base=config.base.weights(),
    )
    print(*rewriting.said(made), sep="\n")


def _into_base(config: Config) -> None:
    """Through diffusers: what cannot be loaded there is refused before anything is written."""
    refused = [name for name in ("rank", "format") if getattr(config, name) is not None]
    if refused or config.overwrite:
        raise Fault(f"--{(refused or ['overwrite'])[0]}: of an adapter file, not of a model: leave it out.")
    if config.base.model is None:
        raise Fault("--into-base: which base? Name it: --model.")
    if config.output.exists() and (not config.output.is_dir() or any(config.output.iterdir())):
        raise Fault(f"{config.output}: there is something there already; a model is written to a new or empty folder.")

    from finetune import engine, export, families, weights

    for path in config.adapter:
        weights.check_file(path)
    family = families.load(families.Source(config.base.model, config.base.revision, config.base.model_config))
    names = [f"adapter_{number}" for number in range(len(config.adapter))]
    for path, name in zip(config.adapter, names, strict=True):
        export.attach(family, path, name)
    export.set_strengths(family, dict(zip(names, _scales(config), strict=True)))
    export.merged(family, config.output, dtype=engine.DTYPES[config.precision or "fp32"])
    print(f"{config.output}: {family.title}, with {len(names)} adapters in its weights; loaded back and compared")


def _scales(config: Config) -> tuple[float, ...]:
    return config.scale * len(config.adapter) if len(config.scale) == 1 else config.scale
