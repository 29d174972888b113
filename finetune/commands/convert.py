"""finetune convert FILE OUT: an adapter file in another format, or another precision, or as a plain LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from finetune.commands import rewriting
from finetune.commands.rewriting import Base, Format
from finetune.settings import Precision


@dataclass(frozen=True)
class Config:
    """Write an adapter in another format. Its weights stay as they are, to the bit, unless the precision changes.

    What was written is read back and compared layer by layer before it takes its name.
    """

    file: Positional[Path]
    """The adapter, in any format."""
    out: Positional[Path]
    """The .safetensors file to write."""
    format: Literal[Format, "peft"]
    """`kohya` for A1111, ComfyUI, Forge, InvokeAI and sd-scripts; `diffusers` for diffusers and PEFT; `peft` for PEFT,
    of kinds that diffusers does not load."""
    to_lora: int | None = None
    """Make a plain LoRA of this rank out of any kind (LoHa, OFT, DoRA ...), by singular values; the error is stated."""
    precision: Precision | None = None
    """Precision of the tensors. Default: their own."""
    base: Base = field(default_factory=Base)
    overwrite: bool = False
    """Write over a file that is there already."""


def main(config: Config) -> None:
    rewriting.require_free(config.out, config.overwrite)
    rule = rewriting.rule(config.to_lora, None)

    from finetune.export import tools

    base, dtype = config.base.weights(), rewriting.dtype(config.precision)
    if config.to_lora is None:
        made = tools.convert(config.file, config.out, config.format, dtype=dtype, base=base)
    else:
        one = [(config.file, 1.0)]
        made = tools.combine(one, config.out, config.format, rule, tool="convert", dtype=dtype, base=base)
    print(*rewriting.said(made), sep="\n")
    if config.to_lora is None:
        print(
            "every tensor has the same bits" if made.alike else "the same changes, to a rounding error of the precision"
        )
