"""Several evaluated runs as one table: each run a row, and the mean over them, resampled by run as papers do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import Fault
from finetune.evaluation import measures, verdict
from finetune.evaluation.evaluate import FOLDER, JSON
from finetune.evaluation.tables import Figure, State, Table, from_json, markdown, to_csv, to_json

ALL = "mean of all"
SAME = ("pictures of each prompt", "seed", "steps", "guidance")
"""Facts that runs must share to be comparable, beside protocol and judges"""


def compare(runs: Sequence[Path], state: str, how: str) -> str:
    """`state`: last or best; `how`: markdown, csv or json. Raises Fault where runs cannot be compared."""
    tables = [read(run) for run in runs]
    if differing := differences(tables):
        raise Fault(
            "these runs were not measured in the same way. Evaluate them again with the same options:", differing
        )
    chosen = [verdict.best(table) if state == "best" else table.trained[-1] for table in tables]
    table = side_by_side([table.run for table in tables], chosen, tables[0])
    if how == "csv":
        return to_csv([table])
    if how == "json":
        return to_json(table)
    verdicts = [f"- {one.run}: {verdict.judge(one).word}; best: {verdict.best(one).name}" for one in tables]
    return markdown([(one.name, one) for one in table.states], "run") + "\n" + "\n".join(verdicts) + "\n"


def read(run: Path) -> Table:
    """What `finetune evaluate` wrote. Raises Fault where it did not."""
    file = run / FOLDER / JSON
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except OSError:
        raise Fault(f"{run}: not evaluated yet: `finetune evaluate {run}`.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Fault(f"{file}: cannot be read ({error}). Evaluate the run again: `finetune evaluate {run}`.") from error


def differences(tables: Sequence[Table]) -> list[str]:
    """In which way the runs were measured differently from the first."""
    first, found = tables[0], []
    for table in tables[1:]:
        for name, one, other in zip(("protocol", "judges", *SAME), _how(first), _how(table), strict=True):
            found += [f"{table.run}: {name}: {other}; {first.run}: {one}"] if one != other else []
    return found


def side_by_side(names: Sequence[str], states: Sequence[State], like: Table) -> Table:
    """A table whose rows are the runs' states, the mean over them last: its interval is over runs (subjects)."""
    rows = [
        State(f"{name} ({state.name})", state.step, state.figures) for name, state in zip(names, states, strict=True)
    ]
    common = [measure for measure in states[0].figures if all(measure in state.figures for state in states)]
    mean = {measure: _mean([state.figures[measure] for state in states]) for measure in common}
    return Table(", ".join(names), like.protocol, [*rows, State(ALL, 0, mean)])


def _mean(figures: Sequence[Figure]) -> Figure:
    one = figures[0]
    values = [figure.value for figure in figures]
    told = measures.bootstrap(values, 0, f"{one.measure} over runs")
    return Figure(
        one.measure, one.title, told.value, told.low, told.high, told.units, one.judge, one.scale, tuple(values)
    )


def _how(table: Table) -> list[Any]:
    """Protocol, judges by measure, and the facts that runs must share."""
    judges = {name: figure.judge for name, figure in table.trained[-1].figures.items()}
    return [table.protocol, judges, *(table.facts.get(name) for name in SAME)]
