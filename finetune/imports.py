"""Heavy libraries, imported in two thirds of the time."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

NO_COMPILER = "TORCHDYNAMO_DISABLE"


@contextmanager
def swift() -> Iterator[None]:
    """Inside, nothing is imported or done that only costs time.

    What libraries make when they are imported stays, a million objects: Python's collector looks for garbage among them
    again and again while they are made, and in all collections afterwards. It waits, and then leaves them out. And
    bitsandbytes, which diffusers imports wherever it is installed, compiles a function when it is imported, for which
    PyTorch loads its whole compiler. It has the function as it is written then.
    """
    if not gc.isenabled():  # we are inside already
        yield
        return
    before = os.environ.get(NO_COMPILER)
    gc.disable()
    os.environ[NO_COMPILER] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_COMPILER]
        else:
            os.environ[NO_COMPILER] = before
        gc.freeze()
        gc.enable()
