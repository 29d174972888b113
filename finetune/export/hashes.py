"""Hashes that headers tell: of all bytes behind the header, so that they stay when what the header says changes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import weights

BLANKS = {"sshs_model_hash": "0" * 64, "modelspec.hash_sha256": "0x" + "0" * 64, "sshs_legacy_hash": "0" * 8}
"""What the hashes are called, and as many characters as each has. The first two are the same; the third, which
AUTOMATIC1111 once knew files by, is of a short piece (kohya-ss/sd-scripts, library/train_util.py)."""
PIECE = range(0x100000, 0x110000)
"""Bytes of the file that the third is of, were only what begins with `ss_` in its header."""


@dataclass(frozen=True)
class Claim:
    """A hash that a header tells, and what it is."""

    name: str
    told: str
    found: str

    @property
    def holds(self) -> bool:
        return self.told.lower() == self.found


class Digest:
    """Fed with a file's bytes behind its header, piece by piece."""

    def __init__(self, entries: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        told = {name: value for name, value in metadata.items() if name.startswith("ss_")}
        self._place = len(weights.header_bytes(entries, told))
        self._whole, self._piece = hashlib.sha256(), hashlib.sha256()

    def update(self, piece: memoryview | bytes) -> None:
        begin, end = (max(0, place - self._place) for place in (PIECE.start, PIECE.stop))
        self._whole.update(piece)
        self._piece.update(piece[begin:end])
        self._place += len(piece)

    def values(self) -> dict[str, str]:
        """By name, as `BLANKS`."""
        whole = self._whole.hexdigest()
        return dict(zip(BLANKS, (whole, f"0x{whole}", self._piece.hexdigest()[:8]), strict=True))


def of_file(path: Path) -> dict[str, str]:
    """The hashes of a file, whether its header tells them or not. Reads it once. Raises Fault as `weights` does."""
    entries, metadata, start = weights.read_header(path)
    digest = Digest(entries, metadata)
    with path.open("rb") as file:
        file.seek(start)
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.values()


def claims(path: Path) -> list[Claim]:
    """The hashes that the file's header tells."""
    told = weights.read_metadata(path)
    names = [name for name in BLANKS if name in told]
    found = of_file(path) if names else {}
    return [Claim(name, told[name], found[name]) for name in names]
