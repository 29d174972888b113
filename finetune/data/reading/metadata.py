"""A folder of pictures with a table: metadata.jsonl or metadata.csv, the form of `datasets`' imagefolder.

Each row has a `file_name`, below the folder, and may have a caption (text, caption, captions or prompt; a list is
several), a `focus` ([x, y], or focus_x and focus_y), a `mask`, a `weight` and `repeats`. No row leads out of the
folder.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from finetune.data.reading import folder
from finetune.data.reading.cells import SHOWN, Cells, Ill, Place
from finetune.data.reading.folder import Listing
from finetune.data.reading.found import Found, Picture, Problem, listed, not_utf8
from finetune.data.reading.pictures import printable
from finetune.errors import Fault

TABLES = ("metadata.jsonl", "metadata.csv")
FILE = "file_name"
CAPTIONS = ("text", "caption", "captions", "prompt")
"""Names of a column of captions"""
OTHERS = ("focus", "focus_x", "focus_y", "mask", "weight", "repeats")


@dataclass(frozen=True)
class Row:
    line: int
    """Of the file, from 1"""
    values: Mapping[str, Any]


@dataclass
class Table:
    """What a metadata file holds, and what is wrong with its lines."""

    file: Path
    rows: list[Row] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    faults: list[tuple[int, str]] = field(default_factory=list)
    """(line, what is wrong with it)"""


def table_of(listing: Listing) -> Path | None:
    """The folder's metadata file. Raises Fault when there are two: they may contradict each other."""
    files = [path for path in listing.others if path.name in TABLES]
    if len(files) > 1:
        raise Fault(f"{printable(listing.folder)}: both {listed(TABLES)}. Keep the one that says what is meant.")
    return files[0] if files else None


def find(
    listing: Listing, file: Path, skip: Sequence[str] = (), several: bool = False, column: str | None = None
) -> Found:
    """The pictures of a folder with a table: its rows', and those that no row names, which have their caption files.

    Raises Fault when there is no picture, or the table has no column `file_name` or no such `column` for captions.
    """
    table = read(file)
    caption = _caption_column(table, column)
    named, problems = _named(listing, table)
    pictures = _pictures(table, named, caption, problems)
    around, masks = [listing, *_others(listing, pictures)], {one.mask for one in pictures.values()}
    here = _below(listing.folder)
    for one in around:
        own, wrong = folder.own_captions(one, skip, several)
        problems += wrong
        for path in (path for path in one.pictures if path in pictures or path not in masks):
            pictures[path] = _joined(pictures.get(path), path, here(path), own, file, problems)
    left = [one for one in pictures.values() if not {one.name, one.path.name} & set(skip)]
    if not left and not problems:
        raise Fault(folder.none_found(listing))
    known = {name for one in pictures.values() for name in (one.name, one.path.name)}
    known = known.union(*(one.names for one in around))
    problems += [folder.unknown_skip(name, known) for name in skip if name not in known]
    return Found(sorted(left, key=lambda one: os.fsencode(one.name)), problems)


def read(file: Path) -> Table:
    """The rows of a metadata file. Raises Fault when it is not UTF-8 text or lacks the column `file_name`."""
    name = printable(file.name)
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise Fault(f"{printable(file)}: cannot be read: {os.strerror(error.errno or 0)}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise not_utf8(f"{name}, line {line}", error.object, error, name) from error
    table = Table(file)
    for line, values in _json_lines(text, table) if file.suffix == ".jsonl" else _csv_lines(text, table):
        table.rows.append(Row(line, values))
    table.columns = tuple(dict.fromkeys(key for row in table.rows for key in row.values)) or table.columns
    if table.rows and FILE not in table.columns:
        near = get_close_matches(FILE, table.columns, n=1)
        meant = f" Is {near[0]} meant?" if near else ""
        raise Fault(
            f"{name}: no column {FILE}, which names the picture of each row. Its columns: "
            f"{listed(table.columns, 12)}.{meant}"
        )
    if not table.rows and not table.faults:
        raise Fault(f"{name}: no rows in it. Fill it in, or take it away: then captions are read from name.txt.")
    return table


def unused(file: Path, column: str | None = None) -> list[str]:
    """The columns of a table that nothing is made of."""
    table = read(file)
    known = {FILE, _caption_column(table, column), *OTHERS}
    return [one for one in table.columns if one not in known]


def _json_lines(text: str, table: Table) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} at letter {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            shown = line.strip()[:SHOWN] + ("..." if len(line.strip()) > SHOWN else "")
            table.faults.append((number, f"not valid JSON ({what}): {printable(shown)}"))
            continue
        if isinstance(values, dict):
            yield number, values
        else:
            table.faults.append((number, f'each line is an object, {{"{FILE}": "a.jpg", "text": "..."}}'))


def _csv_lines(text: str, table: Table) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begin = 0
    try:
        for cells in reader:
            begin, number = reader.line_num, begin + 1  # a quoted cell may go over several lines
            if not any(cell.strip() for cell in cells):
                continue
            if not table.columns:
                table.columns = tuple(cell.strip() for cell in cells)
                if twice := [name for name, count in Counter(table.columns).items() if count > 1]:
                    table.faults.append((number, f"column {listed(twice)} twice. Keep one"))
            elif len(cells) != len(table.columns):
                said = f"{len(cells)} cells, the first line has {len(table.columns)}; a comma in a text needs quotes"
                table.faults.append((number, f'{said} around it: "a dog, lying"'))
            else:
                yield number, {name: cell for name, cell in zip(table.columns, cells, strict=True) if cell.strip()}
    except csv.Error as error:
        table.faults.append((reader.line_num, f"not valid CSV ({error})"))


def _caption_column(table: Table, asked: str | None) -> str | None:
    """The column of captions, None when there is none."""
    name = printable(table.file.name)
    if asked is not None and asked not in table.columns and table.rows:
        near = get_close_matches(asked, table.columns, n=1)
        hint = f" Did you mean {printable(near[0])}?" if near else ""
        raise Fault(f"--caption-column {asked}: {name} has no such column: {listed(table.columns, 12)}.{hint}")
    present = [asked] if asked is not None else [column for column in CAPTIONS if column in table.columns]
    if len(present) > 1:
        raise Fault(f"{name}: columns {listed(present)} may all hold the captions: choose with --caption-column.")
    return present[0] if present else None


def _named(listing: Listing, table: Table) -> tuple[dict[int, Path], list[Problem]]:
    """The picture of each row by its line, and what is wrong with the lines and the names."""
    faults = list(table.faults)
    place, found = Place(listing.folder), dict[int, Path]()
    first: dict[Path, int] = {}
    for row in table.rows:
        try:
            path = place.file(row.values.get(FILE), FILE)
        except Ill as error:
            faults.append((row.line, str(error)))
            continue
        if path in first:
            name = printable(str(row.values[FILE]))
            faults.append((row.line, f"{name} again, as in line {first[path]}. Several captions: a list in one row"))
            continue
        first[path] = row.line
        found[row.line] = path
    return found, [_problem(table, *fault) for fault in sorted(faults)]


def _pictures(
    table: Table, named: Mapping[int, Path], caption: str | None, problems: list[Problem]
) -> dict[Path, Picture]:
    """The pictures of the rows that name one; what is wrong with their other cells goes to the problems."""
    place, here = Place(table.file.parent), _below(table.file.parent)
    made: dict[Path, Picture] = {}
    for row in table.rows:
        if row.line not in named:
            continue
        path, values, cells = named[row.line], row.values, Cells(row.values)
        lack = f"no caption in line {row.line} of {printable(table.file.name)}" + ("" if caption else _columns(table))
        made[path] = Picture(
            path, here(path), cells.captions(caption), lack,
            cells.number("weight", 1.0, "a number, 0 or more", lambda value: value >= 0),
            int(cells.number("repeats", 1, "a whole number, 1 or more", lambda value: value >= 1 and value % 1 == 0)),
            cells.focus(), cells.path("mask", place),
        )  # fmt: skip
        problems += [_problem(table, row.line, fault, str(values[FILE])) for fault in cells.faults]
    return made


def _columns(table: Table) -> str:
    return f" (its columns: {listed(table.columns, 12)}; one of {', '.join(CAPTIONS)} would hold it)"


def _others(listing: Listing, pictures: Mapping[Path, Picture]) -> list[Listing]:
    """The sub-folders that rows lead to: what lies there beside is not passed over."""
    return [
        folder.look(parent) for parent in dict.fromkeys(path.parent for path in pictures) if parent != listing.folder
    ]


def _joined(
    picture: Picture | None,
    path: Path,
    name: str,
    own: dict[Path, tuple[str, ...]],
    file: Path,
    problems: list[Problem],
) -> Picture:
    """A picture with its row and its caption file, of which one may say something."""
    beside = own.get(path, ())
    if picture is None:
        lack = f"no caption; no row of {file.name} names it" + (
            ", and its caption file is empty" if path in own else ""
        )
        return Picture(path, name, beside, lack)
    if picture.captions and beside and picture.captions != beside:
        text = f"{printable(name)}: one caption in {file.name}, another in its caption file. Take one away"
        problems.append(Problem("caption file", text, (name,)))
    return picture if picture.captions else replace(picture, captions=beside)


def _problem(table: Table, line: int, text: str, *files: str) -> Problem:
    return Problem("table", f"{printable(table.file.name)}, line {line}: {text}", files)


def _below(root: Path) -> Callable[[Path], str]:
    """How a file below a folder is called: its path from there."""
    return lambda path: path.relative_to(root).as_posix()
