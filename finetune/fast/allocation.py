"""Memory that is given back is taken again: by the next step, as to fill fresh pages with zeros takes a 25th of one,
and by any thread."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""Names of `mallopt`, https://man7.org/linux/man-pages/man3/mallopt.3.html"""
LARGEST = 32 * 2**20
"""Bytes: the most that glibc lets MMAP_THRESHOLD be"""
NEVER = 2**31 - 1


def share() -> None:
    """Let threads that begin from now on take from the same memory as all others, not each from its own: what one has
    freed is there for the next. On Linux; elsewhere nothing."""
    if libc := _glibc():
        libc.mallopt(ARENA_MAX, 1)


def keep() -> None:
    """Let glibc hold on to what is freed from now on, in this process; what was freed so far goes to the system.
    Elsewhere nothing."""
    if libc := _glibc():
        libc.malloc_trim(0)
        libc.mallopt(MMAP_THRESHOLD, LARGEST)
        libc.mallopt(TRIM_THRESHOLD, NEVER)


def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
