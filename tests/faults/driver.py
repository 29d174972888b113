"""Kill trainings at random moments, resume each until it is finished, and count what was lost.

As a script it prints the figures: `python tests/faults/driver.py --kills 200 --seed 0 FOLDER`. Half of the kills fall
anywhere in the time that a training takes; the others wait for what a training does seldom and briefly (drawing class
pictures, caching, saving, removing an old checkpoint, exporting), then for a random moment within it.

A training is `finetune train lora` in a process of its own. It is forked from this one, in which the libraries are
imported and nothing was computed: importing them takes longer than the training. `--cold` starts
`python -m finetune` instead, so that the kills fall into the imports too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import forked

EVERY = 2
"""Steps from checkpoint to checkpoint."""
STEPS = 12
PATIENCE = 300.0
"""Seconds after which a training hangs."""
MOMENTS = {
    "drawing": ("cache", "class-pictures/*/*.png"),
    "caching": ("cache", "encodings/**/*"),
    "saving": ("run", "checkpoints/.step-*.writing"),
    "removing": ("run", "checkpoints/.step-*.leaving"),
    "exporting": ("run", "*adapter*"),
}
"""What shows that a training is at it."""


@dataclass(frozen=True)
class Place:
    """A training's folders."""

    run: Path
    cache: Path
    model: Path
    pictures: Path
    steps: int = STEPS
    class_images: int = 2

    def start(self, *flags: str) -> list[str]:
        """The words that begin it."""
        words = ["train", "lora", "--model", self.model, "--data", self.pictures, "--output", self.run]
        words += ["--tracker", "none", "--steps", self.steps, "--checkpoint-every", EVERY, "--resolution", "64"]
        words += ["--class-prompt", "a dog", "--class-images", self.class_images, "--class-steps", "1"]
        words += ["--max-upscale", "4"]
        words += ["--flip", "--shuffle-tags", "--caption-dropout", "0.2", "--dropout", "0.3"]
        return [*map(str, words), "--lr", "1e-2", "--schedule", "cosine", *flags]

    def resume(self) -> list[str]:
        """The words that go on with it."""
        return ["train", "--output", str(self.run), "--resume"]

    @property
    def begun(self) -> bool:
        return (self.run / "run.json").is_file()

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "FINETUNE_CACHE": str(self.cache)}

    def logged(self) -> list[int]:
        """The steps that the log tells of; a line that was being written when the process was killed does not count."""
        file = self.run / "log.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def losses(self) -> list[tuple[int, float]]:
        lines = (self.run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [(line["step"], line["loss"]) for line in map(json.loads, lines)]

    def kept(self) -> int:
        """The step of the newest whole checkpoint, 0 without one."""
        from finetune.checkpoints import is_whole

        whole = [path for path in (self.run / "checkpoints").glob("step-*") if is_whole(path)]
        return max((int(path.name.removeprefix("step-")) for path in whole if path.name[5:].isdigit()), default=0)

    def product(self) -> bytes:
        return (self.run / "adapter.safetensors").read_bytes()


@dataclass
class Figures:
    kills: int = 0
    trainings: int = 0
    fell: Counter[str] = field(default_factory=Counter)
    """In what the kills fell: the state that they left behind"""
    lost: Counter[int] = field(default_factory=Counter)
    """Steps lost -> number of kills"""
    unusable: list[str] = field(default_factory=list)
    """What a run said that could not be gone on with"""
    unequal: list[str] = field(default_factory=list)
    """Finished runs whose bytes or losses are not those of the uninterrupted one"""
    repeated: list[str] = field(default_factory=list)
    """Finished runs whose log tells of a step twice"""
    seconds: float = 0.0

    def told(self) -> str:
        return json.dumps({**vars(self), "every": EVERY, "steps": STEPS, "seconds": round(self.seconds)}, indent=1)


def pictures(folder: Path) -> Path:
    """Three pictures of two sizes, with captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for number, size in enumerate([(64, 64), (128, 64), (70, 64)]):
        noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks dog, red, number {number}")
    return folder


def cold(words: Sequence[str], place: Place, log: Path) -> int:
    """Start `python -m finetune`; the process id."""
    with log.open("wb") as out:
        command = [sys.executable, "-m", "finetune", *words]
        return subprocess.Popen(command, env=place.environment, stdout=out, stderr=out, start_new_session=True).pid


def warm(words: Sequence[str], place: Place, log: Path) -> int:
    """Fork a process that runs the command line; the process id."""

    def work() -> None:
        from finetune import cli

        os.environ["FINETUNE_CACHE"] = str(place.cache)
        cli.main(words)

    return forked.apart((log, log), work)


def wait(pid: int, until: Callable[[], bool] = lambda: False) -> int | None:
    """The exit status, negative for a signal; None when `until` holds first."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        time.sleep(0.0003)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"no end after {PATIENCE:.0f} seconds")


def killed(pid: int, place: Place, rng: random.Random, span: float) -> int | None:
    """Kill the process at a random moment; its exit status when it was done before."""
    if rng.random() < 0.5:
        moment = time.monotonic() + rng.uniform(0, span)
        status = wait(pid, lambda: time.monotonic() >= moment)
    else:
        where, pattern = MOMENTS[rng.choice(sorted(MOMENTS))]
        folder: Path = getattr(place, where)
        before = set(folder.glob(pattern))
        status = wait(pid, lambda: any(path not in before for path in folder.glob(pattern)))
        if status is None:
            moment = time.monotonic() + rng.choice((0, rng.uniform(0, 0.005), rng.uniform(0, 0.03)))
            status = wait(pid, lambda: time.monotonic() >= moment)
    if status is not None:
        return status
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return None if os.waitstatus_to_exitcode(status) == -signal.SIGKILL else os.waitstatus_to_exitcode(status)


def fell(place: Place) -> str:
    """What a killed process was at, by what it left behind."""
    names = {path.name for path in (place.run / "checkpoints").glob(".step-*")}
    if any(name.endswith(".leaving") for name in names):
        return "removing"
    if any(name.endswith(".writing") for name in names):
        return "saving"
    if place.kept() == place.steps:
        return "exporting"
    if place.logged():
        return "training"
    return "before the first step"


def uninterrupted(root: Path, start: Callable[..., int]) -> Place:
    """A training that nothing happens to, in a new folder."""
    import tiny

    root.mkdir(parents=True, exist_ok=True)
    whole = Place(root / "whole", root / "whole-cache", tiny.save("sd", root / "model"), pictures(root / "pictures"))
    if wait(start(whole.start(), whole, root / "whole.log")) != 0:
        raise RuntimeError(_text(root / "whole.log"))
    return whole


def beside(whole: Place, name: str) -> Place:
    """A place of its own for the same training, with an empty cache."""
    return replace(whole, run=whole.run.with_name(name), cache=whole.run.with_name(f"{name}-cache"))


def drive(root: Path, kills: int, seed: int, start: Callable[..., int] = warm) -> Figures:
    """Begin trainings below `root` and kill them until there were that many kills; the last one is let finish too."""
    began, rng, figures = time.monotonic(), random.Random(seed), Figures()
    whole = uninterrupted(root, start)
    span = time.monotonic() - began
    while figures.kills < kills:
        figures.trainings += 1
        place = beside(whole, f"run-{figures.trainings}")
        survive(place, whole, kills, rng, span, start, figures)
    figures.seconds = time.monotonic() - began
    return figures


def survive(
    place: Place, whole: Place, kills: int, rng: random.Random, span: float, start: Callable[..., int], figures: Figures
) -> None:
    """One training, killed and resumed until it is finished or cannot be gone on with."""
    log = place.run.with_suffix(".log")
    while True:
        pid = start(place.resume() if place.begun else place.start(), place, log)
        status = killed(pid, place, rng, span) if figures.kills < kills else wait(pid)
        if status == 0 or (status is None and '"finished"' in _text(place.run / "run.json")):
            figures.kills += status is None
            break
        if status is not None:
            figures.unusable.append(f"{place.run.name}: status {status}: {_text(log)[-2000:]}")
            return
        figures.kills += 1
        figures.fell[fell(place)] += 1
        figures.lost[max(0, (place.logged() or [0])[-1] - place.kept())] += 1
    if place.product() != whole.product():
        figures.unequal.append(f"{place.run.name}: the adapter")
    if dict(place.losses()) != dict(whole.losses()):
        figures.unequal.append(f"{place.run.name}: the log")
    if place.logged() != whole.logged():
        figures.repeated.append(f"{place.run.name}: steps {place.logged()}")


def ask(root: Path, asked: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Send a signal in a phase, and what comes of it: for each pair of signal and phase a new training.

    `again` is the status of the same command, given once more; `resumed` that of `--resume` after it. None where the
    command before has finished the training already.
    """
    whole, told = uninterrupted(root, warm), []
    shown: dict[str, Callable[[Place], bool]] = {
        "loading": lambda place: (place.run / ".lock").is_file(),
        "drawing": lambda place: any(place.cache.glob("class-pictures/*/*.png")),
        "caching": lambda place: place.begun,
        "training": lambda place: len(place.logged()) >= 3,
        "saving": lambda place: any(place.run.glob("checkpoints/.step-*.writing")),
        "sampling": lambda place: any(place.run.glob("samples/*")),
        "exporting": lambda place: any(place.run.glob(".unverified-adapter*")),
    }
    for number, (name, phase) in enumerate(asked):
        place = beside(whole, f"run-{number}")
        samples = ["--sample-every", "2", "--sample-steps", "1"] if phase == "sampling" else []
        pid = warm(place.start(*samples), place, place.run.with_suffix(".log"))
        if wait(pid, lambda place=place, phase=phase: shown[phase](place)) is not None:  # type: ignore[misc]
            raise RuntimeError(_text(place.run.with_suffix(".log")))
        os.kill(pid, getattr(signal, name))
        status = wait(pid)
        said = _text(place.run.with_suffix(".log"))
        left = _group_lives(pid)
        state = json.loads((place.run / "run.json").read_text())["state"] if place.begun else None
        again = wait(warm(place.start(), place, place.run.with_suffix(".again")))
        resumed = None
        if status and again:
            resumed = wait(warm(place.resume(), place, place.run.with_suffix(".resumed")))
        told.append(
            {
                "signal": name,
                "phase": phase,
                "status": status,
                "said": said[-1000:],
                "left": left,
                "state": state,
                "again": again,
                "resumed": resumed,
                "equal": 0 in (status, again, resumed) and place.product() == whole.product(),
            }
        )
    return told


def _group_lives(pid: int) -> bool:
    """Whether a process of the group that `pid` led is still there."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill trainings at random moments and print what was lost.")
    parser.add_argument("folder", type=Path, help="a new folder to train in")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", action="store_true", help="start python -m finetune each time")
    parser.add_argument("--ask", nargs="*", help="instead: SIGNAL:PHASE, e.g. SIGTERM:training")
    asked = parser.parse_args()
    forked.imported()
    if asked.ask:
        print(json.dumps(ask(asked.folder, [tuple(pair.split(":")) for pair in asked.ask]), indent=1))
        return
    figures = drive(asked.folder, asked.kills, asked.seed, cold if asked.cold else warm)
    print(figures.told())
    bad = figures.unusable or figures.unequal or figures.repeated
    sys.exit(bool(bad or max(figures.lost, default=0) > EVERY))


if __name__ == "__main__":
    main()
