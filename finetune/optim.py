"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from finetune import engine
from finetune.adapters import Group
from finetune.errors import Fault
from finetune.settings import Full, Optim, Train

BETAS = (0.9, 0.999)
OWN_RATE = (0.1, 10.0)
"""Rates that make sense for an optimizer which finds its own: factors on what it finds, 1 being as it is."""


@dataclass(frozen=True)
class Known:
    """An optimizer: where it is, and what is told to it beside the rates and the weight decay."""

    package: str
    """What `pip install` calls the library."""
    module: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    separable: bool = True
    """Whether a parameter's step follows from its own gradient and state, whatever the others' are."""
    foreach: bool = False
    """Whether it can step all parameters by a few calls, which hold values of all of them meanwhile."""


FEW = 2**26
"""Numbers of parameters up to which what is held to step them together is not missed: 256 MiB each time"""
SHARDED = ("adamw",)
"""Optimizers that were tested with a shared out state."""

KNOWN = {
    # Loshchilov & Hutter 2017, 1711.05101
    "adamw": Known("torch", "torch.optim", "AdamW", {"betas": BETAS, "fused": True}),
    # Dettmers et al. 2021, 2110.02861
    "adamw8bit": Known("bitsandbytes", "bitsandbytes.optim", "AdamW8bit", {"betas": BETAS}),
    # The same, its state moved out of the GPU's memory when that is short (Dettmers et al. 2023, 2305.14314)
    "pagedadamw8bit": Known("bitsandbytes", "bitsandbytes.optim", "PagedAdamW8bit", {"betas": BETAS}),
    # Chen et al. 2023, 2302.06675
    "lion8bit": Known("bitsandbytes", "bitsandbytes.optim", "Lion8bit", {"betas": (0.9, 0.99)}),
    # Shazeer & Stern 2018, 1804.04235, at the rate that is given: an adapter's zeros have no scale to follow
    "adafactor": Known(
        "transformers", "transformers.optimization", "Adafactor", {"relative_step": False, "scale_parameter": False}
    ),
    # Mishchenko & Defazio 2023, 2306.06101
    "prodigy": Known(
        *("prodigyopt", "prodigyopt", "Prodigy"),
        {"betas": BETAS, "use_bias_correction": True, "safeguard_warmup": True},
        separable=False,
    ),
    # Defazio et al. 2024, 2405.15682
    "schedulefree": Known("schedulefree", "schedulefree", "AdamWScheduleFree", {"betas": BETAS}, foreach=True),
    # Luo et al. 2023, 2307.02047
    "came": Known("pytorch_optimizer", "pytorch_optimizer", "CAME", {"betas": (0.9, 0.999, 0.9999)}, foreach=True),
}


def resolve(name: str, device: torch.device, sharded: bool = False) -> str:
    """`auto` is the 8-bit AdamW on a GPU, where it saves memory and costs nothing, and AdamW elsewhere.

    `sharded`: the engine shares out the optimizer's state. Raises Fault for those whose state has not the shape of the
    weights, or whose step looks at all weights together.
    """
    if sharded and name not in ("auto", *SHARDED):
        raise Fault(f"--optimizer {name}: not with an engine that shares out its state. Take {' or '.join(SHARDED)}.")
    if name != "auto":
        return name
    return "adamw8bit" if device.type == "cuda" and not sharded else "adamw"


def check(settings: Optim) -> None:
    """Refuse what an optimizer cannot do as it was asked, and one that is not installed. Needs no model."""
    name = settings.optimizer
    low, high = OWN_RATE
    if name == "prodigy" and not low <= settings.lr <= high:
        raise Fault(
            f"--optimizer prodigy --lr {settings.lr:g}: it finds the rate itself; --lr is a factor on what it finds, "
            f"from {low:g} to {high:g}. Say --lr 1."
        )
    if name == "prodigy" and settings.text_encoder_lr not in (None, settings.lr):
        raise Fault(
            f"--optimizer prodigy --lr {settings.lr:g} --text-encoder-lr {settings.text_encoder_lr:g}: it finds one "
            f"rate for all that trains. Say --text-encoder-lr {settings.lr:g}, or leave it out."
        )
    if name == "schedulefree" and settings.schedule != "constant":
        raise Fault(
            f"--optimizer schedulefree --schedule {settings.schedule}: its averaging of the weights stands in for a "
            "falling rate. Say --schedule constant; --warmup is welcome."
        )
    if settings.schedule_power <= 0:
        raise Fault(f"--schedule-power {settings.schedule_power:g}: more than 0. 1 is linear, 2 is usual.")
    if name != "auto":
        _class(name)


def check_full(full: Full, settings: Optim, train: Train, accelerator: Accelerator) -> None:
    """Refuse what cannot step one parameter at a time as it was asked. Needs no model."""
    bf16, early = full.weights == "bf16", full.optimizer_in_backward
    asked = "--weights bf16" if bf16 else "--optimizer-in-backward"
    name = settings.optimizer
    if full.parts and engine.is_sharding(accelerator):
        title = engine.SHARDING[engine.running(accelerator)]
        raise Fault(
            f"--parts {' '.join(full.parts)}: not tested with {title}, which a part of the weights seldom needs. Train "
            f"without {title}, or all weights."
        )
    if (bf16 or early) and name != "auto" and not KNOWN[name].separable:
        raise Fault(
            f"{asked} --optimizer {name}: weights step one at a time there, and this optimizer finds one rate over all "
            "of them. Take another one."
        )
    if (bf16 or early) and engine.is_sharding(accelerator):
        title = engine.SHARDING[engine.running(accelerator)]
        raise Fault(
            f"{asked}: {title} holds and steps the weights in pieces of its own, which spares memory too. "
            f"Leave {asked} out, or train without {title}."
        )
    if bf16 and train.precision != "bf16":
        raise Fault(
            f"--weights bf16 --precision {train.precision}: what is computed with bf16 weights is not more precise "
            "than they are. Say --precision bf16."
        )
    if bf16 and name == "schedulefree":
        raise Fault(
            "--weights bf16 --optimizer schedulefree: it keeps the average that it learns in the weights alone, too "
            "fine for bf16. Say --weights fp32, or take another optimizer."
        )
    if early and settings.max_grad_norm > 0:
        raise Fault(
            f"--optimizer-in-backward --max-grad-norm {settings.max_grad_norm:g}: the norm is known when all gradients "
            "are, and the first weights have stepped by then. Say --max-grad-norm 0."
        )
    if early and accelerator.num_processes > 1:
        raise Fault(
            f"--optimizer-in-backward: {accelerator.num_processes} processes average their gradients when the backward "
            "pass has them all. Train in one process, or leave it out."
        )
    if early and train.compile == "graphs":
        raise Fault(
            "--optimizer-in-backward --compile graphs: CUDA graphs need gradients that stay where they are, and here "
            "each is given back at once. Say --compile blocks, or leave one out."
        )
    if early and train.precision == "fp16":
        raise Fault(
            "--optimizer-in-backward --precision fp16: whether its loss scale was too high is known when all gradients "
            "are, and the first weights have stepped by then. Say --precision bf16 or fp32."
        )


def optimizer(groups: list[Group], settings: Optim, device: torch.device, sharded: bool = False) -> Optimizer:
    """The optimizer over all groups, each at its own rate, ready to step. Raises Fault, see `check`."""
    check(settings)
    name = resolve(settings.optimizer, device, sharded)
    rates = [{"params": group.parameters, "lr": group.lr} for group in groups]
    with redirect_stdout(None):  # Prodigy prints how it decays weights
        options = {**KNOWN[name].options, **_together(KNOWN[name], groups, device)}
        made = _class(name)(rates, lr=settings.lr, weight_decay=settings.weight_decay, **options)
    _switch(made, "train")
    return made


@contextmanager
def settled(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the weights are those to use: to sample, measure, export. Afterwards all is as before, to the bit.

    Of most optimizers they are the weights that train. The schedule-free ones train at points between an average and
    the latest weights, and the average is what is learned (Defazio et al. 2024, 2405.15682, eq. 6-8).
    """
    if not hasattr(_inner(optimizer)[0], "eval"):
        yield
        return
    training = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    _switch(optimizer, "eval")
    try:
        yield
    finally:
        _switch(optimizer, "train")
        with torch.no_grad():
            for parameter, value in training:
                parameter.copy_(value)  # going there and back would round


def settle(optimizer: Optimizer) -> None:
    """After the last step: the weights become those to use, for good."""
    _switch(optimizer, "eval")


def rate(optimizer: Optimizer) -> float:
    """The rate of the first group's next step: what is set, times what the optimizer has found by itself.

    Prodigy steps by d * lr, d its estimate of how far the weights have to go (Mishchenko & Defazio 2023, alg. 4).
    """
    first = optimizer.param_groups[0]
    return float(first["lr"]) * float(first.get("d", 1.0))


def schedule(optimizer: Optimizer, settings: Optim, steps: int, groups: Sequence[Group] = ()) -> LRScheduler:
    """The rate over the run: a linear warm-up, then constant, or falling to zero at the last step.

    `groups`: the optimizer's own, where some train in a part of the steps only: each begins and ends with its part.
    """
    spans = [(group.start, steps if group.stop is None else group.stop) for group in groups]
    spans = spans or [(0, steps)] * len(optimizer.param_groups)
    return LambdaLR(optimizer, [_later(_factor(settings, stop - start), start) for start, stop in spans])


def _later(factor: Callable[[int], float], start: int) -> Callable[[int], float]:
    return lambda step: factor(max(0, step - start))


def _factor(settings: Optim, steps: int) -> Callable[[int], float]:
    """What the rate is multiplied by in each step."""
    if settings.schedule == "polynomial":
        return _polynomial(settings.warmup, steps, settings.schedule_power)
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    nothing = torch.optim.SGD([torch.zeros(1)])
    made: Any = get_scheduler(name, nothing, num_warmup_steps=settings.warmup, num_training_steps=steps)
    return made.lr_lambdas[0]


def _polynomial(warmup: int, steps: int, power: float) -> Callable[[int], float]:
    """lr * (share of the steps after the warm-up that is left) ** power.

    diffusers' own takes one rate for all groups and ends at 1e-7.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return (max(0, steps - step) / max(1, steps - warmup)) ** power

    return factor


@contextmanager
def only(optimizer: Any, groups: Sequence[bool]) -> Iterator[None]:
    """Inside, the optimizer knows these of its groups alone: the others are not stepped, decayed or counted."""
    inner = _inner(optimizer)[0]
    every = inner.param_groups
    inner.param_groups = [group for group, known in zip(every, groups, strict=True) if known]
    try:
        yield
    finally:
        inner.param_groups = every


def _together(known: Known, groups: Sequence[Group], device: torch.device) -> dict[str, bool]:
    """All parameters by a few calls, where calls cost more than they compute: on a GPU, of an adapter. A CPU gains next
    to nothing by it, and beside a whole model there may be no room for what is held."""
    count = sum(parameter.numel() for group in groups for parameter in group.parameters)
    return {"foreach": device.type != "cpu" and count <= FEW} if known.foreach else {}


def _class(name: str) -> Any:
    known = KNOWN[name]
    try:
        return getattr(importlib.import_module(known.module), known.name)
    except ModuleNotFoundError as error:
        if error.name != known.module.partition(".")[0]:
            raise
        raise Fault(
            f"--optimizer {name}: needs the library {known.package}, which is not installed. "
            f"`pip install {known.package}`, or all of them: `pip install 'finetune-kit[optimizers]'`."
        ) from None


def _inner(optimizer: Any) -> list[Any]:
    """The optimizer itself, out of Accelerate's wrapper; or those of the single parameters."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return getattr(optimizer, "parts", [optimizer])


def _switch(optimizer: Optimizer, mode: str) -> None:
    """Tell the optimizers that ask for it whether what follows is training or use of the weights."""
    for part in _inner(optimizer):
        if switch := getattr(part, mode, None):
            switch()
