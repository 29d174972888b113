"""Heavy libraries, imported in two thirds of the time."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

NO_COMPILER = "TORCHDYNAMO_DISABLE"
LATER = ("scipy.stats",)
"""What diffusers' schedulers import, for options of theirs that hardly anyone takes"""


class Later(ModuleType):
    """Stands for a module until something of it is asked for; then that is imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself asks of any module
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def swift() -> Iterator[None]:
    """Inside, libraries are imported without what only costs time.

    What they make then stays, a million objects: Python's collector looks for garbage among them again and again while
    they are made, and in all its rounds afterwards. It waits, and then leaves them out. bitsandbytes, which diffusers
    imports wherever it is installed, compiles a function when it is imported, for which PyTorch loads its whole
    compiler: it has the function as it is written instead.
    """
    if not gc.isenabled():  # we are inside already
        yield
        return
    before = os.environ.get(NO_COMPILER)
    gc.disable()
    os.environ[NO_COMPILER] = "1"
    for name in LATER:
        sys.modules.setdefault(name, Later(name))
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_COMPILER]
        else:
            os.environ[NO_COMPILER] = before
        if not gc.get_freeze_count():  # once: later, models would be among what is never looked at again
            gc.freeze()
        gc.enable()
