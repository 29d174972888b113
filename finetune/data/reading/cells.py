"""The cells of a table as what they stand for: files in a folder, captions, numbers, points."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from finetune.data.reading import folder
from finetune.data.reading.found import one_line
from finetune.data.reading.pictures import printable

SHOWN = 60
"""Letters of a broken cell or line that are shown"""


class Ill(Exception):
    """What is wrong with a cell, found where its line is not known."""


class Place:
    """A folder whose files rows may name; nothing outside it is reached, by no name and no link."""

    def __init__(self, root: Path) -> None:
        self.root, self.true_root = root, root.resolve()
        self._names: dict[Path, dict[str, str]] = {}

    def file(self, given: Any, column: str) -> Path:
        """The file of a name. Raises Ill with the reason."""
        if not isinstance(given, str) or not given.strip():
            raise Ill(f"{column} is missing" if given in (None, "") else f"{column} is not text: {json.dumps(given)}")
        shown = printable(given)
        parts = PurePosixPath(given)
        if parts.is_absolute() or PureWindowsPath(given).drive or PureWindowsPath(given).root:
            raise Ill(f"{column} {shown}: an absolute path. Name files from the folder on: {printable(parts.name)}")
        if ".." in parts.parts or ".." in PureWindowsPath(given).parts:
            raise Ill(f"{column} {shown}: leads out of the folder (..). Only files in it are read")
        if "\0" in given or _surrogate(given):
            raise Ill(f"{column} {shown}: not a file name")
        path = self.root.joinpath(*self._spelled(parts))
        try:
            true = path.resolve(strict=True)
        except (OSError, RuntimeError):
            near = self._near(path)
            hint = f" Is {near} meant?" if near else " Folders are parted by /." if "\\" in given else ""
            raise Ill(f"{column} {shown}: there is no such file.{hint}") from None
        if not true.is_relative_to(self.true_root):
            raise Ill(f"{column} {shown}: a link that leads out of the folder. Only files in it are read")
        if not true.is_file():
            raise Ill(f"{column} {shown}: not a file")
        return path

    def _spelled(self, parts: PurePosixPath) -> tuple[str, ...]:
        """The parts of a path as the disk spells them, where accents are put together in another way."""
        here, spelled = self.root, []
        for part in parts.parts:
            name = part if os.path.lexists(here / part) else self._listed(here).get(folder.composed(part), part)
            spelled.append(name)
            here = here / name
        return tuple(spelled)

    def _listed(self, parent: Path) -> dict[str, str]:
        if parent not in self._names:
            try:
                names = os.listdir(parent)
            except OSError:
                names = []
            self._names[parent] = {folder.composed(name): name for name in names}
        return self._names[parent]

    def _near(self, path: Path) -> str | None:
        names = self._listed(path.parent)
        folded = {name.casefold(): name for name in names}
        near = get_close_matches(path.name.casefold(), folded, n=1)
        return printable(folded[near[0]]) if near else None


class Cells:
    """The cells of one row as what they stand for, from JSON or from CSV's texts; faults are gathered."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values, self.faults = values, list[str]()

    def captions(self, column: str | None) -> tuple[str, ...]:
        given = self.values.get(column) if column else None
        if isinstance(given, str) and column == "captions" and given.lstrip().startswith("["):
            given = _json(given)  # a list in a cell of CSV
        texts = [given] if isinstance(given, str) else given if given is not None else []
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            self._fault(column or "", "text, or a list of texts")
            return ()
        if any("\0" in text or _surrogate(text) for text in texts):
            self.faults.append(f"{column}: holds what is no letter (a zero byte, half of a surrogate pair)")
            return ()
        return tuple(dict.fromkeys(line for text in texts if (line := one_line(text))))

    def number(self, column: str, standard: float, expected: str, fits: Callable[[float], bool]) -> float:
        given = self.values.get(column)
        if given is None:
            return standard
        value = _number(given)
        if value is not None and fits(value):
            return value
        self._fault(column, expected)
        return standard

    def focus(self) -> tuple[float, float] | None:
        given: Any = self.values.get("focus")
        if isinstance(given, str):
            given = _json(given)
        separate = [self.values.get(column) for column in ("focus_x", "focus_y")]
        if given is None and separate == [None, None]:
            return None
        if given is not None and separate != [None, None]:
            self.faults.append("focus, and focus_x or focus_y too: give one of both")
            return None
        point = [_number(value) for value in (separate if given is None else given if isinstance(given, list) else [])]
        x, y = point if len(point) == 2 else (None, None)
        if x is None or y is None or not (0 <= x <= 1 and 0 <= y <= 1):
            column = "focus" if given is not None else "focus_x" if x is None or not 0 <= x <= 1 else "focus_y"
            expected = "[x, y], from the top left," if column == "focus" else "a share of the width or height,"
            self._fault(column, f"{expected} each from 0 to 1" if column == "focus" else f"{expected} from 0 to 1")
            return None
        return x, y

    def path(self, column: str, place: Place) -> Path | None:
        if self.values.get(column) is None:
            return None
        try:
            return place.file(self.values[column], column)
        except Ill as error:
            self.faults.append(str(error))
            return None

    def _fault(self, column: str, expected: str) -> None:
        given = json.dumps(self.values.get(column), ensure_ascii=False)
        self.faults.append(f"{column} = {printable(given[:SHOWN])}: expected {expected}")


def _json(text: str) -> Any:
    """What a text of CSV stands for where it is JSON, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _number(given: Any) -> float | None:
    """A finite number, from CSV as text; None for anything else."""
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        return None
    try:
        value = float(given)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _surrogate(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)
