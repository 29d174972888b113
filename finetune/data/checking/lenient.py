"""What can be read of a data set that training would refuse: the doctor and the preview go on where `read` stops."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from finetune import settings
from finetune.data.examples import Example
from finetune.data.reading import concepts, sources
from finetune.data.reading.library import PREFIX
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


def captioned(data: Data) -> Data:
    """The data with a caption for every picture: to lack one is no hindrance then."""
    given = tuple(replace(one, prompt=one.prompt or data.prompt or NO_CAPTION) for one in data.concepts)
    return replace(data, prompt=data.prompt or NO_CAPTION, concepts=given, strict=False)


def read(data: Data, texts: settings.Captions | None = None) -> list[Example]:
    """The pictures that can be decoded, those without a caption too. Raises no Fault."""
    with suppress(Fault):
        return sources.survey(captioned(data), texts)[0]
    return []
