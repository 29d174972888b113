"""The best approximation of each rank, and how far it is off (Eckart & Young 1936)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune import keys
from finetune.export import lowrank


def normal(*shape: int) -> Tensor:
    return keys.normal(shape, 0, "test", *shape).double()


def decaying(rows: int, columns: int, fall: float) -> Tensor:
    """Singular values 1, 1 / fall, 1 / fall^2, ..."""
    count = min(rows, columns)
    left, right = torch.linalg.qr(normal(rows, count)).Q, torch.linalg.qr(normal(columns, count)).Q
    return left * fall ** -torch.arange(count).double() @ right.T


@pytest.mark.parametrize(("rows", "columns", "rank"), [(30, 40, 6), (40, 30, 6), (5, 40, 12), (4, 3, 12)])
def test_a_product_is_cut_as_its_matrix_would_be(rows: int, columns: int, rank: int) -> None:
    up, down = normal(rows, rank), normal(rank, columns)
    whole, found = up @ down, lowrank.of_product(up, down)
    values = torch.linalg.svdvals(whole)
    assert torch.allclose(found.values[: len(values)], values[: len(found.values)], atol=1e-10)
    for kept in range(1, min(rows, columns, rank) + 1):
        made = torch.linalg.multi_dot(found.factors(kept)) if kept > 0 else None
        assert float((whole - made).norm()) == pytest.approx(found.missed(kept), abs=1e-9)
        assert found.missed(kept) == pytest.approx(float(values[kept:].norm()), abs=1e-9), "Eckart-Young"


@pytest.mark.parametrize(("rows", "columns"), [(150, 400), (400, 150)])
@pytest.mark.parametrize("fall", [1.0, 1.05, 1.5])
def test_of_a_large_matrix_the_first_values_are_found(rows: int, columns: int, fall: float) -> None:
    """What is said of the miss is exact; it is close to the least there is, also where no values stand out."""
    whole = decaying(rows, columns, fall)
    found = lowrank.of_matrix(whole, 8, "test")
    assert len(found.values) < 150 and found.rest >= 0
    up, down = found.factors(8)
    assert float((whole.float().double() - up @ down).norm()) == pytest.approx(found.missed(8), rel=1e-5)
    least = float(torch.linalg.svdvals(whole)[8:].norm())
    assert least * (1 - 1e-6) <= found.missed(8) <= least * 1.01
    assert torch.equal(found.left, lowrank.of_matrix(whole, 8, "test").left), "drawn from a key"
    state = torch.get_rng_state()
    lowrank.of_matrix(whole, 8, "test")
    assert torch.equal(state, torch.get_rng_state())


def test_all_values_where_half_are_wanted() -> None:
    whole = normal(60, 50)
    found = lowrank.of_matrix(whole, 20, "test")
    assert len(found.values) == 50 and found.rest == 0
    assert torch.allclose(found.values, torch.linalg.svdvals(whole))


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.749, 1), (0.751, 2), (0.93, 2), (0.99, 4), (1.0, 10)])
def test_the_least_rank_that_keeps_the_energy(energy: float, rank: int) -> None:
    """Values 1, 1/2, ..., 1/512: all but a part in 4^r of the sum of squares is in the first r."""
    found = lowrank.of_product(decaying(10, 12, 2.0), torch.eye(12).double())
    squares = found.values.square()
    assert found.rank(energy) == rank
    assert float(squares[:rank].sum()) >= energy * float(squares.sum()) * (1 - 1e-12)
    assert float(squares[: rank - 1].sum()) < energy * float(squares.sum())


def test_a_share_that_needs_more_values_than_were_found() -> None:
    found = lowrank.of_matrix(decaying(100, 100, 1.0), 8, "test")
    assert found.rank(0.9) is None and found.rank(0.01) == 1


def test_no_change_at_all() -> None:
    found = lowrank.of_matrix(torch.zeros(100, 90), 4, "test")
    assert found.rank(0.5) == 1 and found.missed(1) == 0
    up, down = found.factors(1)
    assert up.shape == (100, 1) and not (up @ down).any()


def test_sums_and_norms_without_the_matrix() -> None:
    one, other = (normal(20, 3), normal(3, 30)), (normal(20, 5), normal(5, 30))
    sum_ = lowrank.joined([one, other])
    whole = one[0] @ one[1] + other[0] @ other[1]
    assert torch.allclose(sum_[0] @ sum_[1], whole, atol=1e-12)
    assert lowrank.norm(sum_) == pytest.approx(float(whole.norm())) == pytest.approx(lowrank.norm(whole))
    assert lowrank.gap(sum_, other) == pytest.approx(lowrank.norm(one)) == pytest.approx(lowrank.gap(whole, other))
    assert lowrank.gap(sum_, sum_) < 1e-12 * lowrank.norm(sum_)
