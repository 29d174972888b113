"""How long work takes: by what this machine does of each kind in a second, measured, or by a rate that is told.

Measured are the operators themselves that a training calls, in its own shapes and precision, those first that have most
to do. What Python and PyTorch take until an operator begins is measured by operators that have nothing to do.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional

from finetune import engine
from finetune.planning import tracking
from finetune.planning.work import ARITHMETIC, MOVING, Call, Like, Work

BUDGET = 0.5
"""Seconds that the operators of a kind are measured for; one is in any case"""
RUNS = 4
"""How often one is run; the median counts, the first left out, which may make what the others use"""
BLOCKS, WIDTH = 4, 8
"""Of the network that has next to nothing to do"""
VALUES = 2**16
"""So many random numbers are in what operators are given, over and over"""
SIDES = 512, 1024, 2048, 4096, 8192
"""Of square matrices by which a device's most is found"""
TERA, GIGA = 1e12, 1e9
UNABLE = RuntimeError, TypeError, ValueError, IndexError
"""What an operator raises that cannot be called by itself"""
aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
NOTHING = Call(MOVING, 0, aten.neg.default, (Like((), (), torch.float32),), ())
Clock = Callable[[], float]


@dataclass(frozen=True)
class Rates:
    """What is done in a second."""

    by: str
    """Whose they are"""
    each: Mapping[str, float]
    """FLOP or bytes, by kind; a kind that is not there takes no time"""
    call: float = 0.0
    """Seconds until an operator begins"""
    ahead: bool = False
    """Whether operators are called ahead of those that are computed, as on a GPU"""
    least: bool = False
    """Whether it takes no less than they say, and maybe more"""

    def seconds(self, work: Work) -> float:
        amounts = work.amounts()
        computed = sum(amounts[kind] / rate for kind, rate in self.each.items())
        called = self.call * work.calls.total()
        return max(computed, called) if self.ahead else computed + called

    def said(self) -> str:
        """In words."""
        told = [_said(kind, rate) for kind, rate in self.each.items()]
        return self.by if self.least else f"what this machine does ({self.by}): {', '.join(told)}"


def told(tflops: float) -> Rates:
    """One rate of all arithmetic, and no time for the rest."""
    return Rates(f"--tflops {tflops:g}", dict.fromkeys(ARITHMETIC, tflops * TERA), least=True)


def measured(work: Work, device: torch.device, budget: float = BUDGET, now: Clock = time.perf_counter) -> Rates:
    """This machine's in such work. `budget`: seconds a kind; `now`: seconds by a clock."""
    kinds: dict[str, list[tuple[Call, int]]] = defaultdict(list)
    for call, often in work.calls.items():
        kinds[call.kind].append((call, often))
    each = {}
    for kind in (*ARITHMETIC, MOVING):
        calls = sorted(kinds[kind], key=lambda one: -one[0].amount * one[1])
        if rate := _rate(calls, device, budget, now):
            each[kind] = rate
    return Rates(machine(device), each, _until_called(device, now), ahead=device.type != "cpu")


def most(device: torch.device, dtype: torch.dtype, budget: float = BUDGET, now: Clock = time.perf_counter) -> float:
    """FLOP/s of a device, at most: of products of square matrices, larger ones as long as they are faster."""
    best = 0.0
    for side in SIDES:
        one = torch.randn(side, side, device=device).to(dtype)
        found = 2 * side**3 / _usual(partial(torch.matmul, one, one), device, budget, now)
        if found < 1.02 * best:
            break
        best = found
    return best


def machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else engine.processor()


def _rate(calls: Sequence[tuple[Call, int]], device: torch.device, budget: float, now: Clock) -> float | None:
    """Over the calls that the time allows, each as often as it is called, without what it takes to call one."""
    amount, seconds, until = 0, 0.0, time.perf_counter() + budget
    idle = _usual(_prepared(NOTHING, device), device, budget, now)
    for call, often in calls:
        try:
            seconds += often * max(0.0, _usual(_prepared(call, device), device, budget, now) - idle)
        except UNABLE:
            continue
        amount += often * call.amount
        if time.perf_counter() > until:
            break
    return amount / seconds if seconds else None


def _usual(run: Callable[[], object], device: torch.device, budget: float, now: Clock) -> float:
    """Seconds"""
    taken: list[float] = []
    while len(taken) < RUNS and sum(taken) < budget:
        begun = now()
        run()
        _finish(device)
        taken.append(now() - begun)
    return median(taken[1:] or taken)


def _until_called(device: torch.device, now: Clock) -> float:
    """Seconds an operator, forward and backward."""
    network = nn.Sequential(*(BasicTransformerBlock(WIDTH, 1, WIDTH) for _ in range(BLOCKS))).to(device)
    given = torch.zeros(1, 1, WIDTH, device=device)

    def run() -> None:
        network(given).sum().backward()

    with tracking.Live(kernels=False) as live:
        run()
    return _usual(run, device, BUDGET, now) / live.work.calls.total()


def _prepared(call: Call, device: torch.device) -> Callable[[], object]:
    """The call with tensors of its own. Attention is asked for as a model does, for which a GPU has other operators."""
    given, named = _real(call.given, device), {name: _real(value, device) for name, value in call.named}
    if call.func is FORWARD:
        return partial(_attention, *given[:3], **named)
    if call.func is BACKWARD:
        gradient, *inputs = (tensor.requires_grad_() for tensor in given[:4])
        made = _attention(*inputs, **named)
        return partial(torch.autograd.grad, made, inputs, gradient.detach(), retain_graph=True)
    return torch.no_grad()(partial(call.func, *given, **named))


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, scale=scale)


def _real(value: Any, device: torch.device) -> Any:
    if isinstance(value, Like):
        count = 1 + sum((side - 1) * stride for side, stride in zip(value.shape, value.strides, strict=True))
        if not value.dtype.is_floating_point:
            return torch.zeros(count, dtype=value.dtype, device=device).as_strided(value.shape, value.strides)
        numbers = torch.rand(min(count, VALUES), device=device).to(value.dtype)
        return numbers.repeat(-(-count // VALUES)).as_strided(value.shape, value.strides)
    if isinstance(value, tuple):
        return tuple(_real(one, device) for one in value)
    return device if isinstance(value, torch.device) else value


def _finish(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _said(kind: str, rate: float) -> str:
    return f"{kind} {rate / GIGA:.3g} GB/s" if kind == MOVING else f"{kind} {rate / TERA:.3g} TFLOP/s"
