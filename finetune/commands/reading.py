"""What the commands on data read: a folder, or any training's TOML file with all of its tables."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, Suppress

from finetune.errors import Fault
from finetune.settings import (
    Adapter,
    Captions,
    Data,
    Framing,
    Full,
    Loss,
    Measure,
    Model,
    Optim,
    Output,
    Pivot,
    Prior,
    Samples,
    Slider,
    Train,
    Words,
)


@dataclass(frozen=True)
class Reading:
    """The settings of a training that decide what is made of its pictures; its other tables are taken and ignored."""

    folder: Positional[str | None] = None
    """The pictures: a folder, or hf:NAME. Default: what the TOML file of --config says."""
    data: Data = field(default_factory=Data)
    captions: Captions = field(default_factory=Captions)
    framing: Framing = field(default_factory=Framing)
    model: Model = field(default_factory=Model)
    train: Annotated[Train, Suppress] = field(default_factory=Train)
    prior: Annotated[Prior, Suppress] = field(default_factory=Prior)
    words: Annotated[Words, Suppress] = field(default_factory=Words)
    pivot: Annotated[Pivot, Suppress] = field(default_factory=Pivot)
    slider: Annotated[Slider, Suppress] = field(default_factory=Slider)
    adapter: Annotated[Adapter, Suppress] = field(default_factory=Adapter)
    full: Annotated[Full, Suppress] = field(default_factory=Full)
    optim: Annotated[Optim, Suppress] = field(default_factory=Optim)
    loss: Annotated[Loss, Suppress] = field(default_factory=Loss)
    samples: Annotated[Samples, Suppress] = field(default_factory=Samples)
    measure: Annotated[Measure, Suppress] = field(default_factory=Measure)

    def chosen(self) -> Data:
        """The data that the positional FOLDER or the settings name. Raises Fault for both, none, and a slider."""
        if self.slider != Slider():
            raise Fault("the settings are a slider's, which is trained without pictures: there is nothing to look at.")
        if self.folder is not None and (self.data.data is not None or self.data.concepts):
            raise Fault(f"{self.folder}: the settings name data too. Give the one or the other.")
        if self.folder is None and self.data.data is None and not self.data.concepts:
            raise Fault("which data? Give a folder of pictures, hf:NAME, or a TOML file that names it: --config FILE.")
        return self.data if self.folder is None else replace(self.data, data=self.folder)


@dataclass(frozen=True)
class RunReading(Reading):
    """The same for commands that write nothing: a run's own `settings.toml` names an output, too."""

    output: Annotated[Output, Suppress] = field(default_factory=lambda: Output(Path("run")))
