"""The measures, each by its paper's formula, over what a metric model makes of pictures and prompts.

Embeddings are (N, D), each row of length 1, so that a product of two rows is their cosine. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from finetune import keys

DRAWS = 2000
"""Resamplings of a bootstrap."""
COPY = 0.999
"""Cosine from which two training pictures are one."""


@dataclass(frozen=True)
class Estimate:
    """A mean and the interval in which it lies in 95 of 100 resamplings of its units."""

    value: float
    low: float
    high: float
    units: int
    """Prompts or subjects that were resampled; with less than two, the interval is the mean alone."""


@dataclass(frozen=True)
class Neighbour:
    """A sample and the training picture that is nearest to it."""

    sample: int
    picture: int
    similarity: float
    """Their cosine"""
    alarm: bool
    """Whether they are closer than any two training pictures are to each other."""


def likeness(generated: Tensor, real: Tensor) -> Tensor:
    """(N,): the mean cosine of each generated picture with all real ones.

    Its mean is DINO or CLIP-I, as the embeddings are, of Ruiz et al. 2022 (2208.12242), section 4.1: the average
    pairwise cosine between generated and real pictures. Of pictures of the bare class it is PRES, the class's drift.
    """
    return (generated @ real.T).mean(1)


def likeness_of_each_other(pictures: Tensor) -> float:
    """The mean cosine of two different pictures: what real photos reach. NaN where there are less than two."""
    count = len(pictures)
    if count < 2:
        return float("nan")
    cosines = pictures @ pictures.T
    return float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))


def fidelity(pictures: Tensor, prompts: Tensor) -> Tensor:
    """(N,): the cosine of each picture with its own prompt, CLIP-T of Ruiz et al. 2022. Both (N, D)."""
    if pictures.shape != prompts.shape:
        raise ValueError(f"{len(pictures)} pictures but {len(prompts)} prompts: one prompt belongs to each picture")
    return (pictures * prompts).sum(1)


def diversity(distances: Tensor) -> float:
    """DIV of Ruiz et al. 2022: the mean distance of two different pictures of one prompt; `distances` (N, N).

    NaN where there are less than two.
    """
    count = len(distances)
    return float((distances.sum() - distances.diagonal().sum()) / (count * (count - 1))) if count > 1 else float("nan")


def apart(distances: Tensor) -> Tensor:
    """(N,): how far each picture is from the others, on average; the mean of these is their diversity.

    `distances` (N, N). NaN where there are less than two.
    """
    count = len(distances)
    return (distances.sum(1) - distances.diagonal()) / (count - 1) if count > 1 else torch.full((count,), torch.nan)


def drift(tuned: Tensor, base: Tensor) -> Tensor:
    """(N,): one minus the cosine of what both models draw of the same prompt and seed. 0: nothing has changed."""
    return 1 - (tuned * base).sum(1)


def neighbours(samples: Tensor, training: Tensor) -> list[Neighbour]:
    """The nearest training picture of each sample (Somepalli et al. 2022, 2212.03860), the nearest pair first.

    Training pictures that are copies of one another count as one. With less than two that differ nothing tells how
    near is too near, and there is no alarm.
    """
    apart = [float(c) for c in _pairs(training) if c < COPY]
    limit = max(apart, default=float("inf"))
    nearest = (samples @ training.T).max(1)
    found = [
        Neighbour(sample, int(picture), float(cosine), float(cosine) > limit)
        for sample, (cosine, picture) in enumerate(zip(nearest.values, nearest.indices, strict=True))
    ]
    return sorted(found, key=lambda one: (-one.similarity, one.sample))


def bootstrap(values: Sequence[float], seed: int, purpose: str) -> Estimate:
    """The mean over units (prompts, subjects), and its percentile interval (Efron 1979).

    Units without a value (NaN) are left out. The same values, seed and purpose give the same interval.
    """
    told = np.asarray([value for value in values if not np.isnan(value)], dtype=np.float64)
    if not len(told):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    mean = float(told.mean())
    if len(told) == 1:
        return Estimate(mean, mean, mean, 1)
    drawn = keys.rng(seed, "bootstrap", purpose).integers(0, len(told), (DRAWS, len(told)))
    low, high = np.percentile(told[drawn].mean(1), (2.5, 97.5))
    return Estimate(mean, float(low), float(high), len(told))


def by_unit(values: Sequence[float], units: Sequence[int], of: Callable[[Sequence[float]], float]) -> list[float]:
    """`of` the values of each unit, in the order of the units' numbers."""
    groups: dict[int, list[float]] = {}
    for value, unit in zip(values, units, strict=True):
        groups.setdefault(unit, []).append(value)
    return [of(groups[unit]) for unit in sorted(groups)]


def bleed(generated: Sequence[Tensor], real: Sequence[Tensor]) -> list[list[float]]:
    """Row a, column b: the likeness of the pictures of concept a's prompts to concept b's own pictures."""
    return [[float(likeness(drawn, own).mean()) for own in real] for drawn in generated]


def _pairs(pictures: Tensor) -> Tensor:
    """The cosines of each two different pictures."""
    rows, columns = torch.triu_indices(len(pictures), len(pictures), 1)
    return (pictures @ pictures.T)[rows, columns]
