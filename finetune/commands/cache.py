"""finetune data cache FOLDER: compute latents and text embeddings ahead, so that a training finds them there.

It can be stopped at any moment and started again: what was computed stays. Several may run at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from finetune.commands.reading import RunReading
from finetune.errors import Fault


@dataclass(frozen=True)
class Config(RunReading):
    """Compute ahead what a training on this data needs, with the same settings: latents and text embeddings."""

    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of the text encoders, as the training has it. Default: what the TOML file says, else fp32."""


def main(config: Config) -> None:
    data = config.chosen()
    if not data.use_cache:
        raise Fault("--no-use-cache: this command fills the cache, so it cannot go without one.")

    from rich.console import Console
    from rich.progress import track

    import finetune as ft
    from finetune import engine

    console = Console(stderr=True)
    dtype = engine.dtype(config.precision or config.train.precision)
    ft.data.require(data, config.captions, config.framing, config.model, seed=config.train.seed)
    trained, held = ft.data.read(data, config.captions, config.train.seed)
    family = ft.load(ft.Source(**vars(config.model)), dtype, engine.device())
    sides = config.framing.resolution or (family.resolution(),)
    items = ft.data.plan(
        [*trained, *held], config.framing, sides, family.multiple(), config.captions, config.train.seed
    )

    def shown(items: Iterable[Any], what: str, total: int) -> Iterator[Any]:
        yield from track(items, what, total, console=console)

    print(ft.encode(family, items, (), (), data, config.captions, shown).said())
