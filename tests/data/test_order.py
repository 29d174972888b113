"""Which pictures make a step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.order import Order

ORDERS = st.builds(
    Order, subjects=st.integers(1, 9), companions=st.integers(0, 9), batch=st.just(4), seed=st.integers(0, 99)
)


@given(ORDERS, st.integers(0, 50), st.sampled_from([1, 2, 4]))
def test_the_parts_of_a_step_are_the_step(order: Order, step: int, parts: int) -> None:
    whole = order.step(step)
    shares = [order.part(step, number, parts) for number in range(parts)]
    assert sorted(d for share in shares for d in share) == sorted(whole)
    assert len({draw.slot for draw in whole}) == len(whole)
    for share in shares:
        kinds = Counter(draw.kind for draw in share)
        assert kinds["subject"] == 4 // parts
        assert kinds["class"] == (4 // parts if order.companions else 0)


@given(ORDERS)
def test_every_picture_is_seen_once_an_epoch(order: Order) -> None:
    draws = [d for step in range(9) for d in order.step(step)]
    for kind, count in (("subject", order.subjects), ("class", order.companions)):
        seen = [d.index for d in draws if d.kind == kind]
        for epoch in range(len(seen) // count if count else 0):
            assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order = Order(subjects=8, companions=0, batch=8, seed=0)
    orders = [tuple(d.index for d in order.step(step)) for step in range(6)]
    assert len(set(orders)) == 6
    assert order.step(3) == Order(subjects=8, companions=0, batch=8, seed=0).step(3)
    assert orders[0] != tuple(d.index for d in Order(subjects=8, companions=0, batch=8, seed=1).step(0))


@pytest.mark.parametrize("companions", [0, 5])
def test_slots_do_not_depend_on_the_split(companions: int) -> None:
    order = Order(subjects=5, companions=companions, batch=2, seed=0)
    assert [d.slot for d in order.step(0)] == list(range(4 if companions else 2))
