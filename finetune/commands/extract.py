"""finetune extract: the difference of two models as an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from finetune.commands import rewriting
from finetune.commands.rewriting import Base, Format
from finetune.errors import Fault
from finetune.settings import Precision


@dataclass(frozen=True)
class Config:
    """Write what fine-tuning changed in a model as a LoRA: the best approximation of each layer's difference.

    Both models are read one tensor at a time. The error is stated, as read back from the file.
    """

    tuned: str
    """The fine-tuned model: a diffusers folder, a .safetensors checkpoint or a hub name."""
    output: Path
    """The .safetensors file to write."""
    base: Base = field(default_factory=Base)
    rank: int | None = None
    """Rank of each layer. With --energy: at most this rank."""
    energy: float | None = None
    """Each layer gets the rank that keeps this share of its change (of the sum of its squared singular values)."""
    layers: Literal["attention", "all"] = "attention"
    """`attention`: the layers that adapters are put on. `all`: every linear and convolutional layer that differs."""
    format: Format = "kohya"
    """`kohya` for A1111, ComfyUI, Forge, InvokeAI and sd-scripts; `diffusers` for diffusers and PEFT."""
    precision: Precision = "fp16"
    """Precision of the adapter."""
    tuned_config: str | None = None
    """As --model-config, for the fine-tuned model."""
    overwrite: bool = False
    """Write over a file that is there already."""


def main(config: Config) -> None:
    rewriting.require_free(config.output, config.overwrite)
    if config.rank is None and config.energy is None:
        raise Fault("of which size? Give --rank, e.g. 32, or --energy, e.g. 0.9, or both.")
    rule = rewriting.rule(config.rank, config.energy)

    from rich.console import Console
    from rich.progress import track

    from finetune import engine, provenance
    from finetune.export import tools

    base = config.base.weights()
    if base is None or config.base.model is None:
        raise Fault("the difference from what? Name the base: --model.")
    tuned = Base(config.tuned, model_config=config.tuned_config).weights()
    assert tuned is not None
    made = tools.extract(
        base,
        tuned,
        config.output,
        config.format,
        rule,
        every=config.layers == "all",
        dtype=engine.DTYPES[config.precision],
        metadata={"model": provenance.public_model(config.base.model), "layers": config.layers},
        track=lambda items, what: track(items, what, console=Console(stderr=True), transient=True),
    )
    print(*rewriting.said(made), sep="\n")
    if made.others:
        more = "" if config.layers == "all" else " --layers all takes more of them."
        print(f"not in the file: {made.others} other tensors, {made.outside:.3g} of the whole difference's norm.{more}")
