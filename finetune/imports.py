"""Heavy libraries, imported in half the time and two thirds of the memory."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType, SimpleNamespace
from typing import Any


class Later(ModuleType):
    """Stands for a module until something of it is asked for; then that is imported.

    These `functions` of it may be had without: they import it when they are called.
    """

    def __init__(self, name: str, *functions: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself asks of any module
            raise AttributeError(name)
        if name in self._functions:
            return lambda *given, **named: getattr(self._real(), name)(*given, **named)
        return getattr(self._real(), name)

    def _stands(self) -> bool:
        return sys.modules.get(self.__name__) is self

    def _real(self) -> ModuleType:
        if self._stands():
            del sys.modules[self.__name__]
        return importlib.import_module(self.__name__)


class NoCompiler(Later):
    """Stands for PyTorch's compiler, and knows what it is asked where nothing is compiled.

    Optimizers say where they are not to be compiled, diffusers and Accelerate ask whether a model is compiled, and
    libraries mark what is to be compiled in which way: the compiler is told of these marks once it is there.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.eval_frame = SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {}))
        self._marked: list[tuple[str, Any]] = []
        self.allow_in_graph = partial(self._mark, "allow_in_graph")
        self.assume_constant_result = partial(self._mark, "assume_constant_result")

    def graph_break(self, msg: str = "") -> None:
        pass

    def disable(self, fn: Any = None, recursive: bool = True, **how: Any) -> Any:
        return partial(self.disable, recursive=recursive, **how) if fn is None else fn

    def _mark(self, how: str, fn: Any) -> Any:
        if not self._stands():
            return getattr(self._real(), how)(fn)
        self._marked.append((how, fn))
        return fn

    def _real(self) -> ModuleType:
        real = super()._real()
        while self._marked:
            how, fn = self._marked.pop()
            getattr(real, how)(fn)
        return real


class PartsOfLater(MetaPathFinder, Loader):
    """Finds the parts of a package that something stands for: with the package itself, which imports some of them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package = sys.modules.get(name.rpartition(".")[0])
        if not isinstance(package, Later):
            return None
        package._real()
        return spec_from_loader(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        made = importlib.import_module(spec.name)
        spec.loader_state = made.__spec__
        return made

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__ and module.__spec__.loader_state


LATER: dict[str, Callable[[str], Later]] = {
    "scipy.stats": Later,
    "scipy.integrate": Later,
    "scipy.optimize": lambda name: Later(name, "linear_sum_assignment"),
    "torch._dynamo": NoCompiler,
    "torch._dynamo._trace_wrapped_higher_order_op": lambda name: Later(name, "TransformGetItemToIndex"),
}
"""What is imported and hardly ever used: by diffusers' schedulers for options of theirs, by transformers' losses, by
PyTorch's optimizers in case they are compiled, by transformers' masks"""


@contextmanager
def swift() -> Iterator[None]:
    """Inside, libraries are imported without what only costs time and memory.

    What they make then stays, a million objects: Python's collector looks for garbage among them again and again while
    they are made, and in all its rounds afterwards. It waits, and then leaves them out. bitsandbytes, which diffusers
    imports wherever it is installed, compiles functions when it is imported, for which PyTorch loads its whole
    compiler: it has them as they are written instead.
    """
    if not gc.isenabled():  # we are inside already
        yield
        return
    gc.disable()
    for name, stand_in in LATER.items():
        sys.modules.setdefault(name, stand_in(name))
    if not any(isinstance(finder, PartsOfLater) for finder in sys.meta_path):
        sys.meta_path.insert(0, PartsOfLater())
    try:
        from unittest import mock

        import torch

        with mock.patch.object(torch, "compile", _as_written):
            yield
    finally:
        _leave_out()
        gc.enable()


@cache
def _leave_out() -> None:
    """Once: later, models would be among what is never looked at again. (To ask how much is takes 0.05 s.)"""
    gc.freeze()


def _as_written(model: Any = None, **how: Any) -> Any:
    return partial(_as_written, **how) if model is None else model
