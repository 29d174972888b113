"""Two processes that train together: one of them is asked to stop, killed or fails, or their launcher is asked to.

The launcher is torchrun's own, except that it forks its workers from this process, in which the libraries are imported
already (`tests/forked.py`). `python tests/faults/together.py FOLDER CASE ...` prints what came of each case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import driver
import forked
from driver import Place

WORLD, STEPS = 2, 4
SLOW = 0.4
"""Seconds that what is waited for takes longer, so that a signal surely falls into it"""


def together(words: Sequence[str], place: Place, log: Path, planted: str = "") -> int:
    """Fork a launcher that starts two workers with the command line; its process id. Theirs are in `LOG.RANK`."""

    def work() -> None:
        os.environ["FINETUNE_CACHE"] = str(place.cache)
        forked.launched(WORLD, log.name, worker, list(words), str(log), planted)

    return forked.apart((log, log), work)


def worker(words: list[str], log: str, planted: str) -> None:
    """What each of them does. `planted`: the name of a function below, which breaks something first."""
    from finetune import cli

    forked.undisturbed()
    rank = int(os.environ["RANK"])
    Path(f"{log}.{rank}").write_text(str(os.getpid()))
    if planted:
        PLANTED[planted](rank)
    cli.main(words)


# --- what is planted -----------------------------------------------------------------------------------------------


def slowly(owner: Any, name: str) -> None:
    """Let a function take longer."""
    before = getattr(owner, name)

    def slow(*given: Any, **more: Any) -> Any:
        time.sleep(SLOW)
        return before(*given, **more)

    setattr(owner, name, slow)


def slow_drawing(rank: int) -> None:
    from finetune import class_pictures

    slowly(class_pictures, "_draw")


def slow_caching(rank: int) -> None:
    from finetune.families import base

    slowly(base, "encode_with_vae")


def slow_saving(rank: int) -> None:
    from finetune import checkpoints

    slowly(checkpoints, "_write")


def fails(owner: Any, name: str) -> None:
    def failing(*given: Any, **more: Any) -> Any:
        from finetune.errors import Failure

        raise Failure("planted: this process fails.")

    setattr(owner, name, failing)


def fails_in_caching(rank: int) -> None:
    from finetune.families import base

    if rank == 1:
        fails(base, "encode_with_vae")


def fails_while_the_other_saves(rank: int) -> None:
    from finetune import keeping

    slow_saving(rank)
    if rank == 1:
        fails(keeping.Keeper, "keep")


def no_number_on_one(rank: int) -> None:
    """NaN in all latents of one process, in its fourth step."""
    from finetune import batches

    picture = batches.Batches._picture
    seen = []

    def broken(self: batches.Batches, item: Any, place: Any) -> batches.Picture:
        made = picture(self, item, place)
        seen.append(made)
        if rank == 1 and len(seen) > 6:
            made.latents.fill_(float("nan"))
        return made

    batches.Batches._picture = broken  # type: ignore[method-assign]


def bad_data(rank: int) -> None:
    """All processes find the same fault."""
    from finetune import priors
    from finetune.errors import Fault

    def refuse(*given: Any, **more: Any) -> None:
        raise Fault("1.png cannot be read.")

    priors.check = refuse


PLANTED: dict[str, Callable[[int], None]] = {
    one.__name__: one
    for one in (
        *(slow_drawing, slow_caching, slow_saving),
        *(fails_in_caching, fails_while_the_other_saves, no_number_on_one),
        bad_data,
    )
}
SHOWN: dict[str, tuple[str, Callable[[Place], bool]]] = {
    "drawing": ("slow_drawing", lambda place: any(place.cache.glob("class-pictures/*/*.png"))),
    "caching": ("slow_caching", lambda place: place.begun),
    "training": ("", lambda place: len(place.logged()) >= 2),
    "saving": ("slow_saving", lambda place: any(place.run.glob("checkpoints/.step-*.writing"))),
}
"""What makes a phase long, and what shows that the two are in it"""


def case(told: str, whole: Place) -> dict[str, Any]:
    """`PHASE:SIGNAL:WHOM`, WHOM being `launcher` or a rank, or the name of something planted; and what came of it."""
    place, log = driver.beside(whole, told.replace(":", "-")), whole.run.with_name(f"{told.replace(':', '-')}.log")
    phase, name, whom = [*told.split(":"), "", ""][:3]
    planted, shown = SHOWN.get(phase, (phase, lambda place: False))
    place = replace(place, class_images=12 if phase == "drawing" else place.class_images)
    pid = together(start(place), place, log, planted)
    status, asked = driver.wait(pid, lambda: shown(place)), time.monotonic()
    if name:
        if status is not None:
            raise RuntimeError(driver._text(log))
        os.kill(
            pid if whom == "launcher" else int(log.with_name(f"{log.name}.{whom}").read_text()), signal.Signals[name]
        )
        status = driver.wait(pid)
    seconds, left = time.monotonic() - asked, driver._group_lives(pid)
    said = driver._text(log)
    state = json.loads((place.run / "run.json").read_text())["state"] if place.begun else None
    again = place.resume() if place.begun else start(place)
    resumed = driver.wait(together(again, place, log.with_suffix(".again")))
    return {
        **{"case": told, "status": status, "seconds": round(seconds, 1), "left": left, "state": state, "said": said},
        **{"begun": state is not None, "resumed": resumed, "why": driver._text(log.with_suffix(".again"))[-2000:]},
        "equal": resumed == 0 and (phase == "drawing" or place.product() == whole.product()),
        "once": place.logged() == list(range(1, STEPS + 1)),
    }


def start(place: Place) -> list[str]:
    return place.start("--processes", str(WORLD))


def whole(root: Path) -> Place:
    """A training of two processes that nothing happens to."""
    import tiny

    root.mkdir(parents=True)
    model, pictures = tiny.save("sd", root / "model"), driver.pictures(root / "pictures")
    place = Place(root / "whole", root / "whole-cache", model, pictures, STEPS)
    if driver.wait(together(start(place), place, root / "whole.log")) != 0:
        raise RuntimeError(driver._text(root / "whole.log"))
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description="Stop, kill or break one of two processes, and print what came of it.")
    parser.add_argument("folder", type=Path, help="a new folder to train in")
    parser.add_argument("cases", nargs="+", help="PHASE:SIGNAL:WHOM, e.g. caching:SIGTERM:launcher; or what is planted")
    asked = parser.parse_args()
    forked.imported()
    uninterrupted = whole(asked.folder)
    print(json.dumps([case(one, uninterrupted) for one in asked.cases], indent=1))


if __name__ == "__main__":
    main()
