"""finetune data preview FOLDER: a contact sheet of the pictures with their crops, sizes and captions.

What cannot be trained is on the sheet too, framed in red; the exit status is then 1. Of the data nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.commands.reading import Reading
from finetune.errors import Failure, Fault
from finetune.settings import Data, Framing, Model

if TYPE_CHECKING:
    from finetune.data.framing.frames import Framed
    from finetune.data.reading.found import Problem

MULTIPLE = 64
"""Of the sides, where the model is not at hand: what Stable Diffusion needs, and SDXL's own table keeps to."""


@dataclass(frozen=True)
class Config(Reading):
    """Draw a contact sheet: each picture with its crop, its training size and its caption."""

    output: Path = Path("sheet.png")
    """PNG file to write. Further pages get -2, -3, ... before the ending."""
    pages: int = 20
    """Draw at most so many pages; 0: all. Pictures that cannot be trained come first."""
    overwrite: bool = False
    """Write over a sheet that is there already."""


def main(config: Config) -> None:
    data = config.chosen()
    if config.pages < 0:
        raise Fault(f"--pages {config.pages}: a number of pages; 0 draws all.")

    from rich.console import Console
    from rich.progress import track

    from finetune.data.checking import lenient
    from finetune.data.framing import frames, sheet
    from finetune.data.reading import pictures, sources

    console = Console(stderr=True)

    def shown(items: Sequence[Any], what: str) -> Any:
        return track(items, what, console=console, transient=True)

    pictures.colour(data.background)
    frames.check(config.framing)
    resolutions, multiple = _made_for(config.model, config.framing)
    sheet.files(config.output, 1, config.overwrite)  # refused before the pictures are read
    examples, problems = sources.survey(lenient.captioned(data), config.captions)
    if not examples and not any(problem.code == "picture" for problem in problems):
        sources.refuse(problems, data)
    found = list(frames.frame(examples, config.framing, resolutions, multiple, config.train.seed))
    framed = _marked(found, problems)
    title = Path(data.data).name if data.data else "concepts"
    written = sheet.write(framed, config.output, title, data.background, config.pages, config.overwrite, shown)
    for line in frames.describe(framed):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    print("\n".join(str(file) for file in written))
    _refuse(found, problems, data)


def _marked(framed: Sequence[Framed], problems: Sequence[Problem]) -> list[Framed]:
    """What is wrong with a picture's data, put to how it is framed; those that could not be read come first."""
    from finetune.data.examples import Example
    from finetune.data.framing.frames import Framed

    told: dict[tuple[int, str], list[str]] = {}
    for problem in problems:
        for file in problem.files or (problem.text.partition(": ")[0],):
            told.setdefault((problem.concept, file), []).append(problem.text.removeprefix(f"{file}: "))
    marked = []
    for one in framed:
        faults = told.pop((one.example.concept, one.example.name), [])
        marked.append(replace(one, faults=(*faults, *one.faults)))
    lost = {file for problem in problems if problem.code == "picture" for file in problem.files}
    unread = [
        Framed(Example(Path(file), ("",), file, concept=concept), faults=tuple(faults))
        for (concept, file), faults in told.items()
        if file in lost
    ]
    return [*unread, *marked]


def _refuse(framed: Sequence[Framed], problems: Sequence[Problem], data: Data) -> None:
    """What keeps training from starting, now that the sheet shows it: of the data, then of the framing."""
    from finetune.data.plan import require
    from finetune.data.reading import sources

    said: list[Fault] = []
    for check in (lambda: sources.refuse(problems, data), lambda: require(framed)):
        try:
            check()
        except Fault as fault:
            said.append(fault)
    if said:
        message = "\n".join(fault.message for fault in said)
        details = [line for fault in said for line in fault.details]
        raise Failure(f"The sheet is written, but training would not start.\n{message}", details)


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
