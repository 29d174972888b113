"""Runs a training script as it is, watched: `python watched.py PLAN.json`.

The observer comes in where the script has Accelerate: had it imported that before, and PyTorch with it, the script
could no longer do so in a way of its own. Needs nothing of this package, so that a script may be run by a Python of
its own.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


class Awaited:
    """Finds a module as ever, and calls back when it was imported."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        found = PathFinder.find_spec(name, path) if name == self.name else None
        loader: Any = found and found.loader
        if loader is not None:
            imported = loader.exec_module

            def importing(module: Any) -> None:
                imported(module)
                self.then()

            loader.exec_module = importing
        return found


def set_constants(constants: dict[str, dict[str, Any]]) -> None:
    """Constants of a script's modules, for what it has no flag for: `module:Class` or `module`, then their names."""
    for place, values in constants.items():
        module, _, inside = place.partition(":")
        owner = importlib.import_module(module)
        owner = getattr(owner, inside) if inside else owner
        for name, value in values.items():
            setattr(owner, name, tuple(value) if isinstance(getattr(owner, name), tuple) else value)


def main(plan: dict[str, Any]) -> None:
    observers: list[Any] = []

    def observe() -> None:
        spec = spec_from_file_location("observer", Path(__file__).with_name("observer.py"))
        assert spec and spec.loader
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        observers.append(module.Observer(plan))
        observers[0].install()

    script = plan["script"]
    sys.path[0] = str(Path(script).parent) if script else ""
    sys.argv = [script or plan["module"], *plan["words"]]
    finder: Any = Awaited("accelerate", observe)
    sys.meta_path.insert(0, finder)
    set_constants(plan["constants"])
    try:
        if script:
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(plan["module"], run_name="__main__", alter_sys=True)
    finally:
        for observer in observers:
            observer.report()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
