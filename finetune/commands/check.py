"""finetune data check FOLDER: every problem of a data set at once, in order of weight. No file is changed.

Exit status: 0 when training would start, 1 when it would not, 2 when the command itself is not understood.

`--json` prints one object:

    starts          bool: whether training would start
    pictures        int: pictures that can be read
    captions        int: those with captions of their own
    concepts        {name: int}: pictures that an epoch sees of each concept
    resolutions     [int]: sides that were asked about
    buckets         [{"width": int, "height": int, "pictures": int}]: sizes that are trained
    findings        [{"severity": "error" | "warning" | "note", "code": str, "text": str, "files": [str],
                      "advice": str}], in order of weight; "error": training would not start. The codes are the keys
                      of `finetune.data.checking.findings.ADVICE`
    recommendation  {"steps": int, "repeats": {name: int}, "reason": str}, or null when there is nothing to train on
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from finetune.commands.reading import RunReading
from finetune.errors import FAILED, Fault

if TYPE_CHECKING:
    from finetune.data.checking.doctor import Report

HEADS = {
    "error": "Training would not start",
    "warning": "Training would start, with a worse result",
    "note": "Good to know",
}


@dataclass(frozen=True)
class Config(RunReading):
    """Look a data set over: every problem at once, in order of weight. Changes no file.

    Exit status: 0 when training would start, 1 when not.
    """

    json: bool = False
    """Print one JSON object: starts, pictures, captions, concepts, resolutions, buckets, findings (each with severity,
    code, text, files, advice), recommendation."""
    pictures_a_step: int | None = None
    """How many pictures a step is going to take. Default: what the TOML file says, else 1."""


def main(config: Config) -> None:
    data = config.chosen()
    if config.pictures_a_step is not None and config.pictures_a_step < 1:
        raise Fault(f"--pictures-a-step {config.pictures_a_step}: at least 1.")

    from rich.console import Console
    from rich.progress import track

    from finetune.data.checking import doctor

    console = Console(stderr=True)
    report = doctor.examine(
        data,
        config.captions,
        config.framing,
        config.model,
        batch=config.pictures_a_step or config.train.batch_size * config.train.accumulation,
        seed=config.train.seed,
        track=lambda items, what: track(items, what, console=console, transient=True),
    )
    print(json.dumps(_plain(report), indent=2) if config.json else "\n".join(_text(report)))
    if not report.starts:
        sys.exit(FAILED)


def _plain(report: Report) -> dict[str, Any]:
    """What `--json` prints."""
    buckets = [{"width": w, "height": h, "pictures": count} for (h, w), count in report.buckets.items()]
    return {"starts": report.starts, **asdict(report), "buckets": buckets}


def _text(report: Report) -> Iterator[str]:
    """The report for reading: what is there, the findings by severity and kind, the recommendation."""
    own = f", {report.captions} with captions of their own" if report.captions else ""
    yield f"{report.pictures} pictures{own}"
    if report.buckets:
        sizes = [f"{width} x {height} ({count})" for (height, width), count in report.buckets.items()]
        yield f"trained at {', '.join(sizes[:12])}" + (f" and {len(sizes) - 12} other sizes" if sizes[12:] else "")
    for severity, found in groupby(report.findings, key=lambda one: one.severity):
        same = list(found)
        yield f"\n{HEADS[severity]}: {len(same)}"
        for advice, kind in groupby(same, key=lambda one: one.advice):
            yield from (f"  - {one.text}" for one in kind)
            yield f"    {advice}"
    if report.recommendation:
        yield f"\nRecommended: --steps {report.recommendation.steps} ({report.recommendation.reason})"
        for name, repeats in report.recommendation.repeats.items():
            yield f"  {name}: repeats = {repeats}"
    count = sum(one.severity == "error" for one in report.findings)
    yield "\nTraining would start." if report.starts else f"\nTraining would not start: see the first {count} above."
