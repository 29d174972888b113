"""Memory that a step gives back is kept for the next one: to fill fresh pages with zeros takes a 25th of a step."""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of `mallopt`, https://man7.org/linux/man-pages/man3/mallopt.3.html"""
LARGEST = 32 * 2**20
"""Bytes: the most that glibc lets MMAP_THRESHOLD be"""
NEVER = 2**31 - 1


def keep() -> None:
    """Let glibc hold on to what is freed from now on, in this process; what was freed so far goes to the system.
    Elsewhere nothing."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(MMAP_THRESHOLD, LARGEST)
        libc.mallopt(TRIM_THRESHOLD, NEVER)
