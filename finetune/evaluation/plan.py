"""What is drawn of each state of a run, and the table that follows: the same after a training and during it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from finetune import disk, provenance
from finetune.data import Example
from finetune.data.reading import pictures
from finetune.evaluation import drawing, measuring, verdict
from finetune.evaluation.drawing import How, Track, wanted
from finetune.evaluation.judges import Panel
from finetune.evaluation.measuring import Drawn, Real
from finetune.evaluation.prompts import Subject
from finetune.evaluation.tables import BASE, FILE, State, Table, Verdict, to_csv, to_json, to_markdown
from finetune.families import Family, Source

JSON, CSV, MARKDOWN = FILE, "table.csv", "table.md"


@dataclass(frozen=True)
class Plan:
    """Fixed for all states, so that they can be compared."""

    folder: Path
    """Pictures go to a folder of each state in it, the tables beside them."""
    run: str
    """The run's name"""
    source: Source
    """The base"""
    subjects: Sequence[Subject]
    unrelated: Sequence[str]
    """Prompts of something else; may be none"""
    real: Real
    protocol: str
    how: How
    count: int
    """Pictures of each prompt"""
    bare: int
    """Pictures of the bare class"""

    def draw(self, name: str, step: int, identity: str, load: Callable[[], Family], track: Track) -> Drawn:
        """The pictures of a state: of the subjects, their classes, and unrelated prompts (one each).

        The base is asked for the class in the subject's place. `identity` and `load` as in `drawing.draw`.
        """
        seed = self.how.seed
        texts = [one.plain if name == BASE else one.prompts for one in self.subjects]
        subjects = [wanted(f"subject{i or ''}", one, self.count, seed) for i, one in enumerate(texts)]
        classes = [
            wanted(f"class{i or ''}", [one.class_prompt], self.bare, seed) if one.class_prompt else []
            for i, one in enumerate(self.subjects)
        ]
        unrelated = wanted("unrelated", self.unrelated, 1, seed)
        every = [picture for group in (*subjects, *classes, unrelated) for picture in group]
        facts = {"model": self.source.model, "revision": self.source.revision, "step": step}
        drawn = iter(drawing.draw(self.folder / name, every, self.how, identity, load, facts, track))
        files = [f"{name}/{picture.file}" for group in subjects for picture in group]
        taken = [[*islice(drawn, len(group))] for group in (*subjects, *classes, unrelated)]
        bare = [
            taken[-1] if one.style else own for one, own in zip(self.subjects, taken[len(subjects) : -1], strict=True)
        ]
        return Drawn(taken[: len(subjects)], bare, taken[-1], files)

    def state(
        self, panel: Panel, name: str, step: int, drawn: Drawn, base: Drawn | None, validation: float | None = None
    ) -> State:
        """What is measured of it. `base`: what the base drew; None for the base itself."""
        found = measuring.figures(panel, drawn, base, self.real, self.subjects, self.how.seed)
        if name == BASE:
            return State(name, step, found)
        near = measuring.pairs(measuring.neighbours(panel, drawn, self.real), drawn, self.real)
        return State(name, step, found, near, validation)

    def facts(self, panel: Panel) -> dict[str, Any]:
        """What else the table must tell."""
        return {
            verdict.REAL: measuring.of_each_other(panel, self.real),
            "prompts": [subject.prompts for subject in self.subjects],
            "measured against": [subject.plain for subject in self.subjects],
            "class prompts": [subject.class_prompt for subject in self.subjects],
            "unrelated prompts": self.unrelated,
            "pictures of each prompt": self.count,
            "pictures of the bare class": self.bare,
            "real pictures": [len(own) for own in self.real.references],
            "judges": [*(judge.name for judge in panel.likeness.values()), panel.words.name, panel.differ.name],
            "seed": self.how.seed,
            "steps": self.how.steps,
            "guidance": self.how.guidance,
            "software": provenance.software(),
        }

    def table(self, states: Sequence[State], facts: dict[str, Any], bleed: Sequence[Sequence[float]] = ()) -> Table:
        """The base first, then the others by step."""
        return Table(self.run, self.protocol, states, facts, bleed, [subject.name for subject in self.subjects])


def real(
    subjects: int,
    examples: Sequence[Example],
    held: Sequence[Example],
    background: str,
    own: Sequence[Sequence[Example]] = (),
) -> Real:
    """The pictures to compare with, in memory. `own`: other references than the run's pictures, by concept."""
    sets = own or [[one for one in (*examples, *held) if one.concept == number] for number in range(subjects)]
    opened = [[pictures.decode(one.path, background)[0].convert("RGB") for one in each] for each in sets]
    training = [pictures.decode(one.path, background)[0].convert("RGB") for one in examples]
    return Real(opened, training, [one.name or one.path.name for one in examples])


def write(table: Table, folder: Path, seed: int) -> Verdict:
    """The tables, and the verdict that follows from them."""
    said = verdict.judge(table, seed=seed)
    disk.write_text(folder / JSON, to_json(table, verdict=vars(said)))
    disk.write_text(folder / CSV, to_csv([table]))
    disk.write_text(folder / MARKDOWN, to_markdown(table) + f"\n{sentence(said)}\n")
    return said


def sentence(said: Verdict) -> str:
    """The verdict in words."""
    return (
        f"Verdict on {said.state}: {said.word}: {said.reason}. Best of those measured: {said.best}, "
        f"{said.best_reason}. {said.advice}"
    )
