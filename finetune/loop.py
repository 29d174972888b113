"""The one loop. Recipes differ in values: which parameters train, what a picture weighs, what the objective is."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune import families, keys, optim
from finetune.adapters import Group
from finetune.data.encoding import Encoded, Encodings
from finetune.data.order import Draw, Order
from finetune.errors import Failure
from finetune.families import Conditions, Family
from finetune.objective import loss_per_picture
from finetune.settings import Optim, Train


@dataclass(frozen=True)
class Batch:
    """Pictures of one pass, each with its own draws."""

    captions: list[str]
    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) int64
    sizes: Tensor  # (B, 6)
    shares: Tensor  # (B,) weight of each picture in the step's loss


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
    seconds: float


class PictureLoss(nn.Module):
    """Loss of each picture, (B,). Holds the modules that train, so that one wrapper serves all (autocast, DDP)."""

    def __init__(self, family: Family, conditions: dict[str, Conditions] | None, min_snr_gamma: float | None) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(families.modules(family))
        self.family, self.objective = family, family.objective()
        self.conditions, self.min_snr_gamma = conditions, min_snr_gamma

    def forward(self, batch: Batch) -> Tensor:
        """L = w(t) * mean((prediction(x_t, t, caption) - target)^2) for each picture."""
        t = batch.timesteps
        noised = self.objective.noised(batch.latents, batch.noise, t)
        prediction = self.family.predict(noised, t, self._conditions(batch.captions, t.device), batch.sizes)
        loss = loss_per_picture(prediction, self.objective.target(batch.latents, batch.noise, t))
        if self.min_snr_gamma is not None:
            loss = loss * self.objective.min_snr(t, self.min_snr_gamma)
        return loss

    def _conditions(self, captions: list[str], device: torch.device) -> Conditions:
        if self.conditions is None:
            return self.family.encode_prompts(captions)
        known = [self.conditions[caption] for caption in captions]
        return {name: torch.cat([each[name] for each in known]).to(device) for name in known[0]}


class Batches:
    """The pictures of a pass with their noise and timesteps, every number drawn from (seed, purpose, step, slot)."""

    def __init__(self, data: Encodings, order: Order, timesteps: int, device: torch.device) -> None:
        self.data, self.order, self.timesteps, self.device = data, order, timesteps, device

    def make(self, step: int, number: int, parts: int) -> Batch:
        """One of `parts` equal shares of a step."""
        seed = self.order.seed
        draws = self.order.part(step, number, parts)
        pictures = [self._picture(draw) for draw in draws]
        shape = tuple(pictures[0].mean.shape)
        latents = [
            picture.mean + picture.std * keys.normal(shape, seed, "latents", step, draw.slot)
            for picture, draw in zip(pictures, draws, strict=True)
        ]
        return Batch(
            captions=[picture.example.caption for picture in pictures],
            latents=torch.stack(latents).to(self.device),
            noise=torch.stack([keys.normal(shape, seed, "noise", step, d.slot) for d in draws]).to(self.device),
            timesteps=torch.tensor([keys.integer(0, self.timesteps, seed, "timestep", step, d.slot) for d in draws]).to(
                self.device
            ),
            sizes=torch.stack([picture.size for picture in pictures]).to(self.device),
            shares=torch.tensor([p.example.weight / self.order.batch for p in pictures]).to(self.device),
        )

    def names(self, step: int) -> list[str]:
        """The files of a step's pictures, for messages."""
        return [self._picture(draw).example.path.name for draw in self.order.step(step)]

    def _picture(self, draw: Draw) -> Encoded:
        return (self.data.subjects if draw.kind == "subject" else self.data.companions)[draw.index]


def fit(
    family: Family,
    groups: Sequence[Group],
    data: Encodings,
    train: Train,
    settings: Optim,
    accelerator: Accelerator,
) -> Iterator[Report]:
    """Train, yielding after each step. The loss is a sum over the step's pictures of share * loss.

    A share is the picture's weight divided by the number of subject pictures, so that with prior preservation the sum
    is mean(subject) + w * mean(prior) (Ruiz et al. 2022, 2208.12242, eq. 2), however the step is split into passes and
    processes.

    Raises Failure, before anything is changed, when a step's loss or gradient is not finite.
    """
    parts = train.accumulation * accelerator.num_processes
    order = Order(len(data.subjects), len(data.companions), train.batch_size * parts, train.seed)
    model = PictureLoss(family, data.conditions, train.min_snr_gamma).to(accelerator.device)
    optimizer = optim.optimizer(list(groups), settings, accelerator.device)
    scheduler = optim.schedule(optimizer, settings, train.steps)
    batches = Batches(data, order, model.objective.timesteps, accelerator.device)
    if train.gradient_checkpointing:
        _checkpoint_activations(family)
    model, optimizer = accelerator.prepare(model, optimizer)
    parameters = [p for group in groups for p in group.parameters]
    model.train()
    for step in range(train.steps):
        start, lr = time.perf_counter(), float(scheduler.get_last_lr()[0])
        loss = _accumulate(model, batches, step, train, accelerator)
        norm = float(accelerator.clip_grad_norm_(parameters, settings.max_grad_norm or math.inf))
        _require_finite(loss, norm, step, batches, accelerator)
        optimizer.step()
        optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            scheduler.step()
        yield Report(step + 1, loss, norm, lr, time.perf_counter() - start)


def _accumulate(model: nn.Module, batches: Batches, step: int, train: Train, accelerator: Accelerator) -> float:
    """Add up the gradients of a step's passes; the loss of the whole step, over all processes."""
    world, rank = accelerator.num_processes, accelerator.process_index
    total = torch.zeros((), device=accelerator.device)
    for number in range(train.accumulation):
        part = number * world + rank
        batch = batches.make(step, part, train.accumulation * world)
        last = number == train.accumulation - 1
        with nullcontext() if last else accelerator.no_sync(model), keys.seeded(train.seed, "forward", step, part):
            loss = (batch.shares * model(batch)).sum()
            accelerator.backward(loss * world)  # the processes' gradients are averaged, the loss is a sum
        total += loss.detach()
    return float(accelerator.reduce(total, "sum"))


def _require_finite(loss: float, norm: float, step: int, batches: Batches, accelerator: Accelerator) -> None:
    """Infinite gradients are part of fp16's search for a loss scale; everywhere else they end the run."""
    if math.isfinite(loss) and (math.isfinite(norm) or accelerator.scaler is not None):
        return
    raise Failure(
        f"step {step + 1}: the loss is {loss}, its gradient's norm {norm}; the step was not applied. "
        "Try a lower --lr, or --precision fp32. The pictures of this step:",
        batches.names(step),
    )


def _checkpoint_activations(family: Family) -> None:
    """Keep only block inputs and recompute the rest in the backward pass (Chen et al. 2016, 1604.06174)."""
    denoiser: Any = families.denoiser(family)
    denoiser.enable_gradient_checkpointing()
    encoders: list[Any] = list(families.text_encoders(family).values())
    for encoder in encoders:
        encoder.gradient_checkpointing_enable()
