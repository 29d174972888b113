"""What the tools on adapter files have in common: their base, their output, what they say of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune import weights
from finetune.errors import Fault
from finetune.imports import swift
from finetune.settings import Precision

if TYPE_CHECKING:
    import torch

    from finetune.export.base_weights import BaseWeights
    from finetune.export.remade import Rule
    from finetune.export.tools import Made

Format = Literal["diffusers", "kohya"]
SHOWN = 1e-7
"""Errors below this are what float32 itself rounds."""


@dataclass(frozen=True)
class Base:
    """The base model of the adapters."""

    model: str | None = None
    """Their base: `toybox`, a hub name, a diffusers folder or a .safetensors checkpoint."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    model_config: str | None = None
    """For a .safetensors checkpoint: folder or hub name of a diffusers model of the same kind."""

    def weights(self) -> BaseWeights | None:
        """To be read one at a time; None where no model is named."""
        from finetune.export.base_weights import BaseWeights
        from finetune.families import Source

        return BaseWeights(Source(self.model, self.revision, self.model_config)) if self.model else None


def require_free(path: Path, overwrite: bool) -> None:
    """Raises Fault when a file is not to be written there."""
    if path.suffix != weights.SUFFIX:
        raise Fault(f"{path}: an adapter is written to a {weights.SUFFIX} file. Name it so.")
    if path.is_dir():
        raise Fault(f"{path}: a folder, where a file is to be written.")
    if path.exists() and not overwrite:
        raise Fault(f"{path}: is there already. Name another file, or give --overwrite.")


def rule(rank: int | None, energy: float | None) -> Rule:
    """Raises Fault for numbers that are none of a rank or a share."""
    with swift():
        from finetune.export.remade import Rule

    if rank is not None and rank < 1:
        raise Fault(f"rank {rank}: at least 1; 4 to 64 is usual.")
    if energy is not None and not 0 < energy <= 1:
        raise Fault(f"--energy {energy:g}: a share of the change, above 0 and at most 1, e.g. 0.95.")
    return Rule(rank, energy)


def dtype(precision: Precision | None) -> torch.dtype | None:
    """Of what is written: any precision, also on a CPU."""
    from finetune import engine

    return engine.DTYPES[precision] if precision else None


def format_of(path: Path) -> str:
    """The format of an adapter file, where none is asked for, for a LoRA: PEFT's own has no place for that."""
    from finetune.export import formats

    found = formats.format_of(path, weights.read_header(path)[0])
    return "diffusers" if found == "peft" else found


def said(made: Made) -> Iterator[str]:
    """The file, and how far it is from what it was made of."""
    low, high = made.ranks
    ranks = "" if not high else f", rank {low}" if low == high else f", rank {low} to {high}"
    yield f"{made.path}: {size(made.path)}{ranks}"
    if made.gaps:
        worst, name = made.worst
        yield f"error of the change, as read back: {_error(made.off)} in all {len(made.gaps)} layers together"
        if worst >= SHOWN:
            yield f"the most in one layer: {_error(worst)}, {name}"


def size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.2f} MB"


def _error(share: float) -> str:
    return f"{share:.3g} of its norm" if share >= SHOWN else "none but rounding"
