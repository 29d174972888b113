"""The one loop. Recipes differ in values: which parameters train, what a picture weighs, what the objective is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune import (
    adapters,
    checkpointing,
    engine,
    families,
    fast,
    keys,
    kv_cache,
    optim,
    prompting,
    rounding,
    sharding,
)
from finetune.adapters import Group
from finetune.batches import Batch, Batches, drawn
from finetune.data.encoding import Encodings, Track
from finetune.data.order import Order
from finetune.ema import Average
from finetune.errors import Failure, Fault
from finetune.families import Conditions, Family
from finetune.fast import compiling
from finetune.objective import check, loss_per_picture
from finetune.per_parameter import InBackward, PerParameter
from finetune.settings import Full, Loss, Optim, Train
from finetune.validation import Validation

Completing = Callable[[Tensor], AbstractContextManager[Any]]
"""Of a step's loss: what its last backward pass goes on in."""
Acting = Callable[[float], AbstractContextManager[Any]]
"""Of a strength: what a pass goes on in, the adapter being so strong."""


@dataclass(frozen=True)
class Report:
    """What a step was."""

    step: int
    """Steps done, 1 after the first."""
    loss: float
    """The objective of the whole step, all passes and processes."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """The denoiser's, with what the optimizer finds by itself."""
    seconds: float
    validation: float | None = None
    """Loss on the held-out pictures after the step, where it was measured."""


class NotFinite(Failure):
    """A step's loss or gradient is NaN or infinite. The step was not applied."""

    torn = False
    """Whether some weights had stepped all the same: what is in memory is then no state to go on from."""


class PictureLoss(nn.Module):
    """Loss of each picture, (B,). Holds the modules that train, so that one wrapper serves all (autocast, DDP)."""

    def __init__(self, family: Family, data: Encodings, settings: Loss) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(families.modules(family))
        self._no_split_modules = _blocks(self.parts)
        self.family, self.data, self.settings = family, data, settings
        objective = family.objective()
        check(settings, objective.prediction)
        self.objective = objective.zero_terminal() if settings.zero_terminal_snr else objective
        self.keys_values = kv_cache.Known(family)

    def forward(self, batch: Batch, settings: Loss | None = None) -> Tensor:
        """L = w(t) * (mean(m * (prediction - target)^2) + u * mean((1 - mask) * (prediction - base)^2)), each picture.

        m is 1 inside a picture's mask and `unmasked_weight` outside, base the frozen base's prediction and u
        `unmasked_prior`. Where a picture is taught, the base's prediction is the target (prior preservation without
        class pictures; with leanings, a slider). With `error`, another error stands for the square.
        """
        settings, objective = settings or self.settings, self.objective
        batch = drawn(batch, settings, objective.timesteps)
        t = batch.timesteps
        noised = objective.noised(batch.latents, batch.input_noise, t)
        held = batch.masked & (settings.unmasked_prior > 0)
        base = self.base(batch, noised, batch.taught | held)
        conditions = self._conditions(batch.captions, t.device, batch.beside)
        prediction = self.family.predict(noised, objective.told(t), conditions, batch.sizes)
        target = torch.where(_per_picture(batch.taught), base, objective.target(batch.latents, batch.noise, t))
        inside = batch.masks + settings.unmasked_weight * (1 - batch.masks)
        how = settings.error, settings.huber_delta
        loss = loss_per_picture(prediction, target, inside, *how)
        if held.any():
            outside = (1 - batch.masks) * _per_picture(held)
            loss = loss + settings.unmasked_prior * loss_per_picture(prediction, base, outside, *how)
        weights = objective.weights(t, settings)
        return loss if weights is None else loss * weights

    def train(self, mode: bool = True) -> PictureLoss:
        """Parts of which nothing trains go on as in inference: T5 would drop out what it is given."""
        super().train(mode)
        for part in self.parts.values():
            part.train(mode and any(p.requires_grad for p in part.parameters()))
        return self

    def base(self, batch: Batch, noised: Tensor, wanted: Tensor) -> Tensor:
        """What the frozen base predicts of the wanted pictures (B,) and what they lean to: the weighted sum of its
        answers; zeros for the others. (B, C, h, w)"""
        base = torch.zeros_like(batch.latents)
        if batch.lessons is not None:
            base[batch.taught] = batch.lessons
            wanted = wanted & ~batch.taught
        if wanted.any():
            with torch.no_grad(), adapters.off(self.family):
                for rows, captions, weights in batch.asked(wanted):
                    beside = None if batch.beside is None else batch.beside[rows]
                    conditions = self._conditions(captions, noised.device, beside)
                    told = self.objective.told(batch.timesteps[rows]), conditions, batch.sizes[rows]
                    base[rows] += _per_picture(weights) * self.family.predict(noised[rows], *told).to(base.dtype)
        return base

    def _conditions(self, captions: list[str], device: torch.device, beside: Tensor | None) -> Conditions:
        told = {} if beside is None else {families.BESIDE: beside}
        if self.data.texts is None:
            return prompting.conditions(self.family, captions) | told
        known = [self.data.conditions(caption) for caption in captions]
        told |= {name: torch.cat([each[name] for each in known]).to(device) for name in known[0]}
        self.keys_values.tell(captions, told)
        return told


class Training:
    """A training: iterating takes its steps, and what `state` tells is all that the rest of it follows from.

    The loss is a sum over the step's pictures of share * loss. A share is the picture's weight divided by the number of
    subject pictures, so that with prior preservation the sum is mean(subject) + w * mean(prior) (Ruiz et al. 2022,
    2208.12242, eq. 2), however the step is split into passes and processes.
    """

    def __init__(
        self,
        family: Family,
        groups: Sequence[Group],
        data: Encodings,
        train: Train,
        settings: Optim,
        loss: Loss,
        accelerator: Accelerator,
        full: Full | None = None,
    ) -> None:
        self.train, self.settings, self.accelerator = train, settings, accelerator
        self.done = 0
        """Steps done"""
        self.losses: list[float] = []
        """Of each step done"""
        self.validations: dict[int, float] = {}
        """Steps done -> loss on the held-out pictures"""
        self.kind = optim.resolve(settings.optimizer, accelerator.device, engine.is_sharding(accelerator))
        parts = train.accumulation * accelerator.num_processes
        order = Order(data.subjects, data.companions, train.batch_size * parts, train.seed)
        model = PictureLoss(family, data, loss).to(accelerator.device)
        optimizer, self.in_backward = self._optimizer(groups, full or Full())
        self.groups, self.resting = list(groups), [False] * len(groups)
        self.scheduler = optim.schedule(optimizer, settings, train.steps, self.groups if _in_turns(groups) else ())
        self.batches = Batches(data, order, model.objective.timesteps, accelerator.device)
        if train.fast:
            fast.put_on(family)
        if train.gradient_checkpointing:
            checkpointing.put_on(family, train.checkpoint_share)
        names, beside = set(named(family, groups)), adapters.beside(family)
        every = (*data.subjects, *data.companions)
        asks = bool(loss.unmasked_prior) or any(i.example.taught and i.example.lesson is None for i in every)
        sharding.require_no_questions(asks, accelerator)
        self.whole = sharding.Whole(family, accelerator)
        self.model, self.optimizer = sharding.prepare(model, optimizer, accelerator, settings.max_grad_norm)
        own = dict(model.parts.named_parameters())  # other ones than before where they are shared out
        self.parameters = {name: parameter for name, parameter in own.items() if name in names}
        self.beside = {name: own[name] for name in beside}
        self.names = {parameter: name for name, parameter in self.parameters.items()}
        self.known = model.keys_values
        self.compiled = _compiled(family, train.compile, list(self.parameters.values()))
        self.average = Average(self.parameters, train.ema, "cpu" if train.ema_on_cpu else None) if train.ema else None
        self.validation = Validation(self.batches, train.batch_size, accelerator)

    def __iter__(self) -> Iterator[Report]:
        """Take the steps that are left, yielding after each.

        Raises NotFinite, before anything is changed, when a step's loss or gradient is not finite.
        """
        self.model.train()
        if self.validation and not self.done:
            self._validate()
        while self.done < self.train.steps:
            yield self._step()

    def state(self) -> dict[str, Any]:
        """What is trained, and what its training remembers, whole in the leading process. All processes must ask."""
        scaler = self.accelerator.scaler
        state = {
            "parameters": {name: parameter.data for name, parameter in self.parameters.items()},
            "beside": {name: parameter.data for name, parameter in self.beside.items()},
            "optimizer": self.optimizer.state_dict(),
            "kind": self.kind,
            "schedule": self.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "average": self.average.state() if self.average else None,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "validations": self.validations,
        }
        return sharding.gathered(state, self.accelerator.is_main_process)

    def load(self, done: int, state: dict[str, Any]) -> None:
        """Go on from a state after so many steps. Raises Fault when it is not one of this training."""
        known, given = set(self.parameters), set(state["parameters"])
        if known != given:
            raise Fault(
                f"the checkpoint holds other weights than are trained now: {len(given - known)} of its "
                f"{len(given)} are unknown, {len(known - given)} are missing. Resume with its own settings."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(sharding.like(state["parameters"][name], parameter))
            for name, parameter in self.beside.items():
                parameter.copy_(sharding.like(state["beside"][name], parameter))
        if state["optimizer"] is None:
            raise Fault("the checkpoint holds no optimizer state. Resume from another one.")
        if state.get("kind", self.kind) != self.kind:
            raise Fault(
                f"the checkpoint holds {state['kind']}'s state, not {self.kind}'s: --optimizer {state['kind']}."
            )
        self.optimizer.load_state_dict(sharding.optimizer_state(state["optimizer"], self.optimizer))
        self.scheduler.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.optimizer.zero_grad()  # of a step that was not finite, gradients are left
        if self.average:
            self.average.load(state["average"])
        self.done, self.losses, self.validations = done, state["losses"].tolist(), dict(state["validations"])

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Inside, the weights are those to use, where others train: to sample and export on the way.

        All processes must enter; the leading one then has all weights.
        """
        with self._in_use(), self.whole.lent():
            yield

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with optim.settled(self.optimizer), self.average.applied() if self.average else nullcontext():
            yield

    def settle(self) -> None:
        """After the last step: the weights become those to use. All processes must ask."""
        optim.settle(self.optimizer)
        if self.average:
            self.average.apply()
        self.whole.put()

    def slow_down(self, factor: float) -> None:
        """Multiply all learning rates, now and to come."""
        self.scheduler.base_lrs = [rate * factor for rate in self.scheduler.base_lrs]
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _optimizer(self, groups: Sequence[Group], full: Full) -> tuple[Optimizer, InBackward | None]:
        sharded = engine.is_sharding(self.accelerator)
        make = partial(optim.optimizer, settings=self.settings, device=self.accelerator.device, sharded=sharded)
        if replace(full, parts=()) == Full():
            return make(list(groups)), None
        one_by_one = PerParameter(groups, make, self._rounded)
        return one_by_one, InBackward(one_by_one) if full.optimizer_in_backward else None

    def _rounded(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """A weight's new value in bfloat16: the same on every process, and when the step is taken again."""
        key = self.train.seed, "rounding", self.done, self.names[parameter]
        return rounding.stochastic(value, keys.generator(*key, device=value.device))

    def _step(self) -> Report:
        start, step, early = time.perf_counter(), self.done, self.in_backward
        completing: Completing = early.last_pass if early else nullcontext
        acting = partial(adapters.at, self.whole.family)
        with self._in_turn():
            lr = optim.rate(self.optimizer)
            with self.compiled, self.known:
                loss = _accumulate(self.model, self.batches, step, self.train, self.accelerator, completing, acting)
            norm = early.norm(self.parameters.values()) if early else self._clip()
            torn = early is not None and len(early.optimizer.stepped) > 0
            _require_finite(loss, norm, step, self.batches, self.accelerator, torn)
            self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
            if self.average:
                self.average.update()
        self.done = step + 1
        self.losses.append(loss)
        seconds = time.perf_counter() - start
        return Report(step + 1, loss, norm, lr, seconds, self._validate() if self._validates() else None)

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Inside, those groups rest whose steps do not include this one: they need no gradient, and nothing moves them.

        Outside all are as if they trained, so that what asks which parts do is told the same at any time.
        """
        resting = [not group.trains(self.done) for group in self.groups]
        if not any(resting) and not any(self.resting):
            yield
            return
        still = [p for group, rests in zip(self.groups, resting, strict=True) if rests for p in group.parameters]
        for parameter in still:
            parameter.requires_grad_(False)
        if resting != self.resting:
            self.model, self.resting = sharding.again(self.model, self.accelerator), resting
        try:
            with optim.only(self.optimizer, [not rests for rests in resting]):
                yield
        finally:
            for parameter in still:
                parameter.requires_grad_(True)

    def _clip(self) -> float:
        """Clip the gradients; their norm before."""
        parameters = list(self.parameters.values())  # in the model's order, by which FSDP knows them
        norm = float(self.accelerator.clip_grad_norm_(parameters, self.settings.max_grad_norm or math.inf))
        return float(self.accelerator.reduce(torch.tensor(norm, device=self.accelerator.device), "mean"))  # NaN of any

    def _validates(self) -> bool:
        every = self.train.validate_every, self.train.checkpoint_every, self.train.steps
        return bool(self.validation) and any(due(self.done, steps) for steps in every)

    def _validate(self) -> float:
        with self._in_use(), self.known:
            self.validations[self.done] = self.validation.measure(self.model)
        return self.validations[self.done]


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens now."""
    return every > 0 and step % every == 0


def _in_turns(groups: Sequence[Group]) -> bool:
    """Whether some do not train in all steps."""
    return any(group.start or group.stop is not None for group in groups)


def named(family: Family, groups: Sequence[Group]) -> dict[str, nn.Parameter]:
    """The parameters that train, by part and name, in the groups' order."""
    parts = families.modules(family)
    names = {id(p): f"{part}.{name}" for part in parts for name, p in parts[part].named_parameters()}
    return {names[id(parameter)]: parameter for group in groups for parameter in group.parameters}


def require_no_base(settings: Loss) -> None:
    """Refuse what needs the frozen base beside the model, where all of its weights train."""
    if settings.unmasked_prior:
        raise Fault(
            f"--unmasked-prior {settings.unmasked_prior:g}: needs the frozen base, which only an adapter leaves "
            "there (switched off, it is the base): train the recipe lora, or use --unmasked-weight."
        )


def ask(
    family: Family,
    data: Encodings,
    loss: Loss,
    seed: int,
    accelerator: Accelerator,
    track: Track = lambda items, what, total: iter(items),
) -> Encodings:
    """Ask the base, before anything has trained, for its prediction at each lesson's own noise and timestep."""
    model = PictureLoss(family, data, Loss(zero_terminal_snr=loss.zero_terminal_snr)).to(accelerator.device)
    batches = Batches(data, Order(data.companions, (), 1, seed), model.objective.timesteps, accelerator.device)
    lessons: dict[int, Tensor] = {}
    asked = [(item, item.example.lesson) for item in data.companions if item.example.lesson is not None]
    for item, lesson in track(asked, "ask the base", len(asked)) if asked else ():
        batch = batches.lesson(item)
        noised = model.objective.noised(batch.latents, batch.noise, batch.timesteps)
        with engine.autocast(accelerator):
            lessons[lesson] = model.base(batch, noised, batch.taught)[0].cpu()
    return replace(data, lessons=lessons)


def _accumulate(
    model: nn.Module,
    batches: Batches,
    step: int,
    train: Train,
    accelerator: Accelerator,
    completing: Completing = nullcontext,
    acting: Acting = nullcontext,
) -> float:
    """Add up the gradients of a step's passes; the loss of the whole step, over all processes."""
    world, rank = accelerator.num_processes, accelerator.process_index
    parts = [number * world + rank for number in range(train.accumulation)]
    passes = [(part, batch) for part in parts for batch in batches.make(step, part, train.accumulation * world)]
    passes = sharding.evened(passes, accelerator)
    total = torch.zeros((), device=accelerator.device)
    for number, (part, batch) in enumerate(passes):
        last = number == len(passes) - 1
        adding = nullcontext() if last else sharding.adding_up(model, accelerator)
        # A strength stays until the gradients are there: what is recomputed for them must be what was computed.
        with adding, acting(batch.strength), keys.seeded(train.seed, "forward", step, part):
            loss = (batch.shares * model(batch)).sum()
            total += loss.detach()
            with completing(total) if last else nullcontext():
                accelerator.backward(loss * world)  # the processes' gradients are averaged, the loss is a sum
    return float(accelerator.reduce(total, "sum"))


def _require_finite(
    loss: float, norm: float, step: int, batches: Batches, accelerator: Accelerator, torn: bool = False
) -> None:
    """Infinite gradients are part of fp16's search for a loss scale; everywhere else they end the run."""
    if math.isfinite(loss) and (math.isfinite(norm) or accelerator.scaler is not None):
        return
    applied = (
        "--optimizer-in-backward had stepped some weights already, so only the last checkpoint is kept. "
        if torn
        else "the step was not applied. The state before it is kept. "
    )
    fault = NotFinite(
        f"step {step + 1}: the loss is {loss}, its gradient's norm {norm}; {applied}"
        "Try a lower --lr or --precision fp32, or let --on-nan rollback lower the rate. The pictures of this step:",
        batches.names(step),
    )
    fault.torn = torn
    raise fault


def _per_picture(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)"""
    return values[:, None, None, None]


def _blocks(parts: nn.Module) -> list[str]:
    """The classes of the models' blocks, under the name by which engines that share out weights ask for them."""
    told = {name for part in parts.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    return sorted(told & {type(part).__name__ for part in parts.modules()})


def _compiled(family: Family, mode: str, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    return nullcontext() if mode == "off" else compiling.Blocks(families.blocks(family), mode, parameters)
