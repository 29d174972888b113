"""Which pictures make a step: a function of (seed, step) alone, whatever the number of passes and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from finetune import keys
from finetune.data.examples import Item


@dataclass(frozen=True, order=True)
class Draw:
    """One picture's place in a step."""

    slot: int
    """Its number within the step, over all passes and processes: a key of its noise and timestep."""
    kind: str
    """"subject" or "class"."""
    index: int
    """Its number among the items of that kind."""


class Order:
    """A step sees `batch` subjects and, of each whose concept has class pictures, one of those beside it.

    An epoch goes through every item as often as its `repeats` say, in a keyed order in which items of one size stand
    together as far as they fill whole batches: nothing is left out and nothing is taken twice to fill one up. What is
    left of the sizes makes mixed batches, which are trained size by size. Class pictures go round by themselves.
    """

    def __init__(self, subjects: Sequence[Item], companions: Sequence[Item], batch: int, seed: int) -> None:
        """`batch`: subjects a step, over all passes and processes."""
        self.subjects, self.companions, self.batch, self.seed = subjects, companions, batch, seed
        self._length = sum(item.example.repeats for item in subjects)
        self._classes: dict[int, list[int]] = {}
        for index, item in enumerate(companions):
            self._classes.setdefault(item.example.concept, []).append(index)
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._round = lru_cache(maxsize=4 + len(self._classes))(self._make_round)

    @property
    def epoch(self) -> int:
        """Number of draws in an epoch."""
        return self._length

    def step(self, step: int) -> list[Draw]:
        """The step's draws, slot by slot: subjects first."""
        return [draw for place in range(self.batch) for draw in self._place(step, place)]

    def part(self, step: int, number: int, parts: int) -> list[Draw]:
        """One of `parts` equal shares of a step: every subject with the class picture that goes with it."""
        share = self.batch // parts
        places = range(number * share, (number + 1) * share)
        return sorted(draw for place in places for draw in self._place(step, place))

    def _place(self, step: int, place: int) -> list[Draw]:
        epoch, position = divmod(step * self.batch + place, self._length)
        index, turn = self._epoch(epoch)[position]
        drawn = [Draw(place, "subject", index)]
        concept = self.subjects[index].example.concept
        if known := self._classes.get(concept):
            turns, which = divmod(turn, len(known))
            drawn.append(Draw(self.batch + place, "class", self._round(concept, turns)[which]))
        return drawn

    def _make_epoch(self, epoch: int) -> list[tuple[int, int]]:
        """Its items in their order, each with the number of draws of its concept that came before, in all epochs."""
        counts: dict[int, int] = {}
        for item in self.subjects:
            counts[item.example.concept] = counts.get(item.example.concept, 0) + item.example.repeats
        turns = {concept: epoch * count for concept, count in counts.items()}
        drawn = []
        for index in self._in_batches(epoch):
            concept = self.subjects[index].example.concept
            drawn.append((index, turns[concept]))
            turns[concept] += 1
        return drawn

    def _in_batches(self, epoch: int) -> list[int]:
        """The epoch's items, in batches of one size that begin where a step begins."""
        sizes: dict[tuple[int, int], list[int]] = {}
        for index, item in enumerate(self.subjects):
            sizes.setdefault(item.size, []).extend([index] * item.example.repeats)
        whole, rest = [], []
        for number in keys.permutation(len(sizes), self.seed, "order", "sizes", epoch):
            size, members = sorted(sizes.items())[number]
            order = keys.permutation(len(members), self.seed, "order", "subject", epoch, *size)
            shuffled = [members[place] for place in order]
            cut = len(shuffled) % self.batch
            rest += shuffled[:cut]
            whole += [shuffled[start : start + self.batch] for start in range(cut, len(shuffled), self.batch)]
        whole = [whole[number] for number in keys.permutation(len(whole), self.seed, "order", "batches", epoch)]
        begun = -epoch * self._length % self.batch  # places of the step that the last epoch has begun
        while whole and len(rest) < begun:
            rest += whole.pop()
        cuts = range(begun, len(rest) - self.batch + 1, self.batch)
        whole += [rest[start : start + self.batch] for start in cuts]
        last = rest[begun + len(cuts) * self.batch :]
        whole = [whole[number] for number in keys.permutation(len(whole), self.seed, "order", "mixed", epoch)]
        return [*rest[:begun], *(index for batch in whole for index in batch), *last]

    def _make_round(self, concept: int, number: int) -> list[int]:
        known = self._classes[concept]
        return [known[place] for place in keys.permutation(len(known), self.seed, "order", "class", concept, number)]
