"""Two processes, one of which is asked to stop, killed or fails, in each phase: by `together.py`, a process of its own.

Whatever happens to one ends both within seconds and leaves no process; what is to be said is said once; and the next
command goes on to the bytes of the run that nothing happened to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from driver import Place

SCRIPT = Path(__file__).with_name("together.py")
HANGS = "forcefully exiting"
"""What torchrun says when it kills a process that has not ended 30 seconds after it was asked to"""
ENDS = ("launcher", "0", "1")
ASKED = [f"{phase}:SIGTERM:{whom}" for phase in ("drawing", "caching", "training", "saving") for whom in ENDS]
KILLED = [f"{phase}:SIGKILL:{whom}" for phase in ("drawing", "caching", "training", "saving") for whom in "01"]
PLANTED = {
    "fails_in_caching": "planted: this process fails.",
    "fails_while_the_other_saves": "planted: this process fails.",
    "no_number_on_one": "the loss is nan",
    "bad_data": "cannot be read",
}


def told(root: Path, *cases: str) -> list[dict[str, Any]]:
    words = [sys.executable, str(SCRIPT), str(root), *cases]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600 + 60 * len(cases))
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def require(one: dict[str, Any]) -> None:
    case, said = one["case"], one["said"]
    assert one["status"] == 1, f"{case}: the launcher's own status"
    assert HANGS not in said and not one["left"], f"{case}: {one['seconds']} s: {said}"
    if "SIGTERM" in case:
        assert said.count("Stopped by") == 1, f"{case}: {said}"
        assert ("--resume" in said) == one["begun"], f"{case}: {said}"
    if "SIGKILL" in case:
        assert said.count("Another process of this training has ended") + said.count("Stopped by") == 1, said
    if case in PLANTED:
        assert said.count(PLANTED[case]) == 1, f"{case}: {said}"
    assert one["resumed"] == 0 and one["equal"] and one["once"], f"{case}: {one['why']}"


def test_one_that_is_killed_ends_the_other(tmp_path: Path) -> None:
    [one] = told(tmp_path / "runs", "training:SIGKILL:1")
    require(one)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [ASKED, KILLED, list(PLANTED)], ids=["asked", "killed", "planted"])
def test_whatever_happens_to_one_of_two(cases: list[str], tmp_path: Path) -> None:
    for one in told(tmp_path / "runs", *cases):
        require(one)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "worker"])
def test_torchrun_itself(whom: str, place: Place, tmp_path: Path) -> None:
    """Its status is 1 whatever its workers end with; theirs stands in what it prints when one of them ended first."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "finetune"]
    environment = {**place.environment, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("wb") as out:
        running = subprocess.Popen([*launch, *place.start("--processes", "2")], env=environment, stdout=out, stderr=out)
        while len(place.logged()) < 2 and running.poll() is None:
            time.sleep(0.01)
        os.kill(running.pid if whom == "launcher" else _child(running.pid), signal.SIGTERM)
        assert running.wait(timeout=60) == 1
    said = (tmp_path / "said").read_text()
    assert said.count("Stopped by") == 1 and "--resume" in said, said
    assert whom == "launcher" or "exitcode  : 75" in said, said
    done = subprocess.run([*launch, *place.resume()], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert place.logged() == [1, 2, 3, 4] and place.product()


def _child(parent: int) -> int:
    """One of its workers."""
    return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])
