"""What was found in each picture file, remembered by the file's content: a second look at 20,000 pictures decodes none.

Below $FINETUNE_CACHE, in a SQLite database that any number of processes share. It holds no names and no pixels, and can
be deleted at any time. A file that cannot be decoded is not remembered: a decoder may be installed meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

import PIL
from PIL import features

from finetune import home
from finetune.data import pictures
from finetune.data.pictures import BadPicture, Facts

FILE = "facts.sqlite"
BATCH = 64
"""Findings that are written at once; a process that is killed loses so many."""
PATIENCE = 20.0
"""Seconds to wait while other processes write"""
Found: TypeAlias = tuple[bytes | None, Facts]
"""What was found, and the key under which it is to be remembered; None where it was."""
_lock = threading.Lock()
"""Held while a connection is used: threads share one."""
log = logging.getLogger(__name__)


def facts(path: Path, background: str = "white") -> Facts:
    """What `pictures.decode` finds in a file: looked up where the same bytes were decoded before.

    Raises as `pictures.decode` does.
    """
    pictures.colour(background)
    with _database() as known:
        key, found = _look(path, background, known)
        _remember(known, [(key, found)])
    return found


def facts_of(
    paths: Iterable[Path], background: str = "white", workers: int | None = None
) -> Iterator[Facts | BadPicture]:
    """The facts of each file in order, or why it cannot be used; in `workers` threads (one a core, at most 4).

    At most two files a worker are looked at ahead of the one that is taken, however many there are.
    """
    pictures.colour(background)
    workers = workers or min(4, os.cpu_count() or 1)
    new: list[Found] = []
    with _database() as known:
        pool = ThreadPoolExecutor(workers)
        try:
            for found in _ahead(pool, paths, background, known, 2 * workers):
                if not isinstance(found, BadPicture):
                    new.append(found)
                if len(new) >= BATCH:
                    _remember(known, new)
                    new = []
                yield found if isinstance(found, BadPicture) else found[1]
        finally:
            pool.shutdown(cancel_futures=True)
            _remember(known, new)


def _ahead(
    pool: ThreadPoolExecutor, paths: Iterable[Path], background: str, known: sqlite3.Connection | None, most: int
) -> Iterator[Found | BadPicture]:
    def look(path: Path) -> Found | BadPicture:
        try:
            return _look(path, background, known)
        except BadPicture as bad:
            return BadPicture(bad.path, bad.reason)  # the one that was raised holds on to frames, and they to pixels

    waiting: deque[Future[Found | BadPicture]] = deque()
    for path in paths:
        waiting.append(pool.submit(look, path))
        if len(waiting) == most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _look(path: Path, background: str, known: sqlite3.Connection | None) -> Found:
    before = _state(path)
    key = _key(path, background) if before and known else None
    if key and known and (remembered := _recall(known, key)):
        return None, remembered
    found = pictures.decode(path, background)[1]
    return (key if _state(path) == before else None), found  # not one file's bytes and another one's pixels


def _state(path: Path) -> tuple[int, ...] | None:
    """Changes when a file does; None for what is no regular file."""
    with suppress(OSError):
        if path.is_file():
            stat = path.stat()
            return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    return None


def _key(path: Path, background: str) -> bytes | None:
    try:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None  # to decode it will say why
    return hashlib.sha256(json.dumps([content, background, _readers()]).encode()).digest()


@cache
def _readers() -> list[str]:
    """All that decides what a file's pixels are besides its bytes."""
    ours = hashlib.sha256(Path(pictures.__file__).read_bytes()).hexdigest()
    codecs = [f"{name} {features.version(name)}" for name in ("libjpeg_turbo", "jpg", "jpg_2000", "webp", "littlecms2")]
    plug_ins = []
    for name in ("pillow-heif", "pillow-jxl-plugin", "pillow-avif-plugin"):
        with suppress(PackageNotFoundError):
            plug_ins.append(f"{name} {version(name)}")
    return [ours, f"pillow {PIL.__version__}", *codecs, *plug_ins]


# --- the database: without it everything is decoded, and nothing else changes --------------------------------------


def _folder() -> Path:
    return home.cache("facts")


@contextmanager
def _database() -> Iterator[sqlite3.Connection | None]:
    """A connection of its own for each look; None where there can be none."""
    connection = _opened(_folder() / FILE)
    try:
        yield connection
    finally:
        if connection:
            connection.close()


def _opened(path: Path, again: bool = True) -> sqlite3.Connection | None:
    """A file that is no database of ours is set aside under another name, and begun anew."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS facts (key BLOB PRIMARY KEY, facts TEXT NOT NULL) WITHOUT ROWID"
            )
            connection.execute("SELECT key, facts FROM facts LIMIT 1").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection
    except (sqlite3.Error, OSError) as error:
        if again and isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            aside = path.with_name(f"{path.name}.damaged")
            with suppress(OSError):
                os.replace(path, aside)
            log.warning("%s: damaged (%s). Set aside as %s; pictures are decoded again.", path.name, error, aside.name)
            return _opened(path, again=False)
        log.warning("%s cannot be used (%s): pictures are decoded again each time.", path.name, error)
        return None


def _recall(known: sqlite3.Connection, key: bytes) -> Facts | None:
    try:
        with _lock:
            row = known.execute("SELECT facts FROM facts WHERE key = ?", (key,)).fetchone()
        fields = json.loads(row[0]) if row else None
        return Facts(**{**fields, "notes": tuple(fields["notes"])}) if fields else None
    except (sqlite3.Error, ValueError, TypeError, KeyError):
        return None


def _remember(known: sqlite3.Connection | None, new: Iterable[Found]) -> None:
    rows = [(key, json.dumps(asdict(found), separators=(",", ":"))) for key, found in new if key]
    if known is None or not rows:
        return
    try:
        with _lock, known:  # commits, or rolls back what was raised in
            known.execute("BEGIN IMMEDIATE")
            known.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)
    except sqlite3.Error as error:
        path = _folder() / FILE
        log.warning("%s: cannot be written (%s): %d pictures will be decoded again.", path, error, len(rows))
