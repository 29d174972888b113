"""What a training does one after the other, each with the most memory that it takes: of tensors with data, or without.

The work is the training's own: its model, adapter, fast path, loss, loop and optimizer, on pictures of one size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from finetune import adapters, class_pictures, engine, families, offload, prompting, sampling, sliders
from finetune.config import asdict, new_words
from finetune.data import Example, Geometry, Item
from finetune.data.cache import Memory
from finetune.data.encoding import Encodings, release_frozen
from finetune.families import Conditions, Family, Source
from finetune.loop import Training
from finetune.planning import tracking
from finetune.planning.work import Work
from finetune.settings import Prior

STEPS = 2
"""In the first the optimizer's state comes to be, in the second it stands beside the activations"""
CAPTION, WORD = "a photo of sks dog", "sks-dog"


class Meter(Protocol):
    def __call__(self, name: str, family: Family, work: Callable[[], object], aside: nn.Module | None = None) -> int:
        """Of a phase's work: the most bytes of tensors while it is done, weights included. On a GPU a part may stand
        `aside` meanwhile."""


@dataclass(frozen=True)
class Blank(Encodings):
    """Encodings of pictures that nobody has: zeros."""

    family: Any = None
    dtype: torch.dtype = torch.float32

    def latents(self, item: Item, view: Geometry) -> tuple[Tensor, Tensor]:
        channels, factor = self.family.latents()
        mean, std = torch.zeros(2, channels, *(side // factor for side in view.target))
        return mean, std

    def conditions(self, caption: str) -> Conditions:
        shapes = self.family.condition_shapes()
        return {name: torch.zeros(1, *shape, dtype=self.dtype) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Taken:
    """What a training takes."""

    peaks: dict[str, int]
    """The most bytes that tensors hold, by phase"""
    work: Work = field(default_factory=Work)
    """What a step computes, predicted"""
    seconds: float | None = None
    """Of a step, measured"""

    @property
    def phase(self) -> str:
        """The one that takes most"""
        return max(self.peaks, key=lambda name: self.peaks[name])

    @property
    def peak(self) -> int:
        return self.peaks[self.phase]

    @property
    def flops(self) -> int:
        """Of a step: multiplications and additions of matrix products, convolutions and attention"""
        return self.work.flops


def imagined(config: Any, load: Callable[[], Family], size: tuple[int, int], kernels: bool = True) -> Taken:
    """Predicted. `load`: the family, without data; `kernels`: for a CPU, with what its kernels hold for themselves."""
    if config.train.ema_on_cpu and not kernels:  # an average that is not in the GPU's memory
        config = replace(config, train=replace(config.train, ema=0.0))
    with tracking.imagined(kernels) as live:
        done: list[Work] = []
        kept: list[object] = []  # a training stays while it is sampled

        def meter(name: str, family: Family, work: Callable[[], object], aside: nn.Module | None = None) -> int:
            live.begin()
            with live.without(() if kernels or aside is None else aside.parameters()):
                kept.append(work())
            if name == "train":
                done.append(live.work)
            return live.peak

        def rested(tensor: Tensor, device: object) -> Tensor:
            live.leave(tensor)
            return tensor

        alone = accelerator(config, cpu=True)
        with nullcontext() if kernels else mock.patch.object(offload, "rested", rested):
            peaks = run(config, load(), size, meter, alone, lambda family: _filled(family, load()), live.forget)
        return Taken(peaks, done[0])


def measured(config: Any, source: Source, size: tuple[int, int]) -> Taken:
    """Of this machine, which trains the model a few steps on nothing."""
    dtype = engine.DTYPES[config.train.precision]
    seconds: list[float] = []
    kept: list[object] = []

    def meter(name: str, family: Family, work: Callable[[], object], aside: nn.Module | None = None) -> int:
        device = _part(family).device
        held = tracking.held_by([*families.modules(family).values(), *map(_remembered, kept)], device)
        above = tracking.measured(lambda: kept.append(work()), device)
        if isinstance(kept[-1], Training):
            seconds.append(next(iter(kept[-1])).seconds)  # unobserved
        return held + above

    def restore(family: Family) -> None:
        families.restore(family, source, dtype)
        family.pipeline.to(engine.device())

    family = families.load(source, dtype, engine.device())
    peaks = run(config, family, size, meter, accelerator(config, engine.device() == "cpu"), restore)
    return Taken(peaks, seconds=seconds[0])


def run(
    config: Any,
    family: Family,
    size: tuple[int, int],
    meter: Meter,
    accelerator: Accelerator,
    restore: Callable[[Family], None],
    last: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Go through the phases of a run by these settings; size: height and width of the pictures; `restore`: brings
    back the parts that leave the memory to train; `last`: is told that the last step begins."""
    config = replace(config, train=replace(config.train, steps=_steps(config) + 1))
    peaks = {"encode": meter("encode", family, lambda: _encode(family, size), _part(family))}
    if draws(config):
        count = class_pictures.BATCH
        peaks["class pictures"] = meter("draw", family, lambda: _draw(family, accelerator, max(size), count))
    groups = _groups(config, family)
    release_frozen(family)
    peaks["train"] = meter("train", family, lambda: _train(config, family, groups, size, accelerator, last))
    if config.samples.sample_every:
        restore(family)
        count = min(len(config.samples.sample_prompts) or 1, sampling.TOGETHER)
        peaks["sample"] = meter("sample", family, lambda: _draw(family, accelerator, max(size), count))
    return peaks


def _remembered(made: object) -> Any:
    """What a training holds beside the weights."""
    if not isinstance(made, Training):
        return None
    return made.optimizer.state_dict(), made.average.shadow if made.average else {}, made.known.held


def _filled(family: Family, other: Family) -> None:
    """Take what a family lacks from another one."""
    mine = family.pipeline.components
    family.pipeline.register_modules(**{n: p for n, p in other.pipeline.components.items() if mine[n] is None})


def draws(config: Any) -> bool:
    """Whether class pictures are drawn before the training."""
    prior = _prior(config)
    return hasattr(config, "slider") or (prior.prior and prior.prior_from == "pictures" and prior.class_data is None)


def _prior(config: Any) -> Prior:
    """Of a recipe that knows none: none."""
    return getattr(config, "prior", Prior(prior=False))


def _steps(config: Any) -> int:
    """Where a word and an adapter train in turn, each has its own."""
    return 2 * STEPS if hasattr(config, "pivot") else STEPS


def accelerator(config: Any, cpu: bool) -> Accelerator:
    AcceleratorState._reset_state()
    precision = config.train.precision
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=cpu)


def _groups(config: Any, family: Family) -> list[adapters.Group]:
    rates, seed = (config.optim.lr, config.optim.text_encoder_lr), config.train.seed
    if hasattr(config, "full"):
        return adapters.full(family, *rates, config.full.weights, config.full.parts)
    adapted = adapters.adapt(family, config.adapter, *rates, seed) if hasattr(config, "adapter") else []
    if not hasattr(config, "words"):
        return adapted
    taught = adapters.teach(family, new_words(asdict(config)) or [WORD], config.words, config.optim.lr, seed)
    return adapters.in_turn(adapted, taught, config.pivot, _steps(config)) if adapted else taught


def _part(family: Family) -> Any:
    return families.denoiser(family)


def _encode(family: Family, size: tuple[int, int]) -> None:
    device = _part(family).device
    with families.aside(family), torch.no_grad():
        family.encode_pictures(torch.zeros(1, 3, *size, device=device))
        prompting.conditions(family, [CAPTION])


def _draw(family: Family, accelerator: Accelerator, side: int, count: int) -> None:
    """A step of the denoiser with guidance, which is as many pictures twice, and what the VAE makes of them."""
    channels, factor = family.latents()
    device, side = _part(family).device, side // family.grain() * family.grain()
    with torch.no_grad(), engine.autocast(accelerator):
        told = prompting.conditions(family, [CAPTION] * 2 * count)
        noised = torch.zeros(2 * count, channels, side // factor, side // factor, device=device)
        beside = families.beside(family)
        if beside:
            told[families.BESIDE] = noised.new_zeros(2 * count, beside, *noised.shape[2:])
        times, sizes = torch.zeros(2 * count, device=device), noised.new_zeros(2 * count, 6)
        latents = family.predict(noised, times, told, sizes)[:count]
        vae: Any = families.modules(family)["vae"]
        vae.decode(latents.to(vae.dtype))


def _train(
    config: Any,
    family: Family,
    groups: list[adapters.Group],
    size: tuple[int, int],
    accelerator: Accelerator,
    last: Callable[[], None],
) -> Training:
    data = _encodings(config, family, size)
    full = getattr(config, "full", None)
    training = Training(family, groups, data, config.train, config.optim, config.loss, accelerator, full)
    for _ in islice(training, _steps(config) - 1):
        pass
    last()
    next(iter(training))
    return training


def _encodings(config: Any, family: Family, size: tuple[int, int]) -> Blank:
    """As many pictures as a step has, and as many beside them where the prior is kept."""
    count = config.train.batch_size * config.train.accumulation
    view = Geometry(size, (0, 0), size)
    prior, own = _prior(config), Example(Path("picture.png"), (CAPTION,))
    if hasattr(config, "slider"):
        own = replace(own, taught=True, leaning=sliders.direction(config.slider), strength=1.0)
    subjects = [Item(own, (view,), own.captions)] * count
    asks = prior.prior_from == "base" and hasattr(config, "adapter")
    class_ = replace(own, taught=asks, weight=prior.prior_weight)
    companions = [Item(class_, (view,), class_.captions)] * count if prior.prior else []
    trained = any(p.requires_grad for e in families.text_encoders(family).values() for p in e.parameters())
    return Blank(
        subjects, companions, Memory(), None if trained else Memory(), "", "", factor=family.latents()[1],
        family=family, dtype=_part(family).dtype,
    )  # fmt: skip
