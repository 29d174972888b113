"""What can be read of a data set that training would refuse: the doctor and the preview go on where `read` stops."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from finetune import settings
from finetune.data import concepts, sources
from finetune.data.examples import Example
from finetune.data.library import PREFIX
from finetune.errors import Fault
from finetune.settings import Data

NO_CAPTION = "(no caption)"
"""Stands for the caption of a picture that has none."""


def folders(data: Data) -> list[Path]:
    """The folders that pictures are read from."""
    with suppress(Fault):
        names = [part.data.data or "" for part in concepts.parts(data)]
        return [Path(name) for name in dict.fromkeys(names) if name and not name.startswith(PREFIX)]
    return []


def read(data: Data, texts: settings.Captions | None = None) -> list[Example]:
    """The pictures that can be decoded, those without a caption too. Raises no Fault."""
    given = [replace(one, prompt=one.prompt or data.prompt or NO_CAPTION) for one in data.concepts]
    told = replace(data, prompt=data.prompt or NO_CAPTION, concepts=tuple(given), strict=False)
    with suppress(Fault):
        return sources.survey(told, texts)[0]
    return []
