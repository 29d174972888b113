"""Signals that ask a training to stop, in each of its phases; by `driver.py`, which is a process of its own.

What happens today:

- From the first step to the last checkpoint (training, saving, drawing samples): the step is finished, its state is
  kept, the status is 75, and `--resume` goes on. The same command without `--resume` is refused with status 2 and names
  the one that goes on.
- While pictures are cached: the process dies of the signal (143 in a shell). The run is in its folder, so that
  `--resume` is what goes on; it begins at the first step, and what was cached stays.
- While class pictures are drawn: the process dies of the signal. There is no output folder yet: the same command goes
  on, without `--resume`, and draws those pictures only that are missing.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("driver.py")
STOPPED, REFUSED = 75, 2
TRAINING = [("SIGTERM", "training"), ("SIGUSR1", "training"), ("SIGINT", "training")]
BRIEF = [("SIGTERM", "saving"), ("SIGTERM", "sampling")]
BEFORE = [("SIGTERM", "drawing"), ("SIGTERM", "caching")]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """What came of each signal."""
    words = [f"{name}:{phase}" for name, phase in TRAINING + BRIEF + BEFORE]
    folder = tmp_path_factory.mktemp("signals") / "runs"
    command = [sys.executable, str(DRIVER), str(folder), "--ask", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(one["signal"], one["phase"]): one for one in json.loads(done.stdout)}


Told = dict[tuple[str, str], dict[str, Any]]


@pytest.mark.parametrize("asked", TRAINING + BRIEF, ids="-".join)
def test_a_training_that_is_asked_to_stop_can_go_on(asked: tuple[str, str], told: Told) -> None:
    one = told[asked]
    assert one["status"] == STOPPED
    assert f"Stopped by {asked[0]} after step" in one["said"] and "--resume" in one["said"]
    assert (one["again"], one["resumed"]) == (REFUSED, 0)
    assert one["equal"]


def test_what_is_asked_while_caching_ends_the_process(told: Told) -> None:
    one = told["SIGTERM", "caching"]
    assert one["status"] == -signal.SIGTERM
    assert (one["again"], one["resumed"]) == (REFUSED, 0)
    assert one["equal"]


def test_what_is_asked_while_class_pictures_are_drawn_ends_the_process(told: Told) -> None:
    one = told["SIGTERM", "drawing"]
    assert one["status"] == -signal.SIGTERM
    assert (one["again"], one["resumed"]) == (0, None)
    assert one["equal"]


def test_no_process_is_left_behind(told: Told) -> None:
    assert [asked for asked, one in told.items() if one["left"]] == []
