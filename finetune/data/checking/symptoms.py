"""The doctor's single checks, on examples whose pictures can be read. Each yields what it finds, none raises."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from finetune.data.checking import looks
from finetune.data.checking.findings import ADVICE, Finding, Severity, finding, named
from finetune.data.checking.looks import BLURRED, Look
from finetune.data.examples import Example
from finetune.data.framing.frames import Framed
from finetune.data.reading import captions as texts
from finetune.data.reading import concepts
from finetune.data.reading.pictures import printable
from finetune.settings import Data

GPS = 0x8825
WINDOW = 75
"""Tokens of a caption that CLIP's text encoders see: 77 less the two that stand for its beginning and end"""
FREQUENT = 0.9
"""A tag in at least this share of the captions is said to be over-frequent."""
CAPTIONS = 5
"""... where there are at least so many captions: among fewer, every tag is frequent."""
SHOWN = 200
"""Letters that are shown of what is cut off a caption"""
ENLARGED = 1.25
"""Pictures that are enlarged further are said to harm the result; those up to here are only told."""
UNBALANCED = 3.0
"""Concepts are said to be unbalanced when one is seen more than so many times as often as another."""

PLAIN = ("RGB", "RGBA", "P")
"""Modes that nothing is said about"""
READING = {
    "turned": "turned upright by their EXIF data",
    "transparent": "transparent, put on the background",
    "converted": "converted to RGB with 8 bits ({modes})",
    "private": "hold the place where they were taken, which is not passed on",
}
"""What was done to pictures while reading them, by code"""

Near = Mapping[str, Look]
"""Looks by the digest of the picture"""


def names(examples: Iterable[Example]) -> list[str]:
    return [example.name or example.path.name for example in examples]


def copies(examples: Sequence[Example], seen: Near) -> Iterator[Finding]:
    """Pictures that are the same to the pixel, and such as only look the same."""
    same = defaultdict(list)
    for example in examples:
        assert example.facts is not None
        same[example.facts.digest].append(example)
    for group in same.values():
        if len(group) > 1:
            yield finding("warning", "duplicate", f"the same picture: {named(names(group))}", names(group))
    known = [digest for digest in same if digest in seen]
    for numbers in looks.near([seen[digest] for digest in known]):
        group = [same[known[number]][0] for number in numbers]
        yield finding("warning", "near-duplicate", f"look alike: {named(names(group))}", names(group))


def blurred(examples: Sequence[Example], seen: Near) -> Iterator[Finding]:
    """Pictures without a sharp part at the size that they are trained at, the worst first."""
    found = []
    for example in examples:
        look = seen.get(example.facts.digest) if example.facts else None
        if look is not None and look.sharpness < BLURRED:
            found.append((look.sharpness, example))
    for sharpness, example in sorted(found, key=lambda pair: pair[0]):
        (name,) = names([example])
        text = f"{printable(name)}: blurred: sharpness {sharpness:.0f}, sharp pictures have {BLURRED:.0f} or more"
        yield finding("warning", "blurred", text if sharpness else f"{printable(name)}: shows one colour only", [name])


def sizes(framed: Sequence[Framed], batch: int) -> Iterator[Finding]:
    """Pictures that cannot be trained as framed, that are enlarged, and that are alone in their bucket."""
    alone = defaultdict(list)
    for one in framed:
        (name,) = names([one.example])
        for fault in one.faults:
            code = "mask" if one.example.mask is not None and not one.reasons else "size"
            advice = " ".join(one.advice) or ADVICE[code]
            yield Finding("error", code, f"{printable(name)}: {fault}", (name,), advice)
        for resolution, reason in {} if one.faults else one.reasons.items():
            yield finding("note", "resolution", f"{printable(name)}: not trained at {resolution}: {reason}", [name])
        largest = max((view.scale for views in one.views.values() for view in views), default=1.0)
        if largest > 1:
            severity: Severity = "warning" if largest > ENLARGED else "note"
            yield finding(severity, "enlarged", f"{printable(name)}: enlarged x{largest:.2f}", [name])
        for views in one.views.values():
            alone[views[0].target].append(name)
    if batch > 1 and len(alone) > 1:
        for (height, width), inside in alone.items():
            if len(inside) == 1:
                text = f"{printable(inside[0])}: the only picture trained at {width} x {height}"
                yield finding("warning", "bucket", text, inside)


def facts(examples: Sequence[Example]) -> Iterator[Finding]:
    """What was done to pictures while reading them, and what their files hold that is not passed on."""
    lists: dict[str, list[str]] = {code: [] for code in READING}
    modes: Counter[str] = Counter()
    for example in examples:
        (name,) = names([example])
        assert example.facts is not None
        mode, place = header(example)
        modes.update([mode] if mode not in PLAIN else [])
        done = {"turned": example.facts.turned, "transparent": example.facts.transparent and not example.mask,
                "converted": mode not in PLAIN, "private": place}  # fmt: skip
        for code, concerned in lists.items():
            concerned += [name] if done[code] else []
        for note in example.facts.notes:
            yield finding("warning", "picture", f"{printable(name)}: {note}", [name])
    for code, concerned in lists.items():
        if concerned:
            what = READING[code].format(modes=", ".join(modes))
            yield finding("note", code, f"{len(concerned)} {what}: {named(concerned)}", concerned)


def header(example: Example) -> tuple[str, bool]:
    """The file's own mode, and whether its EXIF data hold a place (GPS). Reads the header only."""
    try:
        with warnings.catch_warnings(), Image.open(example.path) as opened:
            warnings.simplefilter("ignore")
            return opened.mode, bool(opened.getexif().get_ifd(GPS))
    except Exception:  # a broken EXIF block is said elsewhere
        return "RGB", False


def captions(examples: Sequence[Example], data: Data, tokenizers: Sequence[Any], chunks: int = 1) -> Iterator[Finding]:
    """Captions that are too long, lack the trigger, or are the prompt where others have their own."""
    own = [one for one in examples if one.own_caption]
    rest = names(one for one in examples if not one.own_caption)
    if own and rest:
        yield finding("warning", "caption-prompt", f"{len(rest)} trained with the prompt: {named(rest)}", rest)
    for example in examples:
        (name,) = names([example])
        for caption in example.captions:
            if cut := cut_off(tokenizers, caption, chunks):
                shown = cut if len(cut) <= SHOWN else f"{cut[:SHOWN]}... ({len(cut)} letters)"
                text = f'{printable(name)}: the caption is longer than the text encoder reads; cut off: "{shown}"'
                yield finding("warning", "caption-long", text, [name])
    for number, trigger in triggers(data).items():
        lack = [
            one for one in examples if one.concept == number and not all(texts.holds(c, trigger) for c in one.captions)
        ]
        if lack:
            text = f'without the trigger "{trigger}": {named(names(lack))}'
            yield finding("warning", "trigger", text, names(lack))
    for number in dict.fromkeys(one.concept for one in own):
        inside = [one for one in own if one.concept == number]
        yield from tags(inside, triggers(data).get(number))


def cut_off(tokenizers: Sequence[Any], caption: str, chunks: int) -> str | None:
    """What the text encoders do not see of a caption. Without tokenizers, what they cannot see: a word is a token."""
    if tokenizers:
        return texts.cut_off(tokenizers, caption, chunks)
    return " ".join(caption.split()[chunks * WINDOW :]) or None


def triggers(data: Data) -> dict[int, str]:
    """Each concept's trigger, by number."""
    return {part.number: part.data.trigger for part in concepts.parts(data) if part.data.trigger}


def tags(examples: Sequence[Example], trigger: str | None) -> Iterator[Finding]:
    """Tags (parts between commas) that nearly all captions have, other than the trigger."""
    counts: Counter[str] = Counter()
    for example in examples:
        counts.update({tag.casefold() for caption in example.captions for tag in texts.tags(caption)})
    if len(examples) < CAPTIONS or not any("," in caption for one in examples for caption in one.captions):
        return
    for tag, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
        if count >= FREQUENT * len(examples) and not (trigger and texts.holds(tag, trigger)):
            yield finding("warning", "tag", f'"{tag}" is in {count} of {len(examples)} captions')


def balance(examples: Sequence[Example], data: Data) -> Iterator[Finding]:
    """Concepts of which one is seen far more often than another."""
    seen = epoch(examples)
    if len(seen) < 2 or max(seen.values()) <= UNBALANCED * min(seen.values()):
        return
    parts = [f"{title(data, number)}: {count}" for number, count in seen.items()]
    yield finding("warning", "balance", f"pictures that an epoch sees of each concept differ: {'; '.join(parts)}")


def epoch(examples: Iterable[Example]) -> dict[int, int]:
    """How many pictures an epoch sees of each concept."""
    counts: Counter[int] = Counter()
    for example in examples:
        counts[example.concept] += example.repeats
    return dict(sorted(counts.items()))


def title(data: Data, number: int) -> str:
    return concepts.called(concepts.parts(data)[number])


def batches(framed: Sequence[Framed], batch: int) -> Iterator[Finding]:
    """Fewer pictures than a step takes."""
    count = sum(one.example.repeats for one in framed if one.views)
    if 0 < count < batch:
        text = f"a step takes {batch} pictures, and there are {count}: some would be seen twice in one step"
        yield finding("warning", "batch", text)
