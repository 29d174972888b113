"""Heavy libraries, imported in half the time and two thirds of the memory."""

from __future__ import annotations

import ast
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


class Later(ModuleType):
    """Stands for a module until something of it is asked for; then that is imported.

    These `names` of it may be had without, see `Named`.
    """

    def __init__(self, name: str, *names: str) -> None:
        super().__init__(name)
        self._names = names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself asks of any module
            raise AttributeError(name)
        if name in self._names and self._stands():
            return Named(self, name)
        return getattr(self._real(), name)

    def _stands(self) -> bool:
        return sys.modules.get(self.__name__) is self

    def _real(self) -> ModuleType:
        whole(self.__name__)
        return importlib.import_module(self.__name__)


class Named:
    """Stands for what is called, asked or derived from in such a module: then that is imported.

    Nothing is an instance of a class whose module is not there.
    """

    def __init__(self, module: Later, name: str) -> None:
        self._module, self._name = module, name

    def _real(self) -> Any:
        return getattr(self._module._real(), self._name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._real()(*given, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __contains__(self, one: Any) -> bool:
        return one in self._real()

    def __getitem__(self, key: Any) -> Any:
        return self._real()[key]

    def __instancecheck__(self, one: Any) -> bool:
        return not self._module._stands() and isinstance(one, self._real())

    def __subclasscheck__(self, one: Any) -> bool:
        return not self._module._stands() and issubclass(one, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)


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
        while self._marked and hasattr(real, "allow_in_graph"):  # else it is being imported
            how, fn = self._marked.pop()
            getattr(real, how)(fn)
        return real


OPERATORS = "torch._meta_registrations"
"""What operators make of tensors without values"""


def _with(*names: str) -> Callable[[str], Later]:
    return lambda name: Later(name, *names)


LATER: dict[str, Callable[[str], Later]] = {
    "diffusers.models.autoencoders": Shelf,
    "diffusers.models.transformers": Shelf,
    "requests": Later,
    "scipy.stats": Later,
    "scipy.integrate": Later,
    "scipy.optimize": _with("linear_sum_assignment"),
    "torch._dynamo": NoCompiler,
    "torch._dynamo._trace_wrapped_higher_order_op": _with("TransformGetItemToIndex"),
    OPERATORS: Later,
    "torch.distributed._composable": Later,
    "torch.distributed._composable.fsdp": _with("fully_shard"),
    "torch.distributed.checkpoint": Later,
    "torch.distributed.checkpoint.hf_storage": _with("HuggingFaceStorageReader", "HuggingFaceStorageWriter"),
    "torch.distributed.fsdp": _with(
        "CPUOffload", "CPUOffloadPolicy", "FullyShardedDataParallel", "MixedPrecisionPolicy", "ShardingStrategy"
    ),
    "torch.distributed.fsdp.wrap": _with("transformer_auto_wrap_policy"),
    "torch.distributed.tensor": _with("DTensor", "Shard", "distribute_tensor"),
    "torch.distributed.tensor.placement_types": _with("_StridedShard"),
    "torch.masked": Later,
    "transformers.distributed.expert_parallel": _with("apply_expert_parallelism"),
    "transformers.distributed.parallel_utils": _with(
        "ALL_PARALLEL_STYLES", "_get_parameter_plan", "replace_layer_number_by_wildcard"
    ),
    "transformers.distributed.sharding_utils": _with(
        "DtensorShardOperation", "_dtensor_from_local_like", "_tied_params_are_equal"
    ),
    "transformers.distributed.tensor_parallel": _with(
        "apply_tensor_parallelism", "gather_state_dict_for_save", "get_kv_heads_per_rank", "verify_tp_plan"
    ),
    "transformers.models": Shelf,
}
"""What is imported and hardly ever used: autoencoders and transformers of all that diffusers can do; by its schedulers
for options of theirs, by transformers' losses; by PyTorch's optimizers in case they are compiled, by transformers'
masks; what many of its operators make of tensors without values, in Python; models in parts on several machines"""


class Finder(MetaPathFinder, Loader):
    """Finds stand-ins instead of modules while libraries are imported; later, parts of a package that something
    stands for: with the package itself, which imports some of them."""

    def __init__(self) -> None:
        self.inside = False
        self.asked: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package = sys.modules.get(name.rpartition(".")[0])
        if self.inside and name in LATER and name not in self.asked:
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
            return LATER[spec.name](spec.name)
        made = importlib.import_module(spec.name)
        spec.loader_state = made.__spec__
        return made

    def exec_module(self, module: ModuleType) -> None:
        if not isinstance(module, Later):
            module.__spec__ = module.__spec__ and module.__spec__.loader_state


FINDER = Finder()


def whole(name: str) -> None:
    """From now on nothing stands for this module, nor for others of its package, which may count on each other."""
    if name.startswith("torch.") and name != OPERATORS:  # without which PyTorch never is, so that its parts expect it
        whole(OPERATORS)
    package = name.split(".")[:2]
    kin = [other for other in LATER if other.split(".")[:2] == package and other not in FINDER.asked]
    FINDER.asked.update(kin)
    stood = [other for other in kin if isinstance(sys.modules.get(other), Later)]
    for other in stood:
        del sys.modules[other]
        parent, _, child = other.rpartition(".")
        if parent in sys.modules:
            vars(sys.modules[parent]).pop(child, None)
    for other in stood:
        importlib.import_module(other)


@contextmanager
def swift() -> Iterator[None]:
    """Inside, libraries are imported without what only costs time and memory.

    What they make then stays, a million objects: Python's collector looks for garbage among them again and again while
    they are made, and in all its rounds afterwards. It waits, and then leaves them out. bitsandbytes, which diffusers
    imports wherever it is installed, compiles functions when it is imported, for which PyTorch loads its whole
    compiler: it has them as they are written instead.
    """
    if FINDER.inside or not gc.isenabled():
        yield
        return
    gc.disable()
    FINDER.inside = True
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
    try:
        from unittest import mock

        import torch

        _foresee_fakes()
        with mock.patch.object(torch, "compile", _as_written):
            yield
    finally:
        _leave_out()
        FINDER.inside = False
        gc.enable()


@cache
def _leave_out() -> None:
    """Once: later, models would be among what is never looked at again. (To ask how much is takes 0.05 s.)"""
    gc.freeze()


@cache
def _foresee_fakes() -> None:
    """Where operators are followed without values, PyTorch has to know of all of them what they make."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    begin = FakeTensorMode.__init__

    def begun(mode: FakeTensorMode, *given: Any, **named: Any) -> None:
        whole(OPERATORS)
        begin(mode, *given, **named)

    known: Any = FakeTensorMode
    known.__init__ = begun


def _as_written(model: Any = None, **how: Any) -> Any:
    return partial(_as_written, **how) if model is None else model
