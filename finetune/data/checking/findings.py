"""What is wrong with a data set, or worth knowing: each problem under a code, the codes in order of weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.data.reading.found import Problem
from finetune.data.reading.pictures import printable

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

ADVICE = {
    # What training would not start with
    "setting": "Change the settings as said.",
    "folder": "Name the folder that the pictures lie in.",
    "unreadable": "Repair or replace these, or leave them out by name: --skip NAME ...",
    "animated": "Save the one frame to learn as a PNG or JPEG, or leave it out: --skip NAME ...",
    "huge": "Scale it down, or leave it out: --skip NAME ...",
    "decoder": "Install what is named, save the picture as PNG or JPEG, or leave it out: --skip NAME ...",
    "mode": "Save it with 8 or 16 bits a channel, or leave it out: --skip NAME ...",
    "table": "Put the lines right that are named; all other pictures and captions stay as they are.",
    "source": "Put the sources right that are named: each picture has the one that it was made of, under its name.",
    "mask": "Put the masks right that are named, or train without: leave out --masks and --alpha-masks.",
    "caption-file": "Save captions as UTF-8 text, one file for each picture: name.txt, or name.jpg.txt.",
    "caption-missing": 'Write the captions, or give one for all that have none: --prompt "a photo of sks dog".',
    "size": "Give other pictures, another --resolution, or the limit that is named; or leave them out by name: --skip.",
    # What training would start with, to the result's disadvantage
    "duplicate": "Keep one of each group, or leave the others out: --skip NAME ...: each weighs as much as others.",
    "near-duplicate": "Look at them: what is seen twice is learned twice as hard. Leave out by name: --skip NAME ...",
    "blurred": "A model learns the blur too. Give sharper ones, or leave them out: --skip NAME ...",
    "enlarged": "Larger pictures, or a lower --resolution, give finer detail.",
    "caption-long": "The text encoder never sees what is cut off: shorten, and say first what matters.",
    "trigger": "Only captions with the trigger teach it. Add it, or: --template '{trigger}, {caption}'.",
    "caption-prompt": "Write captions for these too, or for none.",
    "tag": "What every caption says is learned together with the trigger. Leave out what is part of the subject; add "
    "pictures without it where it is not.",
    "balance": "Give the smaller concept more pictures, or the repeats that are recommended.",
    "batch": "Lower --batch-size or --accumulation, or add pictures.",
    "bucket": "It is trained in a batch of its own. Crop it to a size that others have, or leave it so.",
    "picture": "Look whether it is as it should be.",
    # What was done, and what was not looked at
    "turned": "Nothing to do: they are trained as viewers show them.",
    "transparent": "Choose the colour behind them: --background COLOUR; or train their shape alone: --alpha-masks.",
    "converted": "Nothing to do, unless the colours were meant to be others.",
    "private": "Nothing to do: no camera, place or name goes into anything that is written.",
    "resolution": "Pictures that are trained at other sizes need nothing.",
    "unused": "Nothing to do, unless one of them was meant to be trained on.",
    "unknown-model": "Name a --model that is on this machine to have all checked.",
}
"""What to do about each kind of finding. Errors, warnings and notes are each told in this order."""

CODES = {"place": "folder", "caption file": "caption-file", "no caption": "caption-missing", "table": "table",
         "mask": "mask", "source": "source", "skip": "setting", "setting": "setting"}  # fmt: skip
"""Our codes of the problems that reading finds (`found.Problem`), other than unreadable pictures"""
PICTURES = (("animated", "save the one to learn"), ("huge", "megapixels are read"), ("decoder", "needs a decoder"),
            ("mode", "32 bits a pixel"))  # fmt: skip
"""Our codes of the reasons why a picture cannot be used, by words in them; "unreadable" where none fits"""


@dataclass(frozen=True)
class Finding:
    """One problem, or one thing worth knowing."""

    severity: Severity
    """error: training would not start; warning: it would, with a worse result; note: nothing is wrong"""
    code: str
    """Its kind, a key of ADVICE"""
    text: str
    """What was found, with the names"""
    files: tuple[str, ...] = ()
    """All files that it is about, as the user calls them"""
    advice: str = ""
    """What to do"""


def finding(severity: Severity, code: str, text: str, files: Iterable[str] = ()) -> Finding:
    """A finding with the advice of its code."""
    return Finding(severity, code, text, tuple(files), ADVICE[code])


def of_problem(problem: Problem, title: str = "") -> Finding:
    """The finding of what keeps training from starting; `title` is that of its concept, where there are several."""
    text = f"{printable(title)}: {problem.text}" if title else problem.text
    reasons = (code for code, words in PICTURES if words in problem.text)
    return finding("error", CODES.get(problem.code) or next(reasons, "unreadable"), text, problem.files)


def ordered(found: Iterable[Finding]) -> list[Finding]:
    """By severity, then by the weight of the kind; otherwise as they came."""
    codes = list(ADVICE)
    return sorted(found, key=lambda one: (SEVERITIES.index(one.severity), codes.index(one.code)))


def named(files: Sequence[str], most: int = 6) -> str:
    """ "a.jpg, b.jpg and 4 more" """
    shown = ", ".join(printable(name) for name in files[:most])
    return shown + (f" and {len(files) - most} more" if len(files) > most else "")
