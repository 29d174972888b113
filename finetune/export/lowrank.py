"""Matrices as products of thin ones: joined, cut to a rank, measured; what is large is not formed where it need not be.

The best approximation of rank r keeps the r largest singular values; what it misses is the rest of them (Eckart & Young
1936): ||M - M_r||^2 = s_{r+1}^2 + s_{r+2}^2 + ... Norms are Frobenius norms. All is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from finetune import keys

Factors: TypeAlias = tuple[Tensor, Tensor]
"""up (out, r) and down (r, n), of the matrix up @ down."""
MORE = 16
"""Singular values that are looked for beyond those that are wanted, which makes these exact to a few digits."""
POWERS = 4
"""How often the matrix is applied to the subspace that holds them."""


@dataclass(frozen=True)
class Decomposed:
    """The largest singular values of a matrix (out, n), downwards, with their vectors."""

    left: Tensor
    """(out, k)"""
    values: Tensor
    """(k,)"""
    right: Tensor
    """(k, n)"""
    rest: float = 0.0
    """The sum of the squares of the values that are not among them."""

    def rank(self, energy: float) -> int | None:
        """The least rank that keeps this share of the sum of squares; None when more values are needed for it."""
        squares = self.values.square()
        short = (1 - energy) * (float(squares.sum()) + self.rest)
        missed = squares.flip(0).cumsum(0).flip(0) + self.rest  # by the ranks 0, 1, ...: sums of what is small first
        enough = (torch.cat([missed, torch.tensor([self.rest])]) <= short).nonzero().flatten()
        return max(1, int(enough[0])) if len(enough) else None

    def missed(self, rank: int) -> float:
        """The norm of what the approximation of this rank misses."""
        return (float(self.values[rank:].square().sum()) + self.rest) ** 0.5

    def factors(self, rank: int) -> Factors:
        """The best approximation, both factors of one size: half precision serves them best. Filled up with zeros."""
        roots = self.values[:rank].sqrt()
        up, down = self.left[:, :rank] * roots, roots[:, None] * self.right[:rank]
        lacking = rank - len(roots)
        return torch.nn.functional.pad(up, (0, lacking)), torch.nn.functional.pad(down, (0, 0, 0, lacking))


def joined(parts: Iterable[Factors]) -> Factors:
    """The sum of products as one product, exactly: the factors side by side."""
    ups, downs = zip(*parts, strict=True)
    return torch.cat(ups, dim=1), torch.cat(downs)


def of_product(up: Tensor, down: Tensor) -> Decomposed:
    """All singular values of up @ down: those of a core as small as the rank, between two orthogonal factors."""
    (left, core), (right, other) = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().T)
    u, values, v = torch.linalg.svd(core @ other.T, full_matrices=False)
    return Decomposed(left @ u, values, v @ right.T)


def of_matrix(matrix: Tensor, count: int, name: str) -> Decomposed:
    """The `count` largest singular values at least.

    All of them when half of them are wanted. Else by a subspace that random vectors find (Halko, Martinsson & Tropp
    2011, 0909.4061, algorithms 4.4 and 5.1), drawn from a key of the `name`: what is missed may be a little more than
    the least, and is known exactly.
    """
    looked = count + MORE
    if 2 * looked >= min(matrix.shape):
        return Decomposed(*torch.linalg.svd(matrix.double(), full_matrices=False))
    with keys.seeded(0, "svd", name):
        space, _, _ = torch.svd_lowrank(matrix.float(), looked, niter=POWERS)
    space, _ = torch.linalg.qr(space.double())
    whole = matrix.double()
    u, values, right = torch.linalg.svd(space.T @ whole, full_matrices=False)
    rest = float(whole.square().sum() - values.square().sum())  # Pythagoras: the subspace is orthogonal to its rest
    return Decomposed(space @ u, values, right, max(0.0, rest))


def norm(made: Tensor | Factors) -> float:
    """Of a matrix or of a product."""
    if isinstance(made, Tensor):
        return float(made.double().norm())
    up, down = (torch.linalg.qr(half.double(), mode="r").R for half in (made[0], made[1].T))
    return float((up @ down.T).norm())


def gap(made: Tensor | Factors, other: Factors) -> float:
    """||made - other||"""
    if isinstance(made, Tensor):
        return float((made.double() - other[0].double() @ other[1].double()).norm())
    return norm(joined([made, (-other[0], other[1])]))
