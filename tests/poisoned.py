"""python poisoned.py FOLDER WORDS ...: trainings in which NaN appears in their fourth step, in the last process only.

For torchrun. In turn: NaN latents, where training stops; a NaN gradient before and one after the processes' gradients
are averaged, from which it goes back. Each process writes what its weights are in the end.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import in_turn
import pytest
import torch
from accelerate import PartialState

from finetune import batches, loop

STEP = 3
"""Steps done before"""
NAN = float("nan")


def last() -> bool:
    return PartialState().is_last_process


def latents() -> Callable[..., batches.Picture]:
    made = batches.Batches._picture

    def planted(self: batches.Batches, item: Any, place: batches.Place) -> batches.Picture:
        picture = made(self, item, place)
        if last() and place[0] == STEP:
            picture.latents.fill_(NAN)
        return picture

    return planted


def gradient(averaged: bool) -> Callable[..., float]:
    accumulate, left = loop._accumulate, [1]

    def planted(model: torch.nn.Module, *given: Any) -> float:
        if not last() or given[1] != STEP or not left.pop(0):
            return accumulate(model, *given)
        left.append(0)
        parameter = next(p for p in model.parameters() if p.requires_grad)
        hook = None if averaged else parameter.register_hook(lambda gradient: gradient * NAN)
        loss = accumulate(model, *given)
        if hook is not None:
            hook.remove()
        else:
            parameter.grad.fill_(NAN)  # type: ignore[union-attr]
        return loss

    return planted


def writing(folder: Path) -> Callable[[loop.Training], None]:
    settle = loop.Training.settle

    def told(self: loop.Training) -> None:
        settle(self)
        weights = b"".join(value.detach().numpy().tobytes() for value in self.parameters.values())
        name = f"weights-{self.accelerator.process_index}"
        (folder / name).write_text(hashlib.sha256(weights).hexdigest())

    return told


def main(folder: Path, words: list[str]) -> None:
    in_turn.keep_the_group()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches.Batches, "_picture", latents())
        assert in_turn.command(*words, "--output", str(folder / "latents")) == 1
    for name, averaged in (("gradient", False), ("averaged", True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "_accumulate", gradient(averaged))
            patch.setattr(loop.Training, "settle", writing(folder / name))
            assert in_turn.command(*words, "--output", str(folder / name), "--on-nan", "rollback") == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
