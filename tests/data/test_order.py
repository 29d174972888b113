"""Which pictures make a step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.examples import Example, Item
from finetune.data.framing.geometry import Geometry
from finetune.data.order import Order

SIZES = [(64, 64), (48, 80), (80, 48)]


def item(size: int = 0, concept: int = 0, repeats: int = 1) -> Item:
    example = Example(Path("x.png"), ("x",), concept=concept, repeats=repeats)
    return Item(example, (Geometry((100, 100), (0, 0), SIZES[size]),), ("x",))


ITEMS = st.lists(st.builds(item, st.integers(0, 2), st.integers(0, 1), st.integers(1, 3)), min_size=1, max_size=9)
COMPANIONS = st.lists(st.builds(item, st.integers(0, 2), st.integers(0, 1)), max_size=7)
ORDERS = st.builds(Order, ITEMS, COMPANIONS, batch=st.sampled_from([4, 8]), seed=st.integers(0, 99))


@given(ORDERS, st.integers(0, 50), st.sampled_from([1, 2, 4]))
def test_the_parts_of_a_step_are_the_step(order: Order, step: int, parts: int) -> None:
    whole = order.step(step)
    shares = [order.part(step, number, parts) for number in range(parts)]
    assert sorted(d for share in shares for d in share) == sorted(whole)
    assert len({draw.slot for draw in whole}) == len(whole)
    for share in shares:
        assert sum(draw.kind == "subject" for draw in share) == order.batch // parts


@given(ORDERS, st.integers(1, 5))
def test_every_item_is_seen_as_often_as_its_repeats_say(order: Order, epochs: int) -> None:
    steps = -(-epochs * order.epoch // order.batch)
    seen = [d.index for step in range(steps) for d in order.step(step) if d.kind == "subject"]
    expected = Counter({index: one.example.repeats for index, one in enumerate(order.subjects)})
    for epoch in range(epochs):
        assert Counter(seen[epoch * order.epoch : (epoch + 1) * order.epoch]) == expected


@given(ORDERS)
def test_class_pictures_go_with_their_concept_and_round_by_themselves(order: Order) -> None:
    known = {
        concept: [i for i, one in enumerate(order.companions) if one.example.concept == concept] for concept in (0, 1)
    }
    drawn: dict[int, list[int]] = {0: [], 1: []}
    for step in range(9):
        draws = sorted(order.step(step))
        beside = {draw.slot - order.batch: draw.index for draw in draws if draw.kind == "class"}
        for draw in draws:
            if draw.kind == "subject":
                concept = order.subjects[draw.index].example.concept
                assert (draw.slot in beside) == bool(known[concept])
                if known[concept]:
                    drawn[concept].append(beside[draw.slot])
    for concept, indices in drawn.items():
        count = len(known[concept])
        for turn in range(len(indices) // count if count else 0):
            assert sorted(indices[turn * count : (turn + 1) * count]) == known[concept]


@given(ORDERS, st.integers(0, 12))
def test_a_step_mixes_sizes_only_where_no_whole_batch_of_one_size_is_left(order: Order, epoch: int) -> None:
    steps = range(-(-epoch * order.epoch // order.batch), (epoch + 1) * order.epoch // order.batch)
    counts = Counter(one.size for one in order.subjects for _ in range(one.example.repeats))
    pure = sum(len({order.subjects[d.index].size for d in order.step(s) if d.kind == "subject"}) == 1 for s in steps)
    # One may have been opened to finish the step that the last epoch began.
    assert pure >= sum(count // order.batch for count in counts.values()) - 1


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int) -> Order:
        return Order([item() for _ in range(8)], [], batch=8, seed=seed)

    orders = [tuple(d.index for d in order(0).step(step)) for step in range(6)]
    assert len(set(orders)) == 6
    assert order(0).step(3) == order(0).step(3)
    assert orders[0] != tuple(d.index for d in order(1).step(0))


@pytest.mark.parametrize("companions", [0, 5])
def test_slots_do_not_depend_on_the_split(companions: int) -> None:
    order = Order([item() for _ in range(5)], [item() for _ in range(companions)], batch=2, seed=0)
    assert sorted(d.slot for d in order.step(0)) == list(range(4 if companions else 2))
