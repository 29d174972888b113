"""The pictures of a pass as tensors, each with its own draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finetune import keys, objective
from finetune.data.encoding import Encodings
from finetune.data.examples import Example, Item
from finetune.data.framing.geometry import Geometry
from finetune.data.order import Draw, Order
from finetune.settings import Loss

Place = tuple[keys.Index, ...]
"""What the draws of a picture follow from, beside the seed and their purpose."""
Leaning = tuple[tuple[str, float], ...]
"""Further prompts that the base is asked about, and what its answers weigh."""
LESSON, HELD = "lesson", "validation"
"""What the place of a lesson, and of a picture that is held out, begins with."""


@dataclass(frozen=True)
class Picture:
    """One picture with its draws."""

    example: Example
    view: Geometry
    caption: str
    latents: Tensor  # (C, h, w)
    noise: Tensor  # (C, h, w)
    timestep: int
    mask: Tensor  # (1, h, w)
    lesson: Tensor | None  # (C, h, w) the frozen base's prediction, where it was asked beforehand
    beside: Tensor | None  # (.., h, w) what some checkpoints are told besides the noise
    place: Place


@dataclass(frozen=True)
class Batch:
    """Pictures of one size and strength that go through the denoiser together, each with its own draws."""

    captions: list[str]
    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) int64
    sizes: Tensor  # (B, 6)
    shares: Tensor  # (B,) weight of each picture in the step's loss
    masks: Tensor  # (B, 1, h, w) in [0, 1], 1 where a picture is trained
    masked: Tensor  # (B,) bool: has a mask at all
    taught: Tensor  # (B,) bool: the target is what the frozen base predicts
    lessons: Tensor | None  # (B, C, h, w) what the base predicted, of those that are taught; None: ask it now
    seed: int
    places: list[Place]
    strength: float = 1.0  # of the adapter
    leanings: Sequence[Leaning] = ()  # of each picture, beside its caption
    beside: Tensor | None = None  # (B, .., h, w) what some checkpoints are told, see `families.BESIDE`
    extra: Tensor | None = None  # (B, C, h, w) noise that is put on the input and is no part of the target

    def asked(self, wanted: Tensor) -> Iterator[tuple[Tensor, list[str], Tensor]]:
        """What the base is asked about the wanted pictures, (B,) bool, in turns: which, under which captions, and what
        the answers weigh, (n,)."""
        rows = wanted.nonzero().flatten().tolist()
        leanings = self.leanings or [()] * len(self.captions)
        each = [[(self.captions[row], 1.0), *((text, self.strength * w) for text, w in leanings[row])] for row in rows]
        for turn in range(max(map(len, each), default=0)):
            left = [(row, *asked[turn]) for row, asked in zip(rows, each, strict=True) if turn < len(asked)]
            chosen, captions, weights = zip(*left, strict=True)
            at = self.timesteps.device
            yield torch.tensor(chosen, device=at), list(captions), torch.tensor(weights, device=at)

    @property
    def input_noise(self) -> Tensor:
        return self.noise if self.extra is None else self.noise + self.extra


class Batches:
    """The pictures of a pass with their noise and timesteps, every number drawn from (seed, purpose, step, slot)."""

    def __init__(self, data: Encodings, order: Order, timesteps: int, device: torch.device) -> None:
        self.data, self.order, self.timesteps, self.device = data, order, timesteps, device

    def make(self, step: int, number: int, parts: int) -> list[Batch]:
        """One of `parts` equal shares of a step, size by size and strength by strength."""
        alike: dict[tuple[tuple[int, int], float], list[Picture]] = {}
        for draw in self.order.part(step, number, parts):
            item = self._item(draw)
            picture = self._picture(item, _place(item, step, draw.slot))
            alike.setdefault((item.size, item.example.strength), []).append(picture)
        return [self._batch(pictures) for pictures in alike.values()]

    def lesson(self, item: Item) -> Batch:
        """What the base is asked about beforehand: one picture, at its lesson's own draws."""
        return self._batch([self._picture(item, _place(item, 0, 0))])

    def held(self, shown: Sequence[tuple[Item, int]]) -> Batch:
        """Held-out pictures of one size, each at the given timestep, under its first caption. What else is drawn
        follows from the picture itself, whatever is trained beside it."""
        pictures = []
        for item, timestep in shown:
            digest = item.example.facts.digest if item.example.facts else item.example.name
            picture = self._picture(item, (HELD, digest, *item.size, timestep))
            pictures.append(replace(picture, caption=item.captions[0], timestep=timestep))
        return self._batch(pictures)

    def names(self, step: int) -> list[str]:
        """The pictures of a step with the captions that they were shown with, for messages."""
        seen = [(self._item(draw), draw.slot) for draw in self.order.step(step)]
        return [f'{item.example.name}: "{self._caption(item, _place(item, step, slot))}"' for item, slot in seen]

    def _batch(self, pictures: Sequence[Picture]) -> Batch:
        lessons = [picture.lesson for picture in pictures if picture.lesson is not None]
        beside = [picture.beside for picture in pictures if picture.beside is not None]
        return Batch(
            captions=[picture.caption for picture in pictures],
            latents=self._stacked([picture.latents for picture in pictures]),
            noise=self._stacked([picture.noise for picture in pictures]),
            timesteps=torch.tensor([picture.timestep for picture in pictures], device=self.device),
            sizes=self._stacked([picture.view.tensor() for picture in pictures]),
            shares=torch.tensor([p.example.weight / self.order.batch for p in pictures], device=self.device),
            masks=self._stacked([picture.mask for picture in pictures]),
            masked=torch.tensor([picture.example.mask is not None for picture in pictures], device=self.device),
            taught=torch.tensor([picture.example.taught for picture in pictures], device=self.device),
            lessons=self._stacked(lessons) if lessons else None,
            seed=self.order.seed,
            places=[picture.place for picture in pictures],
            strength=pictures[0].example.strength,
            leanings=[picture.example.leaning for picture in pictures],
            beside=self._stacked(beside) if beside else None,
        )

    def _picture(self, item: Item, place: Place) -> Picture:
        seed, example = self.order.seed, item.example
        view = item.views[keys.integer(0, len(item.views), seed, "view", *place)]
        mean, std = self.data.latents(item, view)
        shape = tuple(mean.shape)
        return Picture(
            example,
            view,
            self._caption(item, place),
            mean + std * keys.normal(shape, seed, "latents", *place),
            keys.normal(shape, seed, "noise", *place),
            keys.integer(0, self.timesteps, seed, "timestep", *place),
            self.data.mask(item, view),
            None if example.lesson is None else self.data.lessons.get(example.lesson),
            self._beside(item, view, place),
            place,
        )

    def _beside(self, item: Item, view: Geometry, place: Place) -> Tensor | None:
        """What an inpainting checkpoint is told: one of the view's holes, and latents of the picture without it. What
        one that changes pictures is told: the picture that this one was made of, or nothing, which is zeros."""
        if self.data.sourced:
            source = self.data.source(item, view)
            share = self.data.source_dropout
            return source * 0 if share <= self._told(place) < 3 * share else source
        if not self.data.holes:
            return None
        number = keys.integer(0, self.data.holes, self.order.seed, "hole", *place)
        mask, mean, std = self.data.hole(item, view, number)
        noise = keys.normal(tuple(mean.shape), self.order.seed, "masked latents", *place)
        return torch.cat([mask, mean + std * noise])

    def _caption(self, item: Item, place: Place) -> str:
        if keys.uniform(self.order.seed, "caption dropout", *place) < self.data.caption_dropout:
            return ""
        if self.data.sourced and self._told(place) < 2 * self.data.source_dropout:
            return ""
        return item.captions[keys.integer(0, len(item.captions), self.order.seed, "caption", *place)]

    def _told(self, place: Place) -> float:
        """Uniform: in its first share the caption goes, in its second caption and source, in its third the source.
        Pictures that are held out are always told both."""
        return 1.0 if place[0] == HELD else keys.uniform(self.order.seed, "source dropout", *place)

    def _item(self, draw: Draw) -> Item:
        return (self.data.subjects if draw.kind == "subject" else self.data.companions)[draw.index]

    def _stacked(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).to(self.device)


def drawn(batch: Batch, settings: Loss, timesteps: int) -> Batch:
    """The batch with its noise and timesteps drawn as the loss's settings say. Lessons keep what the base was asked."""
    if settings.timesteps != "uniform" or settings.timestep_shift != 1:
        told = batch.timesteps.tolist()
        fresh = [_timestep(batch.seed, place, settings, timesteps) for place in batch.places]
        kept = [old if place[0] == LESSON else new for place, old, new in zip(batch.places, told, fresh, strict=True)]
        batch = replace(batch, timesteps=batch.timesteps.new_tensor(kept))
    if (
        settings.noise_offset
    ):  # eps + offset * n, n one number a channel (Guttenberg 2023, "Diffusion with offset noise")
        offset = _normal(batch, "noise offset", (batch.noise.shape[1], 1, 1))
        batch = replace(batch, noise=batch.noise + settings.noise_offset * offset)
    if settings.input_perturbation:  # x_t of eps + gamma xi, the target of eps (Ning et al. 2023, 2301.11706, alg. 1)
        xi = _normal(batch, "input perturbation", tuple(batch.noise.shape[1:]))
        batch = replace(batch, extra=settings.input_perturbation * xi)
    return batch


def _timestep(seed: int, place: Place, settings: Loss, timesteps: int) -> int:
    if settings.timesteps == "logit_normal":
        normal = float(keys.normal((1,), seed, "timestep logit", *place))
        t = objective.logit_normal(normal, settings.logit_mean, settings.logit_std)
    else:
        t = keys.uniform(seed, "timestep share", *place)
    return min(int(objective.shifted(t, settings.timestep_shift) * timesteps), timesteps - 1)


def _normal(batch: Batch, purpose: str, shape: tuple[int, ...]) -> Tensor:
    """Noise of each picture, zero for lessons. (B, *shape)"""
    zero = torch.zeros(shape)
    each = [zero if place[0] == LESSON else keys.normal(shape, batch.seed, purpose, *place) for place in batch.places]
    return torch.stack(each).to(batch.noise)


def _place(item: Item, step: int, slot: int) -> Place:
    """What the draws of a picture follow from. Those of a lesson are always the same."""
    return (step, slot) if item.example.lesson is None else (LESSON, item.example.lesson)
