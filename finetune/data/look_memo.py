"""The looks of many pictures, measured in several threads and remembered by what the pictures show.

Below $FINETUNE_CACHE, beside the facts (memo.py), in a database of the same kind: without names and pixels, shared by
any number of processes, of no loss when it is deleted. Where it cannot be used, everything is measured again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any

import PIL

from finetune import home
from finetune.data import looks, pictures
from finetune.data.looks import Look
from finetune.data.pictures import BadPicture

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Goes through pictures and shows how far it is"""
WORKERS = 2
"""Threads that decode and measure"""
BATCH = 64
"""Looks that are written at once"""
PATIENCE = 20.0
"""Seconds to wait while other processes write"""
LAYOUT = struct.Struct("<dQ192s")
log = logging.getLogger(__name__)


def looks_of(
    paths: Mapping[str, Path], side: int, background: str = "white", track: Track = lambda items, _: items
) -> dict[str, Look]:
    """The look of each picture at training size `side`, by its digest. One that cannot be read any more has none."""
    keys = {digest: _key(digest, side) for digest in paths}
    path = _folder() / "looks.sqlite"
    known = _recall(path, keys) if paths else {}
    found = {digest: known[key] for digest, key in keys.items() if key in known}
    missing = [digest for digest in paths if digest not in found]
    new: list[tuple[bytes, bytes]] = []
    for digest, look in _measured(missing, paths, side, background, track):
        if look is not None:
            found[digest] = look
            new.append((keys[digest], LAYOUT.pack(look.sharpness, look.hash, look.thumb)))
        if len(new) >= BATCH:
            _remember(path, new)
            new = []
    _remember(path, new)
    return {digest: found[digest] for digest in paths if digest in found}


def _measured(
    digests: Sequence[str], paths: Mapping[str, Path], side: int, background: str, track: Track
) -> Iterator[tuple[str, Look | None]]:
    """In order, at most two pictures a thread ahead of the one that is taken."""

    def measure(digest: str) -> tuple[str, Look | None]:
        try:
            return digest, looks.look(pictures.decode(paths[digest], background)[0], side)
        except BadPicture:
            return digest, None

    waiting: deque[Future[tuple[str, Look | None]]] = deque()
    if not digests:
        return
    with ThreadPoolExecutor(WORKERS) as pool:
        for digest in track(digests, "look at pictures"):
            waiting.append(pool.submit(measure, digest))
            if len(waiting) > 2 * WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _key(digest: str, side: int) -> bytes:
    return hashlib.sha256(f"{digest} {side} {_measures()}".encode()).digest()


@cache
def _measures() -> str:
    """All that decides what a picture's look is besides its pixels."""
    import imagehash

    ours = hashlib.sha256(Path(looks.__file__).read_bytes()).hexdigest()
    return f"{ours} pillow {PIL.__version__} imagehash {imagehash.__version__}"


def _folder() -> Path:
    return home.cache("facts")


def _open(path: Path, again: bool = True) -> sqlite3.Connection:
    """A file that is no database of ours is set aside under another name, and begun anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=PATIENCE)
    try:
        connection.execute("CREATE TABLE IF NOT EXISTS looks (key BLOB PRIMARY KEY, look BLOB NOT NULL) WITHOUT ROWID")
        connection.execute("SELECT key, look FROM looks LIMIT 1").fetchone()
    except BaseException as error:
        connection.close()
        if again and isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            log.warning("%s: damaged (%s). Set aside; pictures are looked at again.", path.name, error)
            os.replace(path, path.with_name(f"{path.name}.damaged"))
            return _open(path, again=False)
        raise
    return connection


def _recall(path: Path, keys: Mapping[str, bytes]) -> dict[bytes, Look]:
    """What is remembered of these keys."""
    found: dict[bytes, Look] = {}
    with suppress(sqlite3.Error, OSError, struct.error), closing(_open(path)) as known:
        for key in keys.values():
            row = known.execute("SELECT look FROM looks WHERE key = ?", (key,)).fetchone()
            if row is not None:
                found[key] = Look(*LAYOUT.unpack(row[0]))
    return found


def _remember(path: Path, new: Iterable[tuple[bytes, bytes]]) -> None:
    rows = list(new)
    if not rows:
        return
    try:
        with closing(_open(path)) as known, known:
            known.executemany("INSERT OR REPLACE INTO looks VALUES (?, ?)", rows)
    except (sqlite3.Error, OSError) as error:
        log.warning("%s: cannot be written (%s): pictures will be looked at again.", path.name, error)
