"""What was measured, as a table: one row a state of a run and measure, in Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

BASE, RESULT = "base", "result"
"""The states that are no checkpoints: the model before the training, and what the run wrote at its end."""
EVALUATED, MEASURED, FILE = "evaluation", "measured", "table.json"
"""Where a run has its tables: of `finetune evaluate`, and of the training itself"""
FOLDERS = (EVALUATED, MEASURED)
"""The fuller one first"""


@dataclass(frozen=True)
class Figure:
    """One measure of one state."""

    measure: str
    """likeness, likeness 2, fidelity, class drift, class diversity, diversity, drift, copies: what it is, whoever
    measured it"""
    title: str
    """What papers call it: DINO, CLIP-I, CLIP-T, PRES, DIV"""
    value: float
    low: float
    high: float
    """The interval that 95 of 100 resamplings of its prompts lie in"""
    units: int
    """Number of prompts (or subjects)"""
    judge: str
    """The metric model"""
    scale: str
    """What the number is, and which way is better"""
    values: tuple[float, ...] = ()
    """Of each prompt, in their order"""


@dataclass(frozen=True)
class State:
    """A state of a run and what was measured of it."""

    name: str
    """`step-000100`, `result` or `base`"""
    step: int
    """Steps trained; 0 is the base"""
    figures: Mapping[str, Figure]
    """By measure"""
    copies: Sequence[Mapping[str, Any]] = ()
    """The nearest pairs of sample and training picture: file, picture, similarity, alarm"""
    validation: float | None = None
    """Loss on held-out pictures, where the run measured it"""

    def value(self, measure: str) -> float:
        """NaN where it was not measured."""
        return self.figures[measure].value if measure in self.figures else float("nan")


@dataclass(frozen=True)
class Table:
    """The states of a run, the base first."""

    run: str
    protocol: str
    states: Sequence[State]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else must be told: prompts, seeds, judges, likeness of the real pictures to each other"""
    bleed: Sequence[Sequence[float]] = ()
    """Row a, column b: likeness of the pictures of concept a's prompts to concept b"""
    concepts: Sequence[str] = ()

    @property
    def base(self) -> State:
        return next(state for state in self.states if state.name == BASE)

    @property
    def trained(self) -> list[State]:
        """All others, by step."""
        return sorted((state for state in self.states if state.name != BASE), key=lambda state: state.step)


@dataclass(frozen=True)
class Verdict:
    """What is said of a state."""

    word: str
    """under-trained, good or over-trained; unknown where too little was measured"""
    reason: str
    """In a sentence, with the figure and the interval that carry it"""
    state: str
    """The state that it is about"""
    best: str
    """The best state of those that were measured"""
    best_reason: str
    advice: str
    """What to do"""


def to_json(table: Table, **more: Any) -> str:
    """All of it. A number that is none (NaN) is null."""
    return json.dumps(plain({**asdict(table), **more}), indent=1, ensure_ascii=False) + "\n"


def from_json(text: str) -> Table:
    """What `to_json` wrote. Raises ValueError or KeyError for anything else."""
    told = json.loads(text)
    states = [
        State(**{**state, "figures": {name: _figure(one) for name, one in state["figures"].items()}})
        for state in told["states"]
    ]
    return Table(**{name.name: told[name.name] for name in fields(Table)} | {"states": states})


def to_csv(tables: Iterable[Table]) -> str:
    """A line for each run, state and measure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "state", "step", "measure", "title", "value", "low", "high", "units", "judge", "scale"])
    for table in tables:
        for state in table.states:
            for one in state.figures.values():
                row = [_cell(one.value), _cell(one.low), _cell(one.high), one.units, one.judge, one.scale]
                writer.writerow([table.run, state.name, state.step, one.measure, one.title, *row])
    return text.getvalue()


def to_markdown(table: Table) -> str:
    """States down, measures across, each with its interval; below, who measured what."""
    rows = [(state.name, state) for state in table.states]
    return markdown(rows, "state") + _matrix(table)


def markdown(rows: Sequence[tuple[str, State]], heading: str) -> str:
    """The same for named states, of whichever runs."""
    measures = list(dict.fromkeys(name for _, state in rows for name in state.figures))
    known = {name: next(s.figures[name] for _, s in rows if name in s.figures) for name in measures}
    head = [heading, *(_escaped(known[name].title) for name in measures)]
    lines = [_row(head), _row(["---"] * len(head))]
    lines += [_row([_escaped(name), *(said(state, measure) for measure in measures)]) for name, state in rows]
    told = [f"- {_escaped(one.title)}: {one.scale}. Measured with {_escaped(one.judge)}." for one in known.values()]
    return "\n".join([*lines, "", *told]) + "\n"


def _matrix(table: Table) -> str:
    if not table.bleed:
        return ""
    head = ["prompts of", *(f"like {_escaped(name)}" for name in table.concepts)]
    rows = [
        _row([_escaped(name), *(f"{value:.3f}" for value in row)])
        for name, row in zip(table.concepts, table.bleed, strict=True)
    ]
    return "\n".join(["", _row(head), _row(["---"] * len(head)), *rows]) + "\n"


def said(state: State, measure: str) -> str:
    """A figure with its interval, `-` where it is none; empty where it was not measured."""
    if measure not in state.figures:
        return ""
    one = state.figures[measure]
    if one.value != one.value:
        return "-"
    return f"{one.value:.3f}" + (f" ({one.low:.3f} to {one.high:.3f})" if one.units > 1 else "")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _cell(value: float) -> str:
    return "" if value != value else f"{value:.6f}"


def _figure(told: Mapping[str, Any]) -> Figure:
    numbers = {name: float("nan") if told[name] is None else told[name] for name in ("value", "low", "high")}
    values = tuple(float("nan") if value is None else value for value in told["values"])
    return Figure(**{**told, **numbers, "values": values})


def plain(value: Any) -> Any:
    """As JSON holds it, NaN being null."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and value != value else value
