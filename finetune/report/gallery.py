"""Which pictures of a run the page shows, and what is said of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetune.evaluation.tables import BASE, State
from finetune.pictures import read_settings
from finetune.report.facts import Facts, Sample
from finetune.report.record import Picture
from finetune.report.thumbnails import Thumbnail, thumbnail

PICTURES, PROMPTS, STATES, STEPS, STRIPS, PAIRS = 24, 12, 12, 12, 6, 6
"""At most so many are shown: of the data set; of the grid down and across; of the samples across and down; copies"""
SMALL = 200
"""Pixels of those that are shown in numbers"""
KINDS = {"class": "the bare class", "unrelated": "unrelated"}
"""Prompts that are not the subject's: what is to be seen in them"""
T = TypeVar("T")


@dataclass(frozen=True)
class Shown:
    """A picture in the page, or the room where it would be."""

    picture: Thumbnail | None
    alt: str


@dataclass(frozen=True)
class Row:
    """A prompt, drawn by each state."""

    prompt: str
    kind: str
    """Empty for the subject's own"""
    cells: Sequence[Shown]


@dataclass(frozen=True)
class Grid:
    columns: Sequence[State]
    rows: Sequence[Row]
    left_out: Sequence[str] = ()
    """What there is more"""


@dataclass(frozen=True)
class Pair:
    """A sample beside the training picture nearest to it."""

    sample: Shown
    training: Shown
    prompt: str
    name: str
    similarity: float
    alarm: bool


@dataclass(frozen=True)
class Trained:
    """A picture of the data set."""

    picture: Picture
    shown: Shown


@dataclass(frozen=True)
class Strip:
    """The samples of one prompt."""

    prompt: str
    cells: Sequence[tuple[int, Shown]]
    """Step and picture"""


def called(name: str) -> str:
    """A state as it is spoken of, also within a sentence: "step-000040" -> "step 40"."""
    return re.sub(r"\bstep-0*(\d+)", r"step \1", name)


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def grid(facts: Facts) -> Grid:
    """Prompts down, the base and the states across: the first picture of each. The chosen state is never left out."""
    if facts.table is None or facts.drawn is None:
        return Grid((), ())
    states = [state for state in facts.table.states if state.name == BASE] + facts.table.trained
    best = facts.verdict.best if facts.verdict else None
    columns = spread(states, STATES)
    if missing := [state for state in states if state.name == best and state not in columns]:
        columns = sorted([*columns[:-2], *missing, columns[-1]], key=lambda state: state.step)
    files = _first_of_each(facts.drawn, columns)
    told = facts.table.facts
    rows = [
        _row(facts.drawn, file, kind, _prompt(facts.drawn, columns, file, told, kind, *at), columns)
        for (kind, *at), file in spread(list(files.items()), PROMPTS)
    ]
    left = [(len(files), PROMPTS, "prompts"), (len(states), STATES, "states")]
    return Grid(columns, rows, [f"{most} of {count} {what}" for count, most, what in left if count > most])


def pairs(facts: Facts, state: State) -> list[Pair]:
    """The state's samples that are nearest to training pictures, the nearest first."""
    named = {one.name: one for one in facts.data.pictures}
    return [_pair(facts, named, told) for told in state.copies[:PAIRS]]


def trained(facts: Facts) -> list[Trained]:
    """The data set, those that are held out last."""
    shown = sorted(spread(facts.data.pictures, PICTURES), key=lambda one: (one.held, one.concept))
    return [Trained(one, _of_data(facts, one)) for one in shown]


def samples(facts: Facts) -> list[Strip]:
    """What was drawn on the way: a strip a prompt, of evenly spread steps."""
    steps = spread(sorted({one.step for one in facts.samples}), STEPS)
    by_number: dict[int, list[Sample]] = {}
    for one in facts.samples:
        if one.step in steps:
            by_number.setdefault(one.number, []).append(one)
    return [_strip(by_number[number]) for number in sorted(by_number)[:STRIPS]]


def _first_of_each(drawn: Path, columns: Iterable[State]) -> dict[tuple[str, int, int], str]:
    """(kind, number of the concept, row) -> the file of the first seed; the subject's prompts come first."""
    found: dict[tuple[str, int, int], tuple[int, str]] = {}
    for state in columns:
        for path in _listed(drawn / state.name):
            match = re.fullmatch(r"(subject|class|unrelated)(\d*)-(\d+)-seed(\d+)\.png", path.name)
            if match:
                key = match[1], int(match[2] or 0), int(match[3]) - 1
                found[key] = min(found.get(key, (10**9, "")), (int(match[4]), path.name))
    kinds = ("subject", "class", "unrelated")
    return {key: found[key][1] for key in sorted(found, key=lambda key: (kinds.index(key[0]), *key[1:]))}


def _row(drawn: Path, file: str, kind: str, prompt: str, columns: Sequence[State]) -> Row:
    cells = [Shown(thumbnail(drawn / state.name / file), f"{prompt}: {called(state.name)}") for state in columns]
    return Row(prompt, KINDS.get(kind, ""), cells)


def _prompt(
    drawn: Path, columns: Sequence[State], file: str, told: Mapping[str, Any], kind: str, concept: int, row: int
) -> str:
    """As the table tells it, or else a picture itself."""
    try:
        if kind == "subject":
            return str(told["prompts"][concept][row])
        return str(told["class prompts"][concept] if kind == "class" else told["unrelated prompts"][row])
    except (KeyError, IndexError, TypeError):
        return next(filter(None, (prompt_of(drawn / state.name / file) for state in reversed(columns))), file)


def prompt_of(path: Path) -> str:
    """What a picture says it was drawn for; empty where it does not."""
    try:
        return str(read_settings(path).get("prompt") or "")
    except (OSError, ValueError, SyntaxError, AttributeError):  # what Pillow raises for files that are half written
        return ""


def _pair(facts: Facts, named: Mapping[str, Picture], told: Mapping[str, Any]) -> Pair:
    name, file, similarity = str(told.get("picture")), str(told.get("file")), told.get("similarity")
    folder = (facts.drawn or facts.folder).resolve()
    path = (folder / file).resolve()
    if not path.is_relative_to(folder):  # a table names its own pictures
        path = folder
    known = named.get(name)
    prompt = prompt_of(path) or file
    return Pair(
        Shown(thumbnail(path), f"sample: {prompt}"),
        _of_data(facts, known) if known else Shown(None, f"training picture {name}"),
        prompt,
        name,
        float(similarity) if isinstance(similarity, int | float) else float("nan"),
        bool(told.get("alarm")),
    )


def _of_data(facts: Facts, picture: Picture) -> Shown:
    background = facts.setting("data", "background")
    said = next((caption for caption in picture.captions if caption), "no caption")
    made = thumbnail(Path(picture.path), SMALL, background if isinstance(background, str) else "white")
    return Shown(made, f"training picture {picture.name}: {said}")


def _strip(drawn: Sequence[Sample]) -> Strip:
    prompt = prompt_of(drawn[-1].path) or drawn[-1].path.name
    return Strip(prompt, [(one.step, Shown(thumbnail(one.path, SMALL), f"{prompt}: step {one.step}")) for one in drawn])


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
