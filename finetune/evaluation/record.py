"""What a run has measured of itself so far, kept in RUN/measured: the table, and the seconds that it took."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import checkpoints, disk, ledger
from finetune.evaluation import plan, verdict
from finetune.evaluation.plan import JSON, Plan
from finetune.evaluation.tables import BASE, State, Table, Verdict, from_json, plain

SECONDS = "seconds.json"


class Record:
    """In the leading process."""

    def __init__(self, made: Plan, facts: dict[str, Any]) -> None:
        self.plan, self.facts = made, facts
        self.states: dict[str, State] = {}
        self.spent: dict[str, float] = {}
        """Seconds of measuring, by state"""
        self.bleed: Sequence[Sequence[float]] = ()

    @property
    def trained(self) -> list[State]:
        return [state for state in self.states.values() if state.name != BASE]

    @property
    def took(self) -> float:
        """Seconds of measuring."""
        return sum(self.spent.values())

    def steps_took(self) -> float:
        """Seconds of the steps that were taken, as the run's log has them."""
        return sum(line["seconds"] for line in ledger.logged(self.plan.folder.parent))

    def read(self, done: int) -> None:
        """Take up what was measured in the same way up to this step; what came after is removed: it is done again."""
        before = self._table()
        found = before.states if before and _same(before.facts, self.facts) else ()
        self.states = {state.name: state for state in found if state.step <= done}
        whole = before is not None and len(self.states) == len(before.states)
        self.bleed = before.bleed if before and whole else ()
        self.spent = {name: took for name, took in self._seconds().items() if _step(name) <= done}
        for folder in self.plan.folder.glob("step-*"):
            if _step(folder.name) > done:
                shutil.rmtree(folder)
        if not whole:
            self._write()

    def add(self, state: State, bleed: Sequence[Sequence[float]] = ()) -> None:
        self.states[state.name], self.bleed = state, bleed
        self._write()

    def spend(self, name: str, seconds: float) -> None:
        """It may be the rest of what was begun before."""
        self.spent[name] = self.spent.get(name, 0.0) + seconds
        if self.plan.folder.is_dir():
            disk.write_text(self.plan.folder / SECONDS, json.dumps(self.spent) + "\n")

    def table(self) -> Table:
        return self.plan.table(list(self.states.values()), self.facts, self.bleed)

    def verdict(self) -> Verdict:
        """On the last state. There must be one."""
        return verdict.judge(self.table(), seed=self.plan.how.seed)

    def since_best(self) -> int:
        """Number of states that were measured since the best one."""
        return sum(state.step > verdict.best(self.table()).step for state in self.trained) if self.trained else 0

    def _write(self) -> None:
        """The tables; of the base alone there is none, as nothing follows from it."""
        if self.trained:
            plan.write(self.table(), self.plan.folder, self.plan.how.seed)
        else:
            for name in (plan.JSON, plan.CSV, plan.MARKDOWN):
                (self.plan.folder / name).unlink(missing_ok=True)

    def _table(self) -> Table | None:
        try:
            return from_json((self.plan.folder / JSON).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _seconds(self) -> dict[str, float]:
        try:
            return dict(json.loads((self.plan.folder / SECONDS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}


def called(step: int) -> str:
    """The state after so many steps, as tables and folders have it: its checkpoint's name."""
    return Path(checkpoints.name(step)).name if step else BASE


def _step(name: str) -> int:
    return 0 if name == BASE else int(name.rpartition("-")[2])


def _same(one: Any, other: Any) -> bool:
    """Whether figures can be compared: all that was asked is equal, as JSON has it."""
    told = [{name: fact for name, fact in facts.items() if name != "software"} for facts in (one, other)]
    return json.dumps(plain(told[0])) == json.dumps(plain(told[1]))
