"""Which pictures make a step: a function of (seed, step) alone, whatever the number of passes and processes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from finetune import keys


@dataclass(frozen=True, order=True)
class Draw:
    """One picture's place in a step."""

    slot: int
    """Its number within the step, over all passes and processes: a key of its noise and timestep."""
    kind: str
    """"subject" or "class"."""
    index: int
    """Its number among the pictures of that kind."""


@dataclass(frozen=True)
class Order:
    """A step sees `batch` subject pictures and, where there are class pictures, as many of those.

    Each kind goes through all its pictures in a keyed order before it begins again in another.
    """

    subjects: int
    companions: int
    batch: int
    """Subject pictures a step, over all passes and processes."""
    seed: int

    def step(self, step: int) -> list[Draw]:
        """The step's draws, slot by slot: subject pictures first."""
        subjects = [self._draw("subject", self.subjects, step, place) for place in range(self.batch)]
        if not self.companions:
            return subjects
        return subjects + [self._draw("class", self.companions, step, place) for place in range(self.batch)]

    def part(self, step: int, number: int, parts: int) -> list[Draw]:
        """One of `parts` equal shares of a step: every share holds as many subject as class pictures."""
        share = self.batch // parts
        return [draw for draw in self.step(step) if draw.slot % self.batch // share == number]

    def _draw(self, kind: str, count: int, step: int, place: int) -> Draw:
        epoch, position = divmod(step * self.batch + place, count)
        slot = place if kind == "subject" else self.batch + place
        return Draw(slot, kind, _permutation(count, self.seed, kind, epoch)[position])


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, kind: str, epoch: int) -> list[int]:
    return keys.permutation(count, seed, "order", kind, epoch)
