"""The moving average against diffusers' own, and what it leaves as it was."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from finetune.ema import Average, check
from finetune.errors import Fault
from finetune.settings import Optim, Train


def walk(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def made() -> dict[str, nn.Parameter]:
    return {"unet.a": nn.Parameter(torch.ones(3, 4)), "unet.b": nn.Parameter(torch.zeros(5))}


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_that_of_diffusers(decay: float) -> None:
    parameters = made()
    ours, theirs = Average(parameters, decay, "cpu"), EMAModel(list(parameters.values()), decay=decay)
    for step in range(30):
        walk(parameters, step)
        ours.update()
        theirs.step(list(parameters.values()))
        for mine, other in zip(ours.shadow.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(mine, other)


def test_weights_are_put_back_to_the_bit_also_after_a_fault() -> None:
    parameters = made()
    average = Average(parameters, 0.9)
    for step in range(5):
        walk(parameters, step)
        average.update()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(ZeroDivisionError), average.applied():
        assert all(torch.equal(p, average.shadow[name]) for name, p in parameters.items())
        assert not torch.equal(parameters["unet.a"], before["unet.a"])
        raise ZeroDivisionError
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    average.apply()
    assert all(torch.equal(p, average.shadow[name]) for name, p in parameters.items())


def test_it_goes_on_from_its_state_to_the_bit() -> None:
    parameters = made()
    average = Average(parameters, 0.9)
    for step in range(5):
        walk(parameters, step)
        average.update()
    kept = deepcopy(average.state())
    other = Average(parameters, 0.9)
    other.load(kept)
    walk(parameters, 9)
    average.update()
    other.update()
    assert all(torch.equal(value, other.shadow[name]) for name, value in average.shadow.items())
    with pytest.raises(Fault, match="other weights"):
        other.load({"steps": 1, "average": {"unet.c": torch.zeros(1)}})


def test_without_a_state_it_begins_with_the_weights() -> None:
    """A run that goes on with --ema and was begun without."""
    parameters = made()
    average = Average(parameters, 0.9)
    walk(parameters, 1)
    average.load(None)
    assert all(torch.equal(value, parameters[name]) for name, value in average.shadow.items())


def test_averages_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(Fault, match="--ema 1: from 0 to less than 1"):
        check(Train(ema=1.0), Optim())
    with pytest.raises(Fault, match="schedulefree averages the weights itself"):
        check(Train(ema=0.9), Optim(optimizer="schedulefree"))
