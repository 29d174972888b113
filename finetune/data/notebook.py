"""What was measured once, remembered by what it was measured of: a SQLite database that many processes share.

Below $FINETUNE_CACHE. It holds no names and no pixels, and can be deleted at any time: all is measured again, and
nothing else changes.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

from finetune import home

BATCH = 64
"""Notes that are written at once; a process that is killed loses so many."""
TABLE = "CREATE TABLE IF NOT EXISTS notes (key BLOB PRIMARY KEY, note BLOB NOT NULL) WITHOUT ROWID"
PATIENCE = 20.0
"""Seconds to wait while other processes write"""
log = logging.getLogger(__name__)


class Notebook:
    """Bytes by key. To be closed, or used as a context manager; threads may share one."""

    def __init__(self, name: str) -> None:
        self._path = home.cache("facts") / f"{name}.sqlite"
        self._new: list[tuple[bytes, bytes]] = []
        self._lock = threading.Lock()
        self._known = _opened(self._path)

    def get(self, key: bytes) -> bytes | None:
        if self._known is None:
            return None
        with suppress(sqlite3.Error), self._lock:
            row = self._known.execute("SELECT note FROM notes WHERE key = ?", (key,)).fetchone()
            return bytes(row[0]) if row else None
        return None

    def add(self, key: bytes, note: bytes) -> None:
        self._new.append((key, note))
        if len(self._new) >= BATCH:
            self._write()

    def close(self) -> None:
        self._write()
        if self._known is not None:
            self._known.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _write(self) -> None:
        new, self._new = self._new, []
        if self._known is None or not new:
            return
        try:
            with self._lock, self._known:  # commits, or rolls back what was raised in
                self._known.execute("BEGIN IMMEDIATE")
                self._known.executemany("INSERT OR REPLACE INTO notes VALUES (?, ?)", new)
        except sqlite3.Error as error:
            log.warning("%s: cannot be written (%s): what was measured is not remembered.", self._path, error)


def _opened(path: Path, again: bool = True) -> sqlite3.Connection | None:
    """A file that is no database of ours is set aside under another name, and begun anew."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            connection.execute(TABLE)
            connection.execute("SELECT key, note FROM notes LIMIT 1").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection
    except (sqlite3.Error, OSError) as error:
        if again and isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            aside = path.with_name(f"{path.name}.damaged")
            with suppress(OSError):
                os.replace(path, aside)
            log.warning("%s: damaged (%s). Set aside as %s; all is measured again.", path.name, error, aside.name)
            return _opened(path, again=False)
        log.warning("%s cannot be used (%s): pictures are measured again each time.", path.name, error)
        return None
