"""A folder of pictures -> examples. All of its faults are found and said at once; no file is changed or passed over.

`name.txt` beside `name.jpg` is its caption; `name.jpg.txt` is too, and is what tells `name.jpg` from `name.png`.
"""

from __future__ import annotations

import os
import shlex
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from finetune.data import pictures
from finetune.data.examples import Example
from finetune.data.pictures import BadPicture, Facts, printable
from finetune.errors import Fault
from finetune.settings import Data

CAPTION = ".txt"


@dataclass(frozen=True)
class Listing:
    """What lies in a folder, each kind sorted by name. Hidden files (.DS_Store, ._name.jpg) are in none."""

    folder: Path
    pictures: tuple[Path, ...]
    captions: tuple[Path, ...]
    others: tuple[Path, ...]
    """Files of other kinds: side-cars, notes, Thumbs.db"""
    folders: tuple[Path, ...]

    @property
    def names(self) -> set[str]:
        return {path.name for path in (*self.pictures, *self.captions, *self.others)}


def read(settings: Data) -> list[Example]:
    """The folder's pictures with their captions, by name; mirror images behind them where `flip` asks for them.

    Every picture is decoded whole. Raises one Fault that lists all that is wrong with the folder.
    """
    pictures.colour(settings.background)
    listing = look(settings.data)
    chosen = [path for path in listing.pictures if path.name not in settings.skip]
    if not chosen:
        raise Fault(_none_found(listing))
    facts, unreadable = _decode(chosen)
    captions, faults = _captions(listing, settings.skip)
    faults += [_unknown_skip(name, listing) for name in settings.skip if name not in listing.names]
    prompt = " ".join((settings.prompt or "").split())
    bare = [path for path in chosen if not captions.get(path)]
    missing = [_missing(path, captions) for path in bare] if settings.strict or not prompt else []
    _raise_all(listing.folder, unreadable, faults, missing, settings.strict)
    examples = [
        Example(path, captions.get(path) or prompt, own_caption=bool(captions.get(path)), facts=facts[path])
        for path in chosen
    ]
    return examples + [_mirrored(one) for one in examples] if settings.flip else examples


def read_plain(folder: Path, caption: str, weight: float = 1.0) -> list[Example]:
    """The folder's pictures, all with the same caption and weight: class pictures. The same checks as `read`."""
    listing = look(folder)
    if not listing.pictures:
        raise Fault(_none_found(listing))
    facts, unreadable = _decode(listing.pictures)
    _raise_all(listing.folder, unreadable, [], [], strict=False)
    return [Example(path, caption, weight, facts=facts[path]) for path in listing.pictures]


def look(folder: Path) -> Listing:
    """What is in the folder itself; its sub-folders are named, not entered. Raises Fault when it cannot be listed."""
    name = printable(folder)
    if not folder.exists():
        near = get_close_matches(folder.name, _siblings(folder), n=1)
        hint = f" Did you mean {printable(folder.parent / near[0])}?" if near else ""
        raise Fault(f"{name}: there is no such folder; nothing was created. Give the folder of your pictures.{hint}")
    if not folder.is_dir():
        raise Fault(f"{name}: a file, not a folder. Give the folder that the pictures lie in.")
    try:
        entries = sorted((entry for entry in folder.iterdir()), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise Fault(f"{name}: the folder cannot be listed ({os.strerror(error.errno or 0)}).") from error
    shown = [entry for entry in entries if not entry.name.startswith(".")]
    kinds: dict[str, list[Path]] = {"folder": [], "picture": [], "caption": [], "other": []}
    for entry in shown:
        kinds[_kind(entry)].append(entry)
    return Listing(folder, *(tuple(kinds[kind]) for kind in ("picture", "caption", "other", "folder")))


def _kind(entry: Path) -> str:
    if entry.is_dir():
        return "folder"
    return "picture" if is_picture(entry) else "caption" if entry.suffix.lower() == CAPTION else "other"


def is_picture(path: Path) -> bool:
    """By its ending, in upper or lower case; its content is looked at later."""
    return path.suffix.lower() in pictures.SUFFIXES and not path.name.startswith(".")


def read_caption(path: Path) -> str:
    """The text of a caption file on one line, without a byte order mark. Raises Fault when it is not UTF-8."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise Fault(f"{printable(path.name)}: cannot be read: {os.strerror(error.errno or 0)}") from error
    except UnicodeDecodeError as error:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            encoding, what = "UTF-16", "UTF-16"
        else:
            encoding, what = "WINDOWS-1252", f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        name = shlex.quote(printable(path.name))
        fix = f"`iconv -f {encoding} -t UTF-8 {name} > fixed.txt`"
        raise Fault(f"{printable(path.name)}: not UTF-8 ({what}). Save it as UTF-8, e.g. {fix}") from error
    if "\0" in text:
        raise Fault(f"{printable(path.name)}: holds a zero byte at offset {raw.index(0)}: not a text file")
    return " ".join(text.split())


def _decode(paths: Sequence[Path]) -> tuple[dict[Path, Facts], list[BadPicture]]:
    """Decode all: what was found in each, and those that cannot be used."""
    facts: dict[Path, Facts] = {}
    bad: list[BadPicture] = []
    for path in paths:
        try:
            facts[path] = pictures.decode(path)[1]
        except BadPicture as error:
            bad.append(error)
    return facts, bad


def _captions(listing: Listing, skip: Sequence[str]) -> tuple[dict[Path, str], list[str]]:
    """Each picture's own caption, "" for an empty file; and what is wrong with the caption files."""
    owners: dict[Path, list[Path]] = {file: [] for file in listing.captions if file.name not in skip}
    for picture, file in caption_files(listing.pictures, list(owners)).items():
        owners[file].append(picture)
    captions: dict[Path, str] = {}
    faults = []
    for file, owned in owners.items():
        chosen = [picture for picture in owned if picture.name not in skip]
        if len(chosen) == 1:
            try:
                captions[chosen[0]] = read_caption(file)
            except Fault as error:
                faults.append(error.message)
        else:
            faults += _unclear(file, chosen if owned else _meant(file, listing.pictures))
    return captions, faults


def caption_files(found: Sequence[Path], files: Sequence[Path]) -> dict[Path, Path]:
    """The caption file of each picture that has one: name.jpg.txt before name.txt, same spelling before other case."""
    chosen: dict[Path, Path] = {}
    for spelling in (_folded, _composed):
        index = {spelling(file.stem): file for file in reversed(files)}
        for picture in found:
            for name in (picture.stem, picture.name):
                if file := index.get(spelling(name)):
                    chosen[picture] = file  # the later wins
    return chosen


def _composed(name: str) -> str:
    """One spelling for accented letters: macOS writes them in two parts (NFD), others in one (NFC)."""
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(name).casefold()


def _meant(file: Path, found: Sequence[Path]) -> list[Path]:
    """The pictures that a caption file without a picture of its own seems to be for: a.txt beside a.1.jpg, a.2.jpg."""
    return [picture for picture in found if _folded(picture.name).startswith(_folded(file.stem) + ".")]


def _unclear(file: Path, meant: Sequence[Path]) -> list[str]:
    """The fault of a caption file that several pictures could mean; none when no picture does (a README.txt)."""
    if not meant:
        return []
    names = _listed([path.name for path in meant])
    files = _listed([path.name + CAPTION for path in meant])
    return [f"{printable(file.name)}: whose caption is it? It could be that of {names}. Use {files} instead"]


def _listed(names: Sequence[str], most: int = 4) -> str:
    """ "a, b and c", the first few of many."""
    shown = [printable(name) for name in names[:most]] + (["others"] if len(names) > most else [])
    return " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)


def _missing(path: Path, captions: dict[Path, str]) -> str:
    if path in captions:
        return f"{printable(path.name)}: its caption file is empty"
    return f"{printable(path.name)}: no caption; {printable(path.stem + CAPTION)} would hold it"


def _raise_all(
    folder: Path, unreadable: Sequence[BadPicture], faults: Sequence[str], missing: Sequence[str], strict: bool
) -> None:
    """One Fault for all that was found, each file with its reason, each kind with its remedy."""
    remedies = []
    if unreadable:
        names = " ".join(shlex.quote(printable(bad.path.name)) for bad in unreadable)
        remedies.append(f"Repair or replace the pictures, or leave them out by name: --skip {names}")
    if missing:
        remedies.append(
            "--strict takes pictures with a caption of their own only: write the captions, or go without --strict."
            if strict
            else 'Give a caption for all that have none, e.g. --prompt "a photo of sks dog", or write the files.'
        )
    details = [f"{printable(bad.path.name)}: {bad.reason}" for bad in unreadable] + [*faults, *missing]
    if details:
        count = f"{len(details)} problem{'s' if len(details) > 1 else ''}"
        raise Fault(" ".join([f"{printable(folder)}: {count}; nothing there was changed.", *remedies]), details)


def _none_found(listing: Listing) -> str:
    """What was looked for, what is there instead, and what may be meant."""
    seen = Counter(path.suffix.lower() or "no ending" for path in (*listing.captions, *listing.others))
    parts = [f"{count} {printable(suffix)}" for suffix, count in seen.most_common()]
    parts += [f"{len(listing.folders)} sub-folder{'s' if len(listing.folders) > 1 else ''}"] if listing.folders else []
    parts += [f"{len(listing.pictures)} pictures, all named in --skip"] if listing.pictures else []
    inside = [(folder, count) for folder in listing.folders if (count := _count(folder))]
    hint = " Pictures lie in: " + ", ".join(f"{printable(f)} ({n})" for f, n in inside) if inside else ""
    return (
        f"{printable(listing.folder)}: no pictures to train on. Looked for {', '.join(pictures.SUFFIXES)}, in upper or "
        f"lower case, not in sub-folders. Seen there: {', '.join(parts) or 'nothing'}.{hint}"
    )


def _count(folder: Path) -> int:
    try:
        return sum(is_picture(entry) for entry in folder.iterdir())
    except OSError:
        return 0


def _unknown_skip(name: str, listing: Listing) -> str:
    near = get_close_matches(name, listing.names, n=1)
    return f"--skip {printable(name)}: no such file there" + (f"; nearest: {printable(near[0])}" if near else "")


def _siblings(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.absolute().parent.iterdir() if entry.is_dir()]
    except OSError:
        return []


def _mirrored(one: Example) -> Example:
    return Example(one.path, one.caption, one.weight, True, one.own_caption, one.facts)
