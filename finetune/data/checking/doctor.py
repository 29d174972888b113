"""The data-set doctor: every problem of a data set at once, in order of weight, before a model is loaded.

`check` looks, `require` is what training asks. No file is changed; what is found in a picture is remembered below the
cache by its content, so that a second look at many pictures is quick.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune import settings
from finetune.data.checking import lenient, look_memo, symptoms
from finetune.data.checking.findings import Finding, finding, of_problem, ordered
from finetune.data.checking.look_memo import Track
from finetune.data.examples import Example
from finetune.data.framing import frames
from finetune.data.framing.frames import Framed
from finetune.data.reading import concepts, folder, metadata, sources
from finetune.data.reading.concepts import Part
from finetune.data.reading.pictures import printable
from finetune.errors import Fault
from finetune.glance import EMBEDDED, Glance, glance
from finetune.settings import Data, Framing, Model

UNKNOWN = Glance(512, 64, ())
"""What is assumed of a model that is not on this machine: Stable Diffusion 1's side"""


@dataclass(frozen=True)
class Recommendation:
    """How long to train, and why."""

    steps: int
    """Optimizer steps, at the batch that was asked about"""
    repeats: dict[str, int]
    """By concept, how often an epoch should see its pictures; empty for a single concept"""
    reason: str


@dataclass(frozen=True)
class Report:
    """What was found."""

    findings: list[Finding]
    """In order of weight"""
    pictures: int = 0
    """That can be read"""
    captions: int = 0
    """Pictures that have captions of their own"""
    concepts: dict[str, int] = field(default_factory=dict)
    """Pictures that an epoch sees of each concept"""
    resolutions: tuple[int, ...] = ()
    buckets: dict[tuple[int, int], int] = field(default_factory=dict)
    """Sizes (height, width) with their numbers of pictures"""
    recommendation: Recommendation | None = None
    """None when there is nothing to train on"""

    @property
    def starts(self) -> bool:
        """Whether training would start."""
        return not any(one.severity == "error" for one in self.findings)

    @property
    def warnings(self) -> list[str]:
        """Lines for a run's summary: what training starts with to the result's disadvantage."""
        return [one.text for one in self.findings if one.severity == "warning"]


def check(data: Data, captions: settings.Captions | None = None, framing: Framing | None = None) -> list[Finding]:
    """All findings on a data set, in order of weight; see `examine`."""
    return examine(data, captions, framing).findings


def require(
    data: Data,
    captions: settings.Captions | None = None,
    framing: Framing | None = None,
    model: Model | None = None,
    batch: int = 1,
    seed: int = 0,
    track: Track = lambda items, _: items,
) -> Report:
    """What training asks before it loads a model. Raises one Fault that lists every error; else tells the rest."""
    report = examine(data, captions, framing, model, batch, seed, track)
    if errors := [one for one in report.findings if one.severity == "error"]:
        if len(errors) == 1 and errors[0].code in ("setting", "folder"):
            raise Fault(errors[0].text)
        advice = dict.fromkeys(one.advice for one in errors)
        raise sources.refusal(data, [one.text for one in errors], [_with_names(said, errors) for said in advice])
    return report


def _with_names(advice: str, errors: Sequence[Finding]) -> str:
    """Advice that names the files it is about, so that a line can be copied."""
    files = dict.fromkeys(file for one in errors if one.advice == advice for file in one.files)
    return advice.replace("--skip NAME ...", f"--skip {' '.join(shlex.quote(printable(file)) for file in files)}")


def examine(
    data: Data,
    captions: settings.Captions | None = None,
    framing: Framing | None = None,
    model: Model | None = None,
    batch: int = 1,
    seed: int = 0,
    track: Track = lambda items, _: items,
) -> Report:
    """Look at everything. `batch`: pictures a step, over all passes and processes. Raises no Fault."""
    captions, framing, model = captions or settings.Captions(), framing or Framing(), model or Model()
    try:
        examples, everyone, found = _read(data, captions, seed)
    except Fault as fault:
        return Report([finding("error", "setting", line) for line in (fault.message, *fault.details)])
    base = glance(model)
    if base is None:
        found.append(_unknown(model, framing))
    known = base or UNKNOWN
    resolutions = framing.resolution or (known.resolution,)
    framed, faults = _framed(everyone, framing, resolutions, known.multiple, seed)
    paths = {one.facts.digest: one.path for one in everyone if one.facts}
    seen = look_memo.looks_of(paths, max(resolutions), data.background, track)
    found += faults
    found += [*symptoms.copies(everyone, seen), *symptoms.blurred(everyone, seen), *symptoms.facts(everyone)]
    judged = list(symptoms.sizes(framed, batch))
    if base is None and not framing.resolution:  # a guess refuses nothing
        judged = [replace(one, severity="warning") if one.severity == "error" else one for one in judged]
    found += [*judged, *symptoms.batches(framed, batch)]
    found += [*symptoms.captions(examples, data, known.tokenizers, model.text_chunks or 1)]
    found += symptoms.balance(examples, data)
    found += _unused(data, everyone)
    return Report(
        ordered(found),
        pictures=len(everyone),
        captions=sum(one.own_caption for one in examples),
        concepts={symptoms.title(data, number): count for number, count in symptoms.epoch(examples).items()},
        resolutions=tuple(resolutions),
        buckets=frames.table(framed),
        recommendation=recommend(examples, data, model.model, batch) if examples else None,
    )


def recommend(examples: Sequence[Example], data: Data, model: str, batch: int) -> Recommendation:
    """Steps and repeats, with the reason.

    The number of pictures to be seen: 100 times each for the few of a subject (500 steps for 5 pictures: diffusers'
    DreamBooth README), 50 times for a style's dozens (the ready settings for styles), then fewer the more there are,
    no less than 10 times. The toybox, which is small and learns at a rate of its own, 2.4 times as often.
    """
    seen = symptoms.epoch(examples)
    most = max(seen.values())
    counts = Counter(one.concept for one in examples)
    share = {n: max(1, round(most / counts[n])) for n in seen} if len(seen) > 1 else {}
    count = sum(counts[n] * share[n] for n in seen) if share else sum(seen.values())
    passes, why = _passes(count)
    if model == EMBEDDED:
        passes, why = passes * 2.4, f"{why}; 2.4 times as often for the toybox, as its ready settings do"
    steps = max(10, -(-round(passes * count) // batch // 10) * 10)
    reason = f"each of {count} pictures about {passes:.0f} times, {batch} a step: {why}"
    return Recommendation(steps, {symptoms.title(data, n): repeats for n, repeats in share.items()}, reason)


def _passes(count: int) -> tuple[float, str]:
    if count <= 20:
        return 100.0, "what few pictures of a subject take"
    if count <= 100:
        return max(50.0, 2000 / count), "what some dozens of pictures take"
    return max(10.0, 5000 / count), "the more pictures, the less often each"


def _read(data: Data, captions: settings.Captions, seed: int) -> tuple[list[Example], list[Example], list[Finding]]:
    """The examples that have captions, all pictures that can be read, and what training would refuse.

    Raises Fault where the settings do not say what to read.
    """
    examples, problems = sources.survey(data, captions)
    parts = concepts.parts(data)
    found = [of_problem(one, parts[one.concept].title) for one in problems]
    if data.strict:
        found = [replace(one, advice=sources.STRICT) if one.code == "caption-missing" else one for one in found]
    lacking = any(one.code == "no caption" for one in problems)
    everyone = lenient.read(data, captions) if lacking else examples
    try:
        sources.held_out(examples, data, seed)
    except Fault as fault:
        found += [finding("error", "setting", fault.message)] if examples else []
    return _titled(examples, parts), _titled(everyone, parts), found


def _titled(examples: Sequence[Example], parts: Sequence[Part]) -> list[Example]:
    """With several concepts, names that say whose a picture is: "cat/1.jpg"."""
    if len(parts) == 1:
        return list(examples)
    folders = {part.number: Path(part.data.data or "").name for part in parts}
    return [replace(one, name=f"{folders[one.concept]}/{one.name or one.path.name}") for one in examples]


def _framed(
    examples: Sequence[Example], framing: Framing, resolutions: Sequence[int], multiple: int, seed: int
) -> tuple[list[Framed], list[Finding]]:
    try:
        return list(frames.frame(examples, framing, resolutions, multiple, seed)), []
    except Fault as fault:
        lines = fault.details or [fault.message]
        return [], [finding("error", "setting", line) for line in lines]


def _unknown(model: Model, framing: Framing) -> Finding:
    side = "" if framing.resolution else f"; sizes are judged as for --resolution {UNKNOWN.resolution}"
    text = f"{model.model} is not on this machine: the length of captions is judged by their words{side}"
    return finding("note", "unknown-model", text)


def _unused(data: Data, examples: Sequence[Example]) -> list[Finding]:
    """Files beside the pictures that are not trained on."""
    found = []
    entered = {parent for one in examples for file in one.files for parent in file.parents}
    for path in lenient.folders(data):
        try:
            listing = folder.look(path)
        except Fault:
            continue
        used = set(folder.caption_files(listing.pictures, listing.captions).values())
        others = [file.name for file in (*listing.others, *listing.captions) if file not in used]
        others = [name for name in others if name not in metadata.TABLES]
        skipped = [file.name for file in listing.pictures if file.name in data.skip]
        inside = [file.name for file in listing.folders if file not in entered]
        for what, files in (
            ("left out by --skip", skipped),
            ("other files, left alone", others),
            ("sub-folders, not entered", inside),
        ):
            if files:
                found.append(finding("note", "unused", f"{len(files)} {what}: {symptoms.named(files)}", files))
    return found
