"""Files that are written whole or not at all, and what is said where a disk takes no more."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune import signals
from finetune.errors import Failure, Fault

REFUSED = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than is allowed there",
    errno.EROFS: "the disk is read-only",
}
"""What a system says to one who writes, and to nobody else."""


def refusal(error: BaseException) -> str | None:
    """Why a disk has refused to be written; None for other errors. Libraries in Rust have the number in their text."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    return REFUSED.get(int(told[1]) if told else getattr(error, "errno", None) or 0)


@contextmanager
def written(place: Path | None = None) -> Iterator[None]:
    """Inside, files below `place` are written: a disk that refuses ends in a Failure that names what was written."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        if (why := refusal(error)) is None:
            raise
        file = getattr(error, "filename", None) or place or "a file"
        raise Failure(f"{file}: could not be written ({why}). Make room. {signals.advice()}") from error


def write_text(file: Path, text: str) -> None:
    """Written beside as `.NAME.writing` and renamed: readers see the old text or the whole new one.

    Raises Failure where the disk refuses.
    """
    beside = file.with_name(f".{file.name}.writing")
    with written(file):
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, file)
        finally:
            beside.unlink(missing_ok=True)
