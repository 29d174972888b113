"""Modules that are imported when something of them is asked for, and stood in for until then."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any


class Later(ModuleType):
    """Stands for a module until something of it is asked for; then that is imported.

    These `names` of it may be had without, see `Named`.
    """

    def __init__(self, finder: Finder, name: str, *names: str) -> None:
        super().__init__(name)
        self._finder, self._names = finder, names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself asks of any module
            raise AttributeError(name)
        if name in self._names and self._stands():
            return Named(self, name)
        return getattr(self._real(), name)

    def _stands(self) -> bool:
        return sys.modules.get(self.__name__) is self

    def _real(self) -> ModuleType:
        if self._stands():
            self._finder.whole(self.__name__)
        return importlib.import_module(self.__name__)


class Named:
    """Stands for what is called, asked or derived from in such a module: then that is imported.

    Nothing is an instance of a class whose module is not there.
    """

    def __init__(self, module: Later, name: str) -> None:
        self._module, self._name = module, name

    @cached_property
    def _real(self) -> Any:
        return getattr(self._module._real(), self._name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._real(*given, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real, name)

    def __contains__(self, one: Any) -> bool:
        return one in self._real

    def __getitem__(self, key: Any) -> Any:
        return self._real[key]

    def __instancecheck__(self, one: Any) -> bool:
        return not self._module._stands() and isinstance(one, self._real)

    def __subclasscheck__(self, one: Any) -> bool:
        return not self._module._stands() and issubclass(one, self._real)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real,)


class Shelf(Later):
    """Stands for a package that does nothing but import its parts: of these what is asked for."""

    @cached_property
    def _homes(self) -> dict[str, str]:
        """Where its `__init__.py` has each name from."""
        text = Path(self.__path__[0], "__init__.py").read_text(encoding="utf-8")
        taken = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level == 1]
        return {alias.asname or alias.name: str(node.module) for node in taken for alias in node.names}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._homes or not self._stands():
            return super().__getattr__(name)
        return getattr(importlib.import_module(f"{self.__name__}.{self._homes[name]}"), name)


class Finder(MetaPathFinder, Loader):
    """Finds stand-ins instead of modules while it is `active`; ever after, parts of a package that something stands
    for: with the package itself, which imports some of them."""

    def __init__(self, table: Mapping[str, Callable[[Finder, str], Later]], first: Mapping[str, str]) -> None:
        """`table`: what stands for which module; `first`: of a package, a module that has to be there before any
        other of the table."""
        self.table, self.first = table, first
        self.active = False
        self.asked: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package = sys.modules.get(name.rpartition(".")[0])
        if self.active and name in self.table and name not in self.asked:
            real = PathFinder.find_spec(name, path)
            found = spec_from_loader(name, self, is_package=True)
            if real is None or found is None:
                return None
            found.submodule_search_locations = real.submodule_search_locations or []
            return found
        if not isinstance(package, Later) or isinstance(package, Shelf):
            return None
        package._real()
        return spec_from_loader(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.submodule_search_locations is not None:
            return self.table[spec.name](self, spec.name)
        made = importlib.import_module(spec.name)
        spec.loader_state = made.__spec__
        return made

    def exec_module(self, module: ModuleType) -> None:
        if not isinstance(module, Later):
            module.__spec__ = module.__spec__ and module.__spec__.loader_state

    def whole(self, name: str) -> None:
        """From now on nothing stands for this module, nor for others of its package, which may count on each other."""
        words = name.split(".")
        if (before := self.first.get(words[0])) not in (None, name):
            self.whole(str(before))
        kin = [other for other in self.table if other.split(".")[:2] == words[:2] and other not in self.asked]
        self.asked.update(kin)
        stood = [other for other in kin if isinstance(sys.modules.get(other), Later)]
        for other in stood:
            del sys.modules[other]
            parent, _, child = other.rpartition(".")
            if parent in sys.modules:
                vars(sys.modules[parent]).pop(child, None)
        for other in stood:
            importlib.import_module(other)
