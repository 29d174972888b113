"""A folder of pictures with caption files. No file is changed or passed over.

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

from finetune.data.reading import pictures
from finetune.data.reading.found import Found, Picture, Problem, listed, not_utf8, one_line
from finetune.data.reading.pictures import printable
from finetune.errors import Fault

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


def find(listing: Listing, skip: Sequence[str] = (), several: bool = False) -> Found:
    """The folder's pictures with their own captions, by name. With `several`, each line of a file is one.

    Raises Fault when there are no pictures.
    """
    chosen = [path for path in listing.pictures if path.name not in skip]
    if not chosen:
        raise Fault(none_found(listing))
    captions, problems = own_captions(listing, skip, several)
    problems += [unknown_skip(name, listing.names) for name in skip if name not in listing.names]
    return Found([Picture(path, path.name, captions.get(path, ()), lack(path, captions)) for path in chosen], problems)


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


def read_captions(path: Path, several: bool = False) -> tuple[str, ...]:
    """The text of a caption file on one line, or each line by itself, without a byte order mark; () for an empty file.

    Raises Fault when it is not UTF-8.
    """
    name = printable(path.name)
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise Fault(f"{name}: cannot be read: {os.strerror(error.errno or 0)}") from error
    except UnicodeDecodeError as error:
        raise not_utf8(name, error.object, error, shlex.quote(name)) from error
    if "\0" in text:
        raise Fault(f"{name}: holds a zero byte at offset {raw.index(0)}: not a text file")
    lines = text.splitlines() if several else [text]
    return tuple(dict.fromkeys(line for part in lines if (line := one_line(part))))


def read_caption(path: Path) -> str:
    """The text of a caption file on one line, "" for an empty one. Raises Fault as `read_captions` does."""
    return next(iter(read_captions(path)), "")


def own_captions(
    listing: Listing, skip: Sequence[str], several: bool
) -> tuple[dict[Path, tuple[str, ...]], list[Problem]]:
    """Each picture's own captions, none for an empty file; and what is wrong with the caption files."""
    owners: dict[Path, list[Path]] = {file: [] for file in listing.captions if file.name not in skip}
    for picture, file in caption_files(listing.pictures, list(owners)).items():
        owners[file].append(picture)
    captions: dict[Path, tuple[str, ...]] = {}
    problems: list[Problem] = []
    for file, owned in owners.items():
        chosen = [picture for picture in owned if picture.name not in skip]
        if len(chosen) == 1:
            try:
                captions[chosen[0]] = read_captions(file, several)
            except Fault as error:
                problems.append(Problem("caption file", error.message, (file.name, chosen[0].name)))
        else:
            problems += _unclear(file, chosen if owned else _meant(file, listing.pictures))
    return captions, problems


def caption_files(found: Sequence[Path], files: Sequence[Path]) -> dict[Path, Path]:
    """The caption file of each picture that has one: name.jpg.txt before name.txt, same spelling before other case."""
    chosen: dict[Path, Path] = {}
    for spelling in (_folded, composed):
        index = {spelling(file.stem): file for file in reversed(files)}
        for picture in found:
            for name in (picture.stem, picture.name):
                if file := index.get(spelling(name)):
                    chosen[picture] = file  # the later wins
    return chosen


def composed(name: str) -> str:
    """One spelling for accented letters: macOS writes them in two parts (NFD), others in one (NFC)."""
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return composed(name).casefold()


def _meant(file: Path, found: Sequence[Path]) -> list[Path]:
    """The pictures that a caption file without a picture of its own seems to be for: a.txt beside a.1.jpg, a.2.jpg."""
    return [picture for picture in found if _folded(picture.name).startswith(_folded(file.stem) + ".")]


def _unclear(file: Path, meant: Sequence[Path]) -> list[Problem]:
    """The fault of a caption file that several pictures could mean; none when no picture does (a README.txt)."""
    if not meant:
        return []
    names = listed([path.name for path in meant])
    files = listed([path.name + CAPTION for path in meant])
    text = f"{printable(file.name)}: whose caption is it? It could be that of {names}. Use {files} instead"
    return [Problem("caption file", text, (file.name, *(path.name for path in meant)))]


def lack(path: Path, captions: dict[Path, tuple[str, ...]]) -> str:
    """What is said of a picture that has no caption of its own."""
    return "its caption file is empty" if path in captions else f"no caption; {printable(path.stem)}.txt would hold it"


def unknown_skip(name: str, known: Sequence[str] | set[str]) -> Problem:
    near = get_close_matches(name, known, n=1)
    hint = f"; nearest: {printable(near[0])}" if near else ""
    return Problem("skip", f"--skip {printable(name)}: no such file there{hint}", (name,))


def none_found(listing: Listing) -> str:
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


def _siblings(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.absolute().parent.iterdir() if entry.is_dir()]
    except OSError:
        return []
