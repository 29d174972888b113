"""diffusers and transformers without their own progress bars and notes, where our own checks say what matters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

import diffusers.utils.logging
import transformers.utils.logging


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the two libraries (and Python's warnings) speak of errors only; afterwards as before."""
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in (diffusers.utils.logging, transformers.utils.logging):
            stack.enter_context(_quiet(library))
        yield


@contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
