"""Frozen weights in the CPU's memory: whole blocks (`--offload-blocks`, kohya's --blocks_to_swap), each of which is
brought to the GPU for its own pass, and the next one meanwhile; or single layers (`--cache-kv`), for a call each.

The parameters are those in the CPU's memory (pinned where there is a GPU), so that who asks for them finds them whole;
while a block computes, its layers have copies of them. What the backward pass needs of a copy is not kept: the block is
brought again. The numbers are the same, and so is all that is computed with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from finetune import engine
from finetune.errors import Fault
from finetune.settings import Model


def check(model: Model, accelerator: Accelerator) -> None:
    """Refuse what blocks cannot be offloaded with. Needs no model."""
    if not model.offload_blocks:
        return
    if model.quantize:
        raise Fault(
            f"--offload-blocks --quantize {model.quantize}: bitsandbytes' weights are not sent to and fro. Take one of "
            "both: nf4 holds them in a quarter of bf16's memory, offloading holds two blocks."
        )
    if (running := engine.running(accelerator)) != "single":
        raise Fault(
            f"--offload-blocks: in one process, not with {running}, which it was not tested with. Leave it out."
        )


def rested(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in the CPU's memory, from where it is sent to the device: pinned for a GPU."""
    return tensor.cpu().pin_memory() if device.type == "cuda" else tensor


class Resting(nn.Linear):
    """A frozen layer whose weights stay in the CPU's memory, and are sent in for a call whose answer is not known."""

    answer: tuple[Tensor, Tensor] | None = None
    """What it answers now, whatever it is given: (known, ..., out), and which of these each row is, (B,)"""

    def forward(self, input: Tensor) -> Tensor:
        if self.answer is not None:
            known, rows = self.answer
            return known[rows]
        own = self.weight, self.bias
        weight, bias = (None if p is None else p.to(input.device, non_blocking=True, copy=True) for p in own)
        assert weight is not None
        return functional.linear(input, weight, bias)

    def _apply(self, change: Any, recurse: bool = True) -> Resting:
        """PyTorch's, by which modules are moved: these weights stay."""
        return self


def rest(layers: Sequence[nn.Linear], device: torch.device | str) -> None:
    """Hold these layers' weights, all frozen, in the CPU's memory."""
    for layer in layers:
        for weight in layer.parameters():
            weight.requires_grad_(False)
            weight.data = rested(weight.data, torch.device(device))
        layer.__class__ = Resting


def resting(part: nn.Module) -> list[Resting]:
    """The layers of a part that do."""
    return [layer for layer in part.modules() if isinstance(layer, Resting)]


@dataclass(frozen=True)
class _Place:
    """Where a weight belongs."""

    layer: nn.Module
    name: str
    weight: nn.Parameter
    """In the CPU's memory"""


@dataclass(frozen=True)
class _Saved:
    """A weight that the backward pass needs, as it is to be seen."""

    block: Block
    number: int
    view: tuple[Any, Any, Any]
    """Size, strides, offset"""


@dataclass(frozen=True)
class _Copies:
    """A block's weights on the GPU, as soon as `wait` was called."""

    tensors: list[Tensor]
    ready: Any

    def wait(self) -> list[Tensor]:
        if self.ready is not None:
            now = torch.cuda.current_stream()
            now.wait_event(self.ready)
            for tensor in self.tensors:
                tensor.record_stream(now)
        return self.tensors


class Block:
    """A block whose weights are in the CPU's memory, but for what is put on it later (an adapter)."""

    def __init__(self, module: nn.Module, belt: Belt) -> None:
        self.module, self.belt = module, belt
        self.places = [_Place(m, n, p) for m in module.modules() for n, p in m._parameters.items() if p is not None]
        for place in self.places:
            place.weight.requires_grad_(False)
            place.weight.data = rested(place.weight.data, belt.device)
        own: Any = module
        own._apply = self._apply
        module.register_forward_pre_hook(lambda *_: self._enter())
        module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self) -> None:
        """The layers have copies of their weights."""
        for number, (place, copy) in enumerate(zip(self.places, self.belt.take(self), strict=True)):
            place.layer._parameters[place.name] = nn.Parameter(copy, requires_grad=False)
            self.belt.known[copy.untyped_storage()._cdata] = self, number

    def _leave(self) -> None:
        for place in self.places:
            copy = place.layer._parameters[place.name]
            place.layer._parameters[place.name] = place.weight
            if copy is not None and copy is not place.weight:
                self.belt.known.pop(copy.untyped_storage()._cdata, None)

    def _apply(self, change: Any, recurse: bool = True) -> nn.Module:
        """PyTorch's, by which modules are moved: these weights stay."""
        for place in self.places:
            place.layer._parameters[place.name] = None
        try:
            return type(self.module)._apply(self.module, change, recurse)
        finally:
            for place in self.places:
                place.layer._parameters[place.name] = place.weight


class Belt:
    """Brings blocks: the one that is asked for, and the one that came after it the last time."""

    def __init__(self, denoiser: nn.Module, device: torch.device) -> None:
        self.device = device
        self.here: dict[Block, _Copies] = {}
        self.known: dict[int, tuple[Block, int]] = {}
        """Storages of the copies that layers have now -> which weight that is"""
        self._beside: tuple[dict[Block, Block], dict[Block, Block]] = {}, {}
        """Which block comes after which, forward and backward"""
        self._last: Block | None = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._saving: list[saved_tensors_hooks] = []
        denoiser.register_forward_pre_hook(lambda *_: self._begin())
        denoiser.register_forward_hook(lambda *_: self._end(), always_call=True)

    def take(self, block: Block) -> list[Tensor]:
        """Its weights on the GPU."""
        backward = torch._C._current_graph_task_id() != -1  # of what is computed again then, the pass goes backward
        if not backward:
            if self._last is not None:
                after, before = self._beside
                after[self._last], before[block] = block, self._last
            self._last = block
        following = self._beside[backward].get(block)
        self.here = {known: copies for known, copies in self.here.items() if known in (block, following)}
        for wanted in (block, following):
            if wanted is not None and wanted not in self.here:
                self.here[wanted] = self._bring(wanted)
        return self.here[block].wait()

    def _bring(self, block: Block) -> _Copies:
        weights = [place.weight.detach() for place in block.places]
        if self._side is None:
            return _Copies([weight.to(self.device, copy=True) for weight in weights], None)
        with torch.cuda.stream(self._side):
            tensors = [weight.to(self.device, non_blocking=True) for weight in weights]
            return _Copies(tensors, self._side.record_event())

    def _begin(self) -> None:
        self._last = None
        self._saving.append(saved_tensors_hooks(self._pack, self._unpack))
        self._saving[-1].__enter__()

    def _end(self) -> None:
        self._saving.pop().__exit__()

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        found = self.known.get(tensor.untyped_storage()._cdata)
        return tensor if found is None else _Saved(*found, (tensor.size(), tensor.stride(), tensor.storage_offset()))

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        return saved if isinstance(saved, Tensor) else self.take(saved.block)[saved.number].as_strided(*saved.view)


def put_on(denoiser: nn.Module, blocks: list[nn.Module], device: torch.device | str) -> None:
    """Hold these blocks' weights, all frozen, in the CPU's memory, and bring them to the device in turn."""
    own: Any = denoiser
    belt = Belt(denoiser, torch.device(device))
    own.offloaded = [Block(block, belt) for block in blocks]


def weights(denoiser: nn.Module) -> list[Tensor]:
    """What is held in the CPU's memory."""
    return [place.weight for block in getattr(denoiser, "offloaded", ()) for place in block.places]
