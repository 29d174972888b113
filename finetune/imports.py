"""Heavy libraries, imported in half the time and half the memory."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType, SimpleNamespace
from typing import Any

from finetune.standing import Finder, Later, Shelf


class NoCompiler(Later):
    """Stands for PyTorch's compiler, and knows what it is asked where nothing is compiled.

    Optimizers say where they are not to be compiled, diffusers and Accelerate ask whether a model is compiled, and
    libraries mark what is to be compiled in which way: the compiler is told of these marks once it is there.
    """

    def __init__(self, finder: Finder, name: str) -> None:
        super().__init__(finder, name)
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
"""What many of PyTorch's operators make of tensors without values, in Python: it is never without, and parts of it
count on that"""


def _with(*names: str) -> Callable[[Finder, str], Later]:
    return lambda finder, name: Later(finder, name, *names)


LATER: dict[str, Callable[[Finder, str], Later]] = {
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


FINDER = Finder(LATER, {"torch": OPERATORS})


@contextmanager
def swift() -> Iterator[None]:
    """Inside, libraries are imported without what only costs time and memory.

    What they make then stays, a million objects: Python's collector looks for garbage among them again and again while
    they are made, and in all its rounds afterwards. It waits, and then leaves them out. bitsandbytes, which diffusers
    imports wherever it is installed, compiles functions when it is imported, for which PyTorch loads its whole
    compiler: it has them as they are written instead.
    """
    if FINDER.active or not gc.isenabled():
        yield
        return
    gc.disable()
    FINDER.active = True
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
        FINDER.active = False
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
        FINDER.whole(OPERATORS)
        begin(mode, *given, **named)

    known: Any = FakeTensorMode
    known.__init__ = begun


def _as_written(model: Any = None, **how: Any) -> Any:
    return partial(_as_written, **how) if model is None else model
