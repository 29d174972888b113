"""A training is killed at random moments and goes on each time: nothing is unusable, nothing differs, little is lost.

The kills are those of `driver.py`, which runs as a process of its own: it forks trainings, and a test's process has
threads. `pytest -m slow -n 0 -s tests/faults/test_kills.py` kills 200 times and shows the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("driver.py")


def drive(root: Path, kills: int, seed: int, *flags: str) -> dict[str, Any]:
    words = [sys.executable, str(DRIVER), str(root), "--kills", str(kills), "--seed", str(seed), *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600 + 60 * kills)
    assert done.stdout.startswith("{"), done.stderr[-3000:]
    print(done.stdout)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def require(figures: dict[str, Any], kills: int) -> None:
    """`unequal` is bytes, and the loss of each step in the log; `repeated` are steps that a log tells of twice."""
    assert figures["kills"] == kills
    assert figures["unusable"] == []
    assert figures["unequal"] == []
    assert figures["repeated"] == []
    assert max(map(int, figures["lost"])) <= figures["every"]


def test_killed_trainings_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    require(drive(tmp_path / "killed", 10, seed=3), 10)


@pytest.mark.slow
def test_many_kills(tmp_path: Path) -> None:
    """They fall into every phase; which ones is a matter of chance, but into none but one it never is."""
    kills = int(os.environ.get("FINETUNE_KILLS", "200"))
    figures = drive(tmp_path / "killed", kills, seed=4)
    require(figures, kills)
    assert len(figures["fell"]) >= 3


@pytest.mark.slow
def test_kills_of_processes_that_start_from_nothing(tmp_path: Path) -> None:
    """`python -m finetune`: some kills fall into its imports."""
    require(drive(tmp_path / "killed", 6, 5, "--cold"), 6)
