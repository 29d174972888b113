"""Fine-tune Stable Diffusion on a handful of pictures, and prove the file that comes out.

Recipes write `import finetune as ft` and use the names below. A name is imported when it is first used, so that the
command line, which reads a recipe's `Config` before any work, answers without importing torch.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from finetune.imports import swift

__version__ = "0.1.0"

if TYPE_CHECKING:
    from finetune import (
        adapters,
        config,
        data,
        export,
        families,
        keys,
        loop,
        objective,
        optim,
        priors,
        sampling,
        sliders,
        words,
    )
    from finetune.data.encoding import encode, release_frozen
    from finetune.errors import Failure, Fault
    from finetune.evaluation.during import Measured
    from finetune.families import Source, load
    from finetune.loop import Training, ask, due
    from finetune.previews import preview
    from finetune.run import Run

MODULES = [
    *("adapters", "config", "data", "export", "families", "keys", "loop", "objective", "optim", "priors", "sampling"),
    *("sliders", "words"),
]
HOME = {
    "Failure": "errors",
    "Fault": "errors",
    "Measured": "evaluation.during",
    "Run": "run",
    "Source": "families",
    "Training": "loop",
    "ask": "loop",
    "due": "loop",
    "encode": "data.encoding",
    "load": "families",
    "preview": "previews",
    "release_frozen": "data.encoding",
}
"""Where the names of functions and classes live."""
LIGHT = ("config", "errors")
"""What needs none of the heavy libraries"""

__all__ = [
    "Failure",
    "Fault",
    "Measured",
    "Run",
    "Source",
    "Training",
    "adapters",
    "ask",
    "config",
    "data",
    "due",
    "encode",
    "export",
    "families",
    "keys",
    "load",
    "loop",
    "objective",
    "optim",
    "preview",
    "priors",
    "release_frozen",
    "sampling",
    "sliders",
    "words",
]


def __getattr__(name: str) -> Any:
    if name not in HOME and name not in MODULES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    home = HOME.get(name, name)
    with nullcontext() if home in LIGHT else swift():
        module = importlib.import_module(f"finetune.{home}")
    value = getattr(module, name) if name in HOME else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
