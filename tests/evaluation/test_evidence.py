"""The verdict on real trainings. `evidence.py` is the same over subjects and seeds, graded on other pictures."""

from __future__ import annotations

from pathlib import Path

import evidence
import pytest

from finetune.evaluation import verdict


@pytest.mark.slow  # two minutes of one core
def test_trained_too_long_and_too_short(tmp_path: Path) -> None:
    data = evidence.pictures("gizmo", tmp_path)
    table = evidence.judged(evidence.train(tmp_path / "gizmo" / "long", data, 0, 300, 100), data)
    long = verdict.judge(table)
    assert (long.word, long.state, long.best) == ("over-trained", "result", "step-000100")
    assert "less than step-000100 had" in long.reason

    short = evidence.judged(evidence.train(tmp_path / "gizmo" / "short", data, 0, 20, 20), data)
    assert verdict.judge(short).word == "under-trained"
    highest = max(state.value("likeness") for state in table.trained)
    chosen = next(state for state in table.trained if state.name == long.best)
    assert chosen.value("likeness") >= highest - evidence.WITHIN
    assert chosen.value("fidelity") >= verdict.floor(table)


def test_a_third_subject_is_drawn_as_the_shipped_ones_are(tmp_path: Path) -> None:
    drawn, shipped = evidence.pictures("jot", tmp_path), evidence.pictures("gizmo", tmp_path)
    files = {file.relative_to(drawn).as_posix() for file in drawn.rglob("*.*")}
    assert files == {file.relative_to(shipped).as_posix() for folder in ("pictures", "references")
                     for file in (shipped / folder).rglob("*.*")}  # fmt: skip
    assert (drawn / "pictures" / "01.txt").read_text() == "a photo of sks toy under water\n"
