"""What work is, and how long it takes by given rates. No time is asserted."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, count

import pytest
import torch
from torch.nn import functional

from finetune.planning import rates, tracking
from finetune.planning.rates import Rates
from finetune.planning.work import ATTENTION, CONVOLUTIONS, MATRICES, MOVING, Call, Work

CPU = torch.device("cpu")


def passes() -> None:
    x, weight = torch.ones(2, 4, 8, 8), torch.ones(6, 4, 3, 3, requires_grad=True)
    made = functional.conv2d(x, weight, padding=1).flatten(2)
    q = (made.transpose(1, 2) @ torch.ones(6, 16)).view(2, 1, 64, 16)
    functional.scaled_dot_product_attention(q, q, q).mul(2).sum().backward()


def test_work_is_counted_by_kind() -> None:
    with tracking.Live() as live:
        passes()
    found = live.work.amounts()
    convolved, product, weights = 2 * 2 * 64 * 6 * 4 * 9, 2 * 2 * 64 * 6 * 16, 2 * 2 * 64 * 64 * 16
    assert found[CONVOLUTIONS] == convolved + convolved  # forward, and the gradient of its weight
    assert found[MATRICES] == product + product
    assert found[ATTENTION] == 2 * weights + 5 * weights
    assert live.work.flops == sum(found.values()) - found[MOVING]


def test_what_is_neither_is_counted_in_the_bytes_that_it_reads_and_writes() -> None:
    one = torch.ones(100)
    with tracking.Live() as live:
        torch.empty(1000).view(10, 100)
        one.neg_()
        one[:50] + one[50:]
    assert live.work.amounts() == {MOVING: 2 * 400 + 3 * 200} and live.work.calls.total() == 2


def work(**amounts: int) -> Work:
    calls = {Call(kind.replace("_", " "), amount, None, (), ()): 1 for kind, amount in amounts.items()}
    return Work(Counter(calls))


def test_time_is_amounts_by_rates_and_calls() -> None:
    done = work(matrix_products=800, convolutions=300, the_rest=50)
    each = {MATRICES: 400.0, CONVOLUTIONS: 100.0, MOVING: 50.0}
    assert Rates("here", each, call=0.5).seconds(done) == 2 + 3 + 1 + 3 * 0.5
    assert Rates("a GPU", each, call=0.5, ahead=True).seconds(done) == 6
    assert Rates("a GPU", each, call=3.0, ahead=True).seconds(done) == 9
    assert rates.told(100).seconds(done) == (800 + 300) / 100e12


def test_a_machine_is_measured_by_the_operators_themselves() -> None:
    with tracking.imagined() as live:
        passes()
    later = accumulate(count())  # whatever runs takes longer than what ran before it
    found = rates.measured(live.work, CPU, budget=0.05, now=lambda: float(next(later)))
    assert set(found.each) == {MATRICES, CONVOLUTIONS, ATTENTION, MOVING} and not found.ahead
    assert all(rate > 0 for rate in found.each.values()) and found.call > 0
    assert found.seconds(live.work) > 0 and "what this machine does" in found.said()


def test_what_cannot_be_called_by_itself_is_left_out() -> None:
    unknown = Call(MATRICES, 10, torch.ops.aten.mm.default, (), ())
    assert MATRICES not in rates.measured(Work(Counter({unknown: 1})), CPU, budget=0.01).each


def test_the_most_of_a_device_is_that_of_its_best_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SIDES", (8, 16, 32))
    times = iter([1.0, 1.0, 100.0])
    monkeypatch.setattr(rates, "_usual", lambda *given: next(times))
    assert rates.most(CPU, torch.float32) == 2 * 16**3
