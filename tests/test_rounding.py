"""Rounding by chance: to a neighbour, right on average, and steps that are too small for bfloat16 add up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from finetune import keys
from finetune.rounding import stochastic

LARGEST = torch.finfo(torch.bfloat16).max
COUNT = 20_000


def rounded(values: Tensor, *key: int) -> Tensor:
    return stochastic(values, keys.generator(0, "rounding", *key))


def neighbours(value: float) -> tuple[float, float]:
    """The bfloat16 below and the one above in magnitude; both are the value itself where it is one."""
    bits = torch.tensor(value, dtype=torch.float32).view(torch.int32)
    low = bits & -(1 << 16)
    high = low if low == bits else low + (1 << 16)
    return float(low.view(torch.float32)), float(high.view(torch.float32))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 2**32))
def test_a_number_becomes_one_of_its_two_neighbours(value: float, key: int) -> None:
    """Zeros, subnormal numbers and the largest ones too; no infinity is made."""
    (got,) = rounded(torch.tensor([value]), key).float().tolist()
    low, high = neighbours(value)
    assert math.isfinite(got)
    assert got in (low, high if math.isfinite(high) else low)
    assert math.copysign(1, got) == math.copysign(1, value)


@given(st.integers(-(2**15), 2**15 - 1), st.integers(0, 2**32))
def test_what_bfloat16_holds_stays_as_it_is(bits: int, key: int) -> None:
    """All of its bit patterns, infinities and NaN among them."""
    exact = torch.tensor([bits], dtype=torch.int16).view(torch.bfloat16)
    torch.testing.assert_close(rounded(exact.float(), key), exact, rtol=0, atol=0, equal_nan=True)


def test_a_nan_of_any_bits_stays_one() -> None:
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32)
    assert rounded(patterns.view(torch.float32)).isnan().all()
    assert rounded(torch.tensor([math.inf, -math.inf])).tolist() == [math.inf, -math.inf]
    assert rounded(torch.full((COUNT,), 3.4028e38)).float().unique().tolist() == [LARGEST]


@pytest.mark.parametrize("value", [1.0001, -1.0001, 1 / 3, -7e-5, 1e-39, 123_456.7, 1.00390625])
def test_the_mean_is_the_number_itself(value: float) -> None:
    """Over many draws of several keys, within four standard errors; rounded to the nearest it is not."""
    low, high = neighbours(value)
    exact = float(torch.tensor(value, dtype=torch.float32))
    share = (exact - low) / (high - low)
    draws = torch.cat([rounded(torch.full((COUNT,), value), key) for key in range(5)]).double()
    error = abs(high - low) * math.sqrt(share * (1 - share) / draws.numel())
    assert abs(float(draws.mean()) - exact) < 4 * error
    assert abs(float(torch.tensor(value).bfloat16()) - exact) > 4 * error


def test_neighbouring_weights_are_rounded_independently() -> None:
    up = (rounded(torch.full((COUNT,), 1 + 2**-8)) > 1).double()
    assert abs(float(((up[1:] - 0.5) * (up[:-1] - 0.5)).mean())) < 4 * 0.25 / math.sqrt(COUNT)


def test_the_same_key_rounds_alike_and_another_does_not() -> None:
    values = torch.linspace(-2, 2, COUNT)
    assert torch.equal(rounded(values, 1), rounded(values, 1))
    assert not torch.equal(rounded(values, 1), rounded(values, 2))


def test_steps_smaller_than_half_a_unit_add_up_as_in_float32() -> None:
    """Nearest rounding leaves 1 where it is: half the way to its neighbour is 2 ** -8."""
    step, steps = 1e-4, 400
    chance, nearest = torch.ones(4096).bfloat16(), torch.ones(4096).bfloat16()
    for number in range(steps):
        chance = rounded(chance.float() + step, number)
        nearest = (nearest.float() + step).bfloat16()
    walked = chance.double() - 1
    error = float(walked.std()) / math.sqrt(walked.numel())
    assert abs(float(walked.mean()) - step * steps) < 4 * error < 0.002
    assert (nearest == 1).all()
