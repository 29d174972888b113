"""finetune compare RUN ...: evaluated runs side by side, and their mean over subjects with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from finetune.errors import Fault


@dataclass(frozen=True)
class Config:
    """Show evaluated runs side by side: each one's result, or its best state, and the mean over the runs.

    Reads what `finetune evaluate` wrote. Runs that were measured in different ways are not compared.
    """

    runs: Positional[tuple[Path, ...]]
    """Folders of runs, two or more."""
    state: Literal["last", "best"] = "last"
    """The last state of each that was measured, or the best one by the rule of `finetune evaluate`."""
    format: Literal["markdown", "csv", "json"] = "markdown"
    """What is printed."""
    output: Path | None = None
    """A file to write it to instead. Nothing that is there is written over."""


def main(config: Config) -> None:
    from finetune.evaluation import comparison

    if len(config.runs) < 2:
        raise Fault("name two runs or more: `finetune compare RUN RUN ...`.")
    if config.output is not None and config.output.exists():
        raise Fault(f"{config.output}: is there already, and is not written over. Name another --output.")
    text = comparison.compare(config.runs, config.state, config.format)
    if config.output is None:
        print(text, end="")
    else:
        config.output.write_text(text, encoding="utf-8")
        print(config.output)
