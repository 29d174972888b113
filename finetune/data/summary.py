"""What a run's summary says of its pictures."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from finetune.data import geometry, pictures
from finetune.data.examples import Example
from finetune.data.folder import caption_files, look
from finetune.data.geometry import Geometry
from finetune.data.pictures import Facts, printable


def describe(examples: Sequence[Example], resolution: int | None = None) -> list[str]:
    """Lines for the run's summary. What was done to the pictures is counted, and the files concerned are named.

    With the resolution, also how far pictures are enlarged and cropped.
    """
    found = {one.path: one.facts or pictures.decode(one.path)[1] for one in examples}
    lines = [_sizes(found) + (f", and {len(flips)} mirrored" if (flips := [e for e in examples if e.flip]) else "")]
    if resolution is not None:
        lines += _placement({p: geometry.centre((f.height, f.width), (resolution,) * 2) for p, f in found.items()})
    lines += _named("turned upright by their EXIF data", [path for path, facts in found.items() if facts.turned])
    lines += _named("transparent, put on the background", [path for path, facts in found.items() if facts.transparent])
    lines += _captions(examples)
    lines += _left_alone(found)
    lines += [f"{printable(path.name)}: {note}" for path, facts in found.items() for note in facts.notes]
    return lines


def _sizes(found: dict[Path, Facts]) -> str:
    sizes = sorted({(facts.width * facts.height, facts.width, facts.height) for facts in found.values()})
    ends = [f"{width} x {height}" for _, width, height in (sizes[0], sizes[-1])] if sizes else []
    return _count(len(found), "picture") + (f" of {' to '.join(dict.fromkeys(ends))} pixels" if ends else "")


def _placement(placed: dict[Path, Geometry]) -> list[str]:
    """How far the pictures are enlarged, and how much of them the crop keeps."""
    small = [path for path, one in placed.items() if one.scale > 1]
    most = max((one.scale for one in placed.values()), default=1.0)
    lines = _named(f"smaller than the training size, enlarged up to x{most:.2f}", small)
    kept = [f"{share:.0%}" for one in (min, max) for share in [one((p.kept for p in placed.values()), default=1.0)]]
    return [*lines, f"the centre crop keeps {' to '.join(dict.fromkeys(kept))} of each picture"]


def _captions(examples: Sequence[Example]) -> list[str]:
    """How many captions come from files; which pictures take the prompt where others do not."""
    own = [one for one in examples if one.own_caption and not one.flip]
    rest = [one for one in examples if not one.own_caption and not one.flip]
    lines = [_count(len(own), "caption") + (" from a file" if len(own) == 1 else " from files")] if own else []
    for prompt in dict.fromkeys(one.caption for one in rest):
        what = [one.path for one in rest if one.caption == prompt]
        lines += _named(f'"{prompt}" for those without', what) if own else [f'"{prompt}" for {len(what)}']
    return lines


def _left_alone(found: Collection[Path]) -> list[str]:
    """What else lies in the pictures' folders. A caption file that belongs to no picture is named too."""
    lines = []
    for listing in map(look, dict.fromkeys(path.parent for path in found)):
        lines += _named("left out by --skip", [path for path in listing.pictures if path not in found])
        used = set(caption_files(listing.pictures, listing.captions).values())
        unused = [path for path in listing.captions if path not in used]
        lines += _named("other files, left alone", [*listing.others, *unused])
        lines += _named("sub-folders, not entered", listing.folders)
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _named(what: str, paths: Sequence[Path], most: int = 6) -> list[str]:
    """ "what: 2 (a.jpg, b.jpg)", nothing for none."""
    if not paths:
        return []
    names = [printable(path.name) for path in paths[:most]] + (["..."] if len(paths) > most else [])
    return [f"{what}: {len(paths)} ({', '.join(names)})"]
