"""Signals that a training gets from outside, in each of its phases; by `driver.py`, which is a process of its own.

- Before the run has begun (a model is loaded, class pictures are drawn): status 75. No folder is left; the same command
  goes on, and draws those pictures only that are missing.
- From then on (pictures are cached, steps taken, checkpoints saved, samples drawn): status 75, and `--resume` goes on.
  The same command without it is refused with status 2 and names the one that goes on.
- While the result is exported: it is finished, status 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("driver.py")
pytestmark = pytest.mark.slow
STOPPED, REFUSED = 75, 2
BEFORE = [("SIGTERM", "loading"), ("SIGTERM", "drawing")]
BEGUN = [("SIGTERM", "caching"), ("SIGINT", "caching")]
TRAINING = [("SIGTERM", "training"), ("SIGUSR1", "training"), ("SIGINT", "training")]
TRAINING += [("SIGTERM", "saving"), ("SIGTERM", "sampling")]
LAST = [("SIGTERM", "exporting")]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """What came of each signal."""
    words = [f"{name}:{phase}" for name, phase in BEFORE + BEGUN + TRAINING + LAST]
    folder = tmp_path_factory.mktemp("signals") / "runs"
    command = [sys.executable, str(DRIVER), str(folder), "--ask", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(one["signal"], one["phase"]): one for one in json.loads(done.stdout)}


Told = dict[tuple[str, str], dict[str, Any]]


@pytest.mark.parametrize("asked", BEFORE, ids="-".join)
def test_before_the_run_has_begun_the_same_command_goes_on(asked: tuple[str, str], told: Told) -> None:
    one = told[asked]
    assert one["status"] == STOPPED and one["state"] is None
    assert f"Stopped by {asked[0]}" in one["said"] and "Go on with the same command" in one["said"]
    assert (one["again"], one["resumed"]) == (0, None)
    assert one["equal"]


@pytest.mark.parametrize("asked", BEGUN + TRAINING, ids="-".join)
def test_a_run_that_is_asked_to_stop_can_go_on(asked: tuple[str, str], told: Told) -> None:
    one = told[asked]
    assert one["status"] == STOPPED and one["state"] == "stopped"
    assert f"Stopped by {asked[0]}" in one["said"] and "--resume" in one["said"]
    assert ("after step" in one["said"]) == (asked in TRAINING)
    assert (one["again"], one["resumed"]) == (REFUSED, 0)
    assert one["equal"]


def test_an_export_is_finished(told: Told) -> None:
    one = told[LAST[0]]
    assert one["status"] == 0 and one["state"] == "finished" and one["equal"]


def test_no_process_is_left_behind(told: Told) -> None:
    assert [asked for asked, one in told.items() if one["left"]] == []
