"""finetune data preview FOLDER: a contact sheet of the pictures with their crops, sizes and captions.

What cannot be trained is on the sheet too, framed in red; the exit status is then 1. Of the data nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, Suppress

from finetune.data.commands.check import chosen
from finetune.errors import Failure, Fault
from finetune.settings import Adapter, Captions, Data, Framing, Loss, Model, Optim, Prior, Samples, Train

if TYPE_CHECKING:
    from finetune.data.examples import Example
    from finetune.data.frames import Framed

NO_CAPTION = "(no caption)"
MULTIPLE = 64
"""Of the sides, where the model is not at hand: what Stable Diffusion needs, and SDXL's own table keeps to."""


@dataclass(frozen=True)
class Config:
    """Draw a contact sheet: each picture with its crop, its training size and its caption."""

    folder: Positional[str | None] = None
    """The pictures: a folder, or hf:NAME. Default: what the TOML file of --config says."""
    output: Path = Path("sheet.png")
    """PNG file to write. Further pages get -2, -3, ... before the ending."""
    pages: int = 20
    """Draw at most so many pages; 0: all. Pictures that cannot be trained come first."""
    overwrite: bool = False
    """Write over a sheet that is there already."""
    data: Data = field(default_factory=Data)
    captions: Captions = field(default_factory=Captions)
    framing: Framing = field(default_factory=Framing)
    model: Model = field(default_factory=Model)
    train: Annotated[Train, Suppress] = field(default_factory=Train)
    # Tables of a training's TOML file that say nothing about the pictures
    prior: Annotated[Prior, Suppress] = field(default_factory=Prior)
    adapter: Annotated[Adapter, Suppress] = field(default_factory=Adapter)
    optim: Annotated[Optim, Suppress] = field(default_factory=Optim)
    loss: Annotated[Loss, Suppress] = field(default_factory=Loss)
    samples: Annotated[Samples, Suppress] = field(default_factory=Samples)


def main(config: Config) -> None:
    data = chosen(config.folder, config.data)
    if config.pages < 0:
        raise Fault(f"--pages {config.pages}: a number of pages; 0 draws all.")

    from rich.console import Console
    from rich.progress import track

    from finetune.data import frames, pictures, sheet

    console = Console(stderr=True)

    def shown(items: Sequence[Any], what: str) -> Any:
        return track(items, what, console=console, transient=True)

    pictures.colour(data.background)
    frames.check(config.framing)
    resolutions, multiple = _made_for(config.model, config.framing)
    sheet.files(config.output, 1, config.overwrite)  # refused before the pictures are read
    examples, unread, refused = _read(data, config.captions, config.train.seed)
    framed = [*unread, *frames.frame(examples, config.framing, resolutions, multiple, config.train.seed)]
    title = Path(data.data or "concepts").name
    written = sheet.write(framed, config.output, title, data.background, config.pages, config.overwrite, shown)
    for line in frames.describe(framed):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    print("\n".join(str(file) for file in written))
    _raise(refused, [one for one in framed[len(unread) :] if one.faults])


def _read(data: Data, captions: Captions, seed: int) -> tuple[list[Example], list[Framed], Fault | None]:
    """The pictures that can be read, those that cannot, and why training would not begin with them, if it would not.

    A picture without a caption is no hindrance here.
    """
    from finetune.data import frames, lenient, sources

    if data.prompt is None and not data.concepts:
        data = replace(data, prompt=NO_CAPTION)
    try:
        examples, held_out = sources.read(data, captions, seed)
        return [*examples, *held_out], [], None
    except Fault as fault:
        examples, refused = lenient.read(data), fault
    known = {example.path for example in examples}
    missing = [path for path in _pictures(data) if path not in known and path.name not in data.skip]
    unread = [frames.unread(path, data.background) for path in missing]
    if not examples and not unread:
        raise refused
    return examples, unread, refused


def _pictures(data: Data) -> list[Path]:
    """The picture files of the data's folders, readable or not."""
    from finetune.data import folder, lenient

    found: list[Path] = []
    for path in lenient.folders(data):
        with suppress(Fault):
            found += folder.look(path).pictures
    return found


def _raise(refused: Fault | None, ill: Sequence[Framed]) -> None:
    """What keeps training from starting, now that the sheet shows it: of the data, then of the framing."""
    from finetune.data.frames import name

    faults = [f"{name(one.example)}: {fault}" for one in ill for fault in one.faults]
    advice = " ".join(dict.fromkeys(advice for one in ill for advice in one.advice))
    if refused is not None:
        raise Failure(f"The sheet is written; training would not start. {refused.message}", [*refused.details, *faults])
    if ill:
        raise Failure(f"The sheet is written; training would not start with those in red. {advice}", faults)


def _made_for(model: Model, framing: Framing) -> tuple[tuple[int, ...], int]:
    """The resolutions, and what sides are multiples of, as far as the model can be looked at without loading it."""
    from finetune.glance import glance

    known = glance(model)
    if known is None and not framing.resolution:
        raise Fault(
            f"--model {model.model}: not on this machine, so its size is not known here. Say --resolution, e.g. "
            "512 for Stable Diffusion 1.x, 1024 for SDXL; sides are then taken as multiples of 64."
        )
    if known is None:
        return framing.resolution, MULTIPLE
    return framing.resolution or (known.resolution,), known.multiple
