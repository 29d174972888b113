"""What a run's summary says of its pictures."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune.data.examples import Example, Item
from finetune.data.framing import frames
from finetune.data.framing.frames import Framed
from finetune.data.reading import captions, library, metadata, pictures
from finetune.data.reading.folder import Listing, caption_files, look
from finetune.data.reading.pictures import Facts, printable
from finetune.errors import Fault


def describe(
    given: Sequence[Example] | Sequence[Item],
    tokenizers: Iterable[Any] = (),
    titles: Sequence[str] = (),
    chunks: int = 1,
) -> list[str]:
    """Lines for the run's summary. What was done to the pictures is counted, and the files concerned are named.

    Of items, also how they are scaled and cropped; with the model's tokenizers, also what of their captions is cut off.
    `titles`: what the concepts are called. `chunks`: of captions, as in `cut_off`.
    """
    items = [one for one in given if isinstance(one, Item)]
    every = [one.example if isinstance(one, Item) else one for one in given]
    examples = list({(one.concept, one.path, one.name): one for one in every}.values())
    found = {one: one.facts or pictures.decode(one.path)[1] for one in examples}
    lines = [_sizes(list(found.values())) + _views(items), *_concepts(examples, titles)]
    lines += frames.describe([Framed(one.example, {number: one.views}) for number, one in enumerate(items)])
    lines += _named("turned upright by their EXIF data", [one for one, facts in found.items() if facts.turned])
    see_through = [one for one, facts in found.items() if facts.transparent and one.mask != one.path]
    lines += _named("transparent, put on the background", see_through)
    lines += _captions(examples, items)
    lines += cut_off(examples, tokenizers, chunks=chunks)
    lines += _left_alone(examples)
    lines += [f"{_name(one)}: {note}" for one, facts in found.items() for note in facts.notes]
    return lines


def prompts(examples: Sequence[Example]) -> tuple[str, ...]:
    """A caption of each concept, to draw samples with."""
    first = {one.concept: one.captions[0] for one in reversed(examples)}
    return tuple(first[number] for number in numbers(examples))


def numbers(examples: Sequence[Example]) -> list[int]:
    """The concepts that the examples belong to."""
    return sorted({one.concept for one in examples})


def cut_off(examples: Sequence[Example], tokenizers: Iterable[Any], most: int = 6, chunks: int = 1) -> list[str]:
    """Lines that show which captions are longer than so many windows of a text encoder, and what is never seen."""
    known = list(tokenizers)
    owners: dict[str, list[str]] = {}
    for one in examples if known else ():
        for text in one.captions:
            owners.setdefault(text, []).append(_name(one))
    lost = [(cut, names) for text, names in owners.items() if (cut := captions.cut_off(known, text, chunks))]
    lines = [f'too long for the text encoder, which does not see "{cut}": {_shortened(names)}' for cut, names in lost]
    return [*lines[:most], *([f"... and {len(lines) - most} more captions"] if len(lines) > most else [])]


def _name(one: Example) -> str:
    return printable(one.name or one.path.name)


def _sizes(found: Sequence[Facts]) -> str:
    sizes = sorted({(facts.width * facts.height, facts.width, facts.height) for facts in found})
    ends = [f"{width} x {height}" for _, width, height in (sizes[0], sizes[-1])] if sizes else []
    return _count(len(found), "picture") + (f" of {' to '.join(dict.fromkeys(ends))} pixels" if ends else "")


def _views(items: Sequence[Item]) -> str:
    """What an epoch sees of a picture besides one crop of it."""
    places = max((len({view.crop for view in one.views if not view.mirrored}) for one in items), default=1)
    parts = [f"up to {places} crops of each"] if places > 1 else []
    parts += ["mirrored too"] if any(view.mirrored for one in items for view in one.views) else []
    return "".join(f", {part}" for part in parts)


def _concepts(examples: Sequence[Example], titles: Sequence[str]) -> list[str]:
    """The concepts' pictures, where there are several; pictures that an epoch sees more than once."""
    known, parts = numbers(examples), []
    for number in known:
        own = [one for one in examples if one.concept == number]
        seen = sum(one.repeats for one in own)
        called = titles[number] if titles else str(number + 1)
        parts.append(f"{called}: {len(own)}" + (f", {seen} an epoch" if seen != len(own) else ""))
    if len(known) > 1:
        return [f"{len(known)} concepts: {'; '.join(parts)}"]
    return [f"repeated: {seen} an epoch"] if (seen := sum(one.repeats for one in examples)) != len(examples) else []


def _captions(examples: Sequence[Example], items: Sequence[Item]) -> list[str]:
    """How many pictures have captions of their own; which take the prompt where others do not; variants."""
    own = [one for one in examples if one.own_caption]
    rest = [one for one in examples if not one.own_caption]
    count = sum(len(one.captions) for one in own)
    several = f" of {_count(len(own), 'picture')}" if count > len(own) else ""
    lines = [f"{_count(count, 'caption')} from {'files' if count > 1 else 'a file'}{several}"] if own else []
    for prompt in dict.fromkeys(one.captions[0] for one in rest):
        what = [one for one in rest if one.captions[0] == prompt]
        lines += _named(f'"{prompt}" for those without', what) if own else [f'"{prompt}" for {len(what)}']
    varied = {text for one in items for text in one.captions} - {text for one in examples for text in one.captions}
    return lines + ([f"{_count(len(varied), 'further caption')} by shuffled or dropped tags"] if varied else [])


def _left_alone(examples: Sequence[Example]) -> list[str]:
    """What else lies in the pictures' folders. A caption file that belongs to no picture is named too."""
    lines = []
    found = {file for one in examples for file in one.files}
    for folder in dict.fromkeys(one.path.parent for one in examples):
        if folder == library.kept():
            continue
        listing = look(folder)
        lines += _files("left out by --skip", [path for path in listing.pictures if path not in found])
        used = set(caption_files(listing.pictures, listing.captions).values())
        table, columns = _table(listing)
        others = [path for path in listing.others if path != table]
        lines += _files("other files, left alone", [*others, *(path for path in listing.captions if path not in used)])
        lines += _files("sub-folders, not entered", [one for one in listing.folders if not _inside(one, found)])
        if table and columns:
            lines.append(f"{table.name}: columns that are not used: {', '.join(map(printable, columns))}")
    return lines


def _table(listing: Listing) -> tuple[Path | None, list[str]]:
    try:
        table = metadata.table_of(listing)
        return table, metadata.unused(table) if table else []
    except Fault:  # of a folder that was not read as a table
        return None, []


def _inside(folder: Path, found: Collection[Path]) -> bool:
    return any(folder in path.parents for path in found)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _named(what: str, examples: Sequence[Example]) -> list[str]:
    """ "what: 2 (a.jpg, b.jpg)", nothing for none."""
    return [f"{what}: {len(examples)} ({_shortened([_name(one) for one in examples])})"] if examples else []


def _files(what: str, paths: Sequence[Path]) -> list[str]:
    return [f"{what}: {len(paths)} ({_shortened([printable(path.name) for path in paths])})"] if paths else []


def _shortened(names: Sequence[str], most: int = 6) -> str:
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])
