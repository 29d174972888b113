"""finetune resize FILE OUT: an adapter at a lower rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from finetune.commands import rewriting
from finetune.commands.rewriting import Base, Format
from finetune.errors import Fault
from finetune.settings import Precision


@dataclass(frozen=True)
class Config:
    """Make an adapter smaller: the best approximation of each layer's change (its largest singular values).

    The error is stated, as read back from the file.
    """

    file: Positional[Path]
    """The adapter, in any format and of any kind; the result is a LoRA."""
    out: Positional[Path]
    """The .safetensors file to write."""
    rank: int | None = None
    """The same rank for all layers; those of a lower rank keep theirs. With --energy: at most this rank."""
    energy: float | None = None
    """Each layer gets the rank that keeps this share of its change (of the sum of its squared singular values)."""
    format: Format | None = None
    """Format of the result. Default: as the file, `diffusers` where that is in PEFT's own."""
    precision: Precision | None = None
    """Precision of the result. Default: as the file."""
    base: Base = field(default_factory=Base)
    overwrite: bool = False
    """Write over a file that is there already."""


def main(config: Config) -> None:
    rewriting.require_free(config.out, config.overwrite)
    if config.rank is None and config.energy is None:
        raise Fault("to which size? Give --rank, e.g. 8, or --energy, e.g. 0.95, or both.")
    rule = rewriting.rule(config.rank, config.energy)

    from finetune.export import tools

    made = tools.combine(
        [(config.file, 1.0)],
        config.out,
        config.format or rewriting.format_of(config.file),
        rule,
        tool="resize",
        dtype=rewriting.dtype(config.precision),
        base=config.base.weights(),
    )
    print(*rewriting.said(made), f"before: {rewriting.size(config.file)}", sep="\n")
