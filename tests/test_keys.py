"""Draws depend on their key and on nothing else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune import keys

KEYS = st.tuples(st.integers(0, 2**40), st.text(max_size=8), st.integers(0, 10**6), st.integers(0, 64))


@given(KEYS, KEYS)
def test_equal_keys_draw_equal_numbers_and_others_do_not(one: tuple, other: tuple) -> None:
    assert torch.equal(keys.normal((8,), *one), keys.normal((8,), *one))
    assert torch.equal(keys.normal((8,), *one), keys.normal((8,), *other)) == (one == other)


def test_indices_do_not_run_into_each_other() -> None:
    assert keys.key(0, "a", 1, 12) != keys.key(0, "a", 11, 2)
    assert keys.key(0, "a", 1) != keys.key(0, "a", "1")


def test_a_draw_ignores_and_leaves_the_global_generators() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = keys.normal((4,), 0, "noise")
    with keys.seeded(0, "weights"):
        inside = torch.randn(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(100)
    assert torch.equal(keys.normal((4,), 0, "noise"), first)
    with keys.seeded(0, "weights"):
        assert torch.equal(torch.randn(3), inside)


def test_distributions() -> None:
    normal = keys.normal((20_000,), 3, "noise")
    assert abs(float(normal.mean())) < 0.03
    assert abs(float(normal.std()) - 1) < 0.03
    assert {keys.integer(0, 3, 0, "t", i) for i in range(100)} == {0, 1, 2}
    assert all(0 <= keys.uniform(0, "u", i) < 1 for i in range(100))
    assert sorted(keys.permutation(10, 0, "order", 1)) == list(range(10))


def test_the_stream_is_pinned() -> None:
    """A change here would change every run that is resumed with a newer version."""
    assert keys.key(7, "noise", 3, 1) == 251601085116604771862576364790627319485
    assert keys.permutation(6, 0, "order", 0) == [1, 3, 4, 0, 2, 5]
    torch.testing.assert_close(keys.normal((2,), 7, "noise"), torch.tensor([0.6803, 1.1656]), rtol=0, atol=1e-4)
