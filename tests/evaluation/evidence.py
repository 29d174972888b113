"""Train subjects far too long and far too short, and grade what is said of them and which checkpoint is chosen.

As a script it prints a table: `python tests/evaluation/evidence.py FOLDER`. Stopped, the same command goes on; rows of
finished trainings are made of the kept figures, so that other rules can be tried on them in seconds.

For each subject and seed a LoRA is trained on toybox without prior preservation for `STEPS` steps, and another one for
`SHORT`. `finetune evaluate` judges all checkpoints of the first and the result of the second. Its choice is then graded
on pictures that had no part in it: as many, of other seeds, drawn by every checkpoint. So the differences told
are not those of the pictures that were chosen by; and as the best of noisy figures looks better than it is, they are
rather too large than too small. Real pictures are references that were not trained on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from finetune import cli
from finetune.evaluation import evaluate, judges, verdict
from finetune.evaluation.prompts import Asked
from finetune.evaluation.tables import State, Table, Verdict, from_json
from finetune.toybox.subjects import PROMPT, SEED, Subject
from finetune.toybox.things import Build
from finetune.toybox.world import render

DATASETS = Path(__file__).resolve().parents[2] / "datasets"
JOT = Subject(
    build=Build("egg", "one", "horns", "feet", "bands"),
    colour="yellow",
    second="purple",
    pictures=("under water", "at night", "in a room", "under water", "at night"),
    references=("in a meadow", "on the beach", "in the snow", "in a meadow", "on the beach", "in the snow"),
)
"""A third subject, on which no line of the verdict was drawn."""
SUBJECTS, SEEDS = ("gizmo", "pip", "jot"), (1, 2, 3)
STEPS, EVERY, SHORT = 600, 120, 20
"""Steps of the long training and between its checkpoints, all of which are kept; steps of the short one."""
DENOISING = 10
"""Likeness within .005 of that of the 25 steps of the run's own samples."""
COUNT, OTHERS = 4, 1000
"""Pictures of each prompt to choose by; first seed of the others, to grade by."""
WITHIN = 0.02


@dataclass(frozen=True)
class Row:
    """What came of a subject and seed."""

    subject: str
    seed: int
    short: Verdict
    """On the short training"""
    last: Verdict
    """On the end of the long one, with its choice"""
    chosen: State
    """The choice, as graded on other pictures"""
    best: State
    """The saved state of the highest likeness, on these"""
    least: float
    """The floor of fidelity, on these"""
    same: float
    """By how much the choice was less like the subject than the best, on the pictures that it was made by"""

    @property
    def behind(self) -> float:
        return self.best.value("likeness") - self.chosen.value("likeness")

    @property
    def holds(self) -> bool:
        return self.behind <= WITHIN and self.chosen.value("fidelity") >= self.least

    @property
    def over(self) -> bool:
        return self.last.word == "over-trained"

    @property
    def earlier(self) -> bool:
        return self.last.best != self.last.state


def pictures(name: str, root: Path) -> Path:
    """The folder of a subject's pictures and references."""
    if (shipped := DATASETS / name).is_dir():
        return shipped
    random = np.random.default_rng([SEED, *name.encode()])
    for folder, scenes in (("pictures", JOT.pictures), ("references", JOT.references)):
        for number, scene in enumerate(scenes, 1):
            path = root / name / folder / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            render(JOT.spec(scene, random)).save(path, optimize=True)
            path.with_suffix(".txt").write_text(f"{PROMPT} {scene}\n")
    return root / name


def train(run: Path, data: Path, seed: int, steps: int, every: int) -> Path:
    words = ["train", "lora", "--config", "lora-toybox-subject", "--data", data / "pictures", "--output", run]
    words += ["--no-prior", "--batch-size", 2, "--steps", steps, "--seed", seed, "--tracker", "none"]
    words += ["--checkpoint-every", every, "--keep-every", every, "--resume-or-begin"]
    words += ["--measure", "off", "--no-report"]
    if not (run / "adapter.safetensors").is_file():
        cli.main([*map(str, words)])
    return run


def judged(run: Path, data: Path) -> Table:
    """What `finetune evaluate` finds, kept in `run/choice`."""
    words = ["evaluate", run, "--references", data / "references", "--count", COUNT, "--steps", DENOISING]
    with once(run, "choice") as missing:
        if missing:
            cli.main([*map(str, words)])
    return table(run / "choice")


def graded(run: Path, data: Path) -> Table:
    """The same checkpoints on other pictures of the subject, and nothing else, kept in `run/grade`."""
    with once(run, "grade") as missing:
        if missing:
            how = replace(evaluate.as_sampled(run, OTHERS, COUNT), steps=DENOISING)
            brief = evaluate.brief(run, (), Asked(), "short", how, COUNT, [data / "references"])
            subjects = [replace(one, class_prompt=None) for one in brief.plan.subjects]
            trimmed = replace(brief.plan, subjects=subjects, unrelated=())
            evaluate.evaluate(replace(brief, plan=trimmed), judges.toybox(), "cpu", lambda batches, _: batches)
    return table(run / "grade")


@contextlib.contextmanager
def once(run: Path, name: str) -> Iterator[bool]:
    """Whether an evaluation is still to be made. When it is whole it takes its name.

    What the base draws is the same for all runs, and taken from one that is whole.
    """
    missing, folder = not (run / name).is_dir(), run / evaluate.FOLDER
    if missing and not (folder / "base").exists():
        for base in sorted(run.parents[1].glob(f"*/long/{name}/base"))[:1]:
            shutil.copytree(base, folder / "base")
    yield missing
    if missing:
        folder.rename(run / name)


def table(folder: Path) -> Table:
    return from_json((folder / evaluate.JSON).read_text(encoding="utf-8"))


def row(root: Path, subject: str, seed: int) -> Row:
    place, data = root / f"{subject}-{seed}", pictures(subject, root / "data")
    choice = judged(train(place / "long", data, seed, STEPS, EVERY), data)
    short = judged(train(place / "short", data, seed, SHORT, SHORT), data)
    grade = graded(place / "long", data)
    last = verdict.judge(choice)
    named = {state.name: state for state in grade.trained}
    best = max(grade.trained, key=lambda state: state.value("likeness"))
    likeness = {state.name: state.value("likeness") for state in choice.trained}
    same = max(likeness.values()) - likeness[last.best]
    return Row(subject, seed, verdict.judge(short), last, named[last.best], best, verdict.floor(grade), same)


def told(rows: Sequence[Row]) -> str:
    head = ["subject", "seed", f"{SHORT} steps", f"{STEPS} steps", "chosen", "its likeness", "best saved", "behind",
            "same pictures", "fidelity", "floor", "holds"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for one in rows:
        behind = verdict.lost(one.best, one.chosen)
        lines.append([
            one.subject, str(one.seed), one.short.word, one.last.word, str(one.chosen.step),
            f"{one.chosen.value('likeness'):.3f}", f"{one.best.value('likeness'):.3f} ({one.best.step})",
            f"{one.behind:.3f} ({behind.low:.3f} to {behind.high:.3f})", f"{one.same:.3f}",
            f"{one.chosen.value('fidelity'):.3f}", f"{one.least:.3f}", "yes" if one.holds else "no",
        ])  # fmt: skip
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    reasons = "".join(f"- {one.subject} {one.seed}: {one.last.reason}.\n" for one in rows)
    over, earlier = sum(one.over for one in rows), sum(one.over and one.earlier for one in rows)
    under = sum(one.short.word == "under-trained" for one in rows)
    return (
        f"{text}\nOf {len(rows)} the choice holds in {sum(one.holds for one in rows)}. After {STEPS} steps {over} are "
        f"called over-trained, with an earlier checkpoint chosen in {earlier}; after {SHORT}, {under} under-trained."
        f"\n\n{reasons}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Grade the verdict and the choice of a checkpoint on toybox.")
    parser.add_argument("folder", type=Path, help="to train in; what is there is gone on with")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=SUBJECTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.redirect_stdout(sys.stderr):
        rows = [row(asked.folder, subject, seed) for seed in asked.seeds for subject in asked.subjects]
    print(told(rows))
    sys.exit(sum(not one.holds for one in rows) > len(rows) // 9)


if __name__ == "__main__":
    main()
