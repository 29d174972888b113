"""Bytes that tensors hold, while something is computed: predicted on tensors without data, or counted on real ones."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from finetune.fast import attention
from finetune.planning import codes, kernels
from finetune.planning.work import Work

MEMORY = "[memory]"
"""What PyTorch's profiler calls what its allocator does"""
KNOWN = 256
"""Numbers of a tensor up to which they are known all the same: which pictures of a batch are taught, say"""
FLASH = 1
"""The attention that PyTorch takes for tensors with data: without the matrix of weights"""
aten = torch.ops.aten
KERNELS = {**kernels.KERNELS, **codes.KERNELS}


class Live(TorchDispatchMode):
    """Inside, every storage that an operator makes is counted until nothing refers to it any more.

    What a kernel holds for itself while it works is taken from `kernels`.
    """

    def __init__(self, kernels: bool = True) -> None:
        """`kernels`: count what those of the CPU hold for themselves."""
        super().__init__()
        self.kernels = kernels
        self.work = Work()
        """What was computed since the last `forget`"""
        self.held = 0
        """Bytes, now"""
        self.peak = 0
        """The most since the last `begin`"""
        self._known: dict[int, weakref.ref[Any]] = {}
        self._sizes: dict[int, int] = {}

    def begin(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        self.peak = self.held

    def forget(self) -> None:
        """Forget the work so far."""
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            return _some(args[0].dtype)
        if func is aten._fused_sdp_choice.default:
            return FLASH
        named = kwargs or {}
        if self.kernels and func in KERNELS:
            self.peak = max(self.peak, self.held + KERNELS[func](*args, **named))
        made = func(*args, **named)
        self.work.see(func, args, named, made)
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self.see(value)
        return made

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.held -= self._sizes.pop(key)

        self._known[key], self._sizes[key] = weakref.ref(storage, gone), size
        self.held += size
        self.peak = max(self.peak, self.held)

    @contextmanager
    def without(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Inside, these tensors' storages are in another memory."""
        size = sum(
            {t.untyped_storage()._cdata: self._sizes.get(t.untyped_storage()._cdata, 0) for t in tensors}.values()
        )
        self.held -= size
        try:
            yield
        finally:
            self.held += size

    def leave(self, tensor: Tensor) -> None:
        """Do not count a tensor's storage any more: it is in another memory."""
        key = tensor.untyped_storage()._cdata
        self.held -= self._sizes.get(key, 0)
        self._sizes[key] = 0


@contextmanager
def imagined(kernels: bool = True) -> Iterator[Live]:
    """Inside, tensors have shapes and no data, and what they would hold is counted. What is asked of a number that
    nobody knows is answered with 1."""
    with (
        mock.patch.object(nn.Module, "_apply", _apply),
        nullcontext() if kernels else mock.patch.object(attention, "pays", lambda x, width: False),  # a GPU's own
        mock.patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", KNOWN),
        FakeTensorMode(allow_non_fake_inputs=True),
        Live(kernels) as live,
    ):
        yield live


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """PyTorch's own, which puts what was changed into the tensor that is there: it cannot with tensors without data."""
    for child in module.children() if recurse else ():
        child._apply(change)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None and (made := change(parameter)) is not parameter:
                module._parameters[name] = nn.Parameter(made, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
    return module


def _some(dtype: torch.dtype) -> Any:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def held_by(values: Any, device: torch.device) -> int:
    """Bytes on a device of the storages of the tensors among values, of modules their weights and buffers."""
    parts = [value for value in tree_iter(values) if isinstance(value, nn.Module)]
    tensors = [value for value in tree_iter(values) if isinstance(value, Tensor)]
    tensors += [tensor for part in parts for tensor in (*part.parameters(), *part.buffers(), *codes.beside(part))]
    here = [tensor for tensor in tensors if tensor.device.type == device.type]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in here}.values())


def measured(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that PyTorch's allocator had to give, above what was held before, while something was done."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        work()
    seen: Any = profile.kineto_results
    return _peak(seen.events())


def _peak(events: Iterable[Any]) -> int:
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == MEMORY)
    held = peak = 0
    for _, _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
