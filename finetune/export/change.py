"""What an adapter adds to a layer's weight: one formula a kind, by the names that LyCORIS gave its tensors.

A weight of shape (out, in, ...) is a matrix (out, in * ...) here; so are the changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, Tensor]
MAGNITUDE = "dora_scale"
"""DoRA's length of each row of the weight, (out, 1, ...), beside any other kind's tensors; (1, in, ...): of columns."""


@dataclass(frozen=True)
class Kind:
    """One of the ways to write a change down."""

    title: str
    sets: tuple[frozenset[str], ...]
    """Names of its tensors; any of these sets is whole."""
    rank: Callable[[Shapes], int | None]
    """What alpha is divided by; None where a scale of 1 stands whatever alpha says."""
    change: Callable[[Tensors], Tensor] | None
    """The change without its scale; None for kinds that act on the weight."""
    act: Callable[[Tensors, Tensor], Tensor] | None = None
    """Of these, the change of a weight (out, in)."""
    sides: Callable[[Shapes], tuple[int | None, int | None]] | None = None
    """Of kinds that act on the weight: what their tensors tell of its shape."""


def halves(t: Tensors) -> tuple[Tensor, Tensor]:
    """LoRA's B (out, r) and A (r, in * ...). Of a convolution A holds the kernel; with a core, A is core x A."""
    down, up = t["lora_down.weight"].float(), t["lora_up.weight"].float().flatten(1)
    if "lora_mid.weight" in t:
        down = torch.einsum("pqhw,qi->pihw", t["lora_mid.weight"].float(), down.flatten(1))
    return up, down.flatten(1)


def lora(t: Tensors) -> Tensor:
    """B A (Hu et al. 2021, 2106.09685, eq. 3)."""
    up, down = halves(t)
    return up @ down


def loha(t: Tensors) -> Tensor:
    """(A1 B1) * (A2 B2), entry by entry (Hyeon-Woo et al. 2021, 2108.06098, eq. 2); with cores, its proposition 3."""
    one, other = (_factored(t, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
    return one * other


def lokr(t: Tensors) -> Tensor:
    """W1 (x) W2, the Kronecker product (Yeh et al. 2023, 2309.14859, section 3), each whole or a product of two."""
    one = t["lokr_w1"].float() if "lokr_w1" in t else t["lokr_w1_a"].float() @ t["lokr_w1_b"].float()
    other = t["lokr_w2"].float().flatten(1) if "lokr_w2" in t else _factored(t, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    return torch.kron(one, other)


def difference(t: Tensors) -> Tensor:
    """The change itself."""
    return t["diff"].float().flatten(1)


def factors(t: Tensors, weight: Tensor) -> Tensor:
    """l W - W; l - 1 is kept, of columns or rows (Liu et al. 2022, 2205.05638, section 3.3)."""
    row = t["weight"].to(weight).flatten()[None]
    return weight * (row if t["on_input"].item() else row.T)


def oft(t: Tensors, weight: Tensor) -> Tensor:
    """W R' - W, with R of rotations along its diagonal (Qiu et al. 2023, 2306.07280)."""
    vectors = t["oft_R.weight"].to(weight)
    side = block_side(vectors.shape[1])
    rows, columns = torch.triu_indices(side, side, 1)
    half = vectors.new_zeros(len(vectors), side, side)
    half[:, rows, columns] = vectors
    return turned(weight, rotations(half - half.mT)) - weight


def boft(t: Tensors, weight: Tensor) -> Tensor:
    """s W (B_m ... B_1)' - W (Liu et al. 2023, 2311.06243, eq. 5), s of rows. B_i turns as OFT's R does, in blocks of
    half of b inputs and those of the half-blocks' 2^(i-1)th next."""
    blocks = t["boft_R"].to(weight)  # (m, in / b, b, b)
    made, half = weight, blocks.shape[-1] // 2
    for number, factor in enumerate(blocks):
        pairs = (-1, 2, 2**number, half) if number else (-1, 1, 1, blocks.shape[-1])
        parted = made.unflatten(1, pairs).transpose(2, 3)
        moved = turned(parted.flatten(1), rotations((factor - factor.mT) / 2))
        made = moved.view(parted.shape).transpose(2, 3).flatten(1)
    return t["boft_s"].to(weight).reshape(-1, 1) * made - weight


def rotations(skew: Tensor) -> Tensor:
    """(I - S) (I + S)^-1 of skew S (..., b, b), by Cayley."""
    one = torch.eye(skew.shape[-1]).to(skew).expand_as(skew)
    return torch.linalg.solve(one + skew, one - skew, left=False)


def turned(weight: Tensor, blocks: Tensor) -> Tensor:
    """W R' of a weight (out, in) and R's blocks (in / b, b, b)."""
    return torch.einsum("onq,npq->onp", weight.unflatten(1, blocks.shape[:2]), blocks).flatten(1)


def block_side(numbers: int) -> int:
    """Of a skew matrix with so many numbers above its diagonal."""
    return round((1 + (1 + 8 * numbers) ** 0.5) / 2)


def _turned(shapes: Shapes) -> tuple[None, int]:
    count, numbers = shapes["oft_R.weight"]
    return None, count * block_side(numbers)


def _wings(shapes: Shapes) -> tuple[int, int]:
    _, count, side, _ = shapes["boft_R"]
    return shapes["boft_s"][0], count * side


def weighed(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """The change with DoRA: m (W + dW) / ||W + dW|| - W (Liu et al. 2024, 2402.09353, eq. 5)."""
    base = weight.float().flatten(1)
    moved, rows = base + change, magnitude.shape[0] == weight.shape[0]
    if rows:
        return magnitude.float().flatten()[:, None] * moved / moved.norm(dim=1, keepdim=True) - base
    shaped = moved.reshape(weight.shape)
    lengths = shaped.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    return (magnitude.float() * shaped / lengths).flatten(1) - base


def _factored(t: Tensors, a: str, b: str, core: str) -> Tensor:
    if core in t:  # a: (r, out), b: (r, in)
        return torch.einsum("ijkl,ip,jr->prkl", t[core].float(), t[a].float(), t[b].float()).flatten(1)
    return t[a].float() @ t[b].float().flatten(1)


def _kronecker_rank(shapes: Shapes) -> int | None:
    """Measured: with both factors whole every client scales by 1."""
    if "lokr_w2_b" in shapes:
        return shapes["lokr_w2_b"][0]
    return shapes["lokr_w1_b"][0] if "lokr_w1_b" in shapes else None


def _sets(*names: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(each.split()) for each in names)


KINDS = {
    "lora": Kind(
        "LoRA",
        _sets("lora_down.weight lora_up.weight", "lora_down.weight lora_up.weight lora_mid.weight"),
        lambda shapes: shapes["lora_down.weight"][0],
        lora,
    ),
    "loha": Kind(
        "LoHa",
        _sets("hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2"),
        lambda shapes: shapes["hada_w1_b"][0],
        loha,
    ),
    "lokr": Kind(
        "LoKr",
        _sets(
            *("lokr_w1 lokr_w2", "lokr_w1 lokr_w2_a lokr_w2_b", "lokr_w1 lokr_w2_a lokr_w2_b lokr_t2"),
            *("lokr_w1_a lokr_w1_b lokr_w2", "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b"),
            "lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b lokr_t2",
        ),
        _kronecker_rank,
        lokr,
    ),
    "ia3": Kind("(IA)3", _sets("weight on_input"), lambda shapes: None, None, factors, lambda shapes: (None, None)),
    "oft": Kind("OFT", _sets("oft_R.weight"), lambda shapes: None, None, oft, _turned),
    "boft": Kind("BOFT", _sets("boft_R boft_s"), lambda shapes: None, None, boft, _wings),
    "diff": Kind("whole difference", _sets("diff"), lambda shapes: None, difference),
}
"""Adding one: a formula above and its line here."""


def kind(names: frozenset[str]) -> str | None:
    """The kind that a layer's tensors are of; None for those that are of none, or not whole."""
    own = names - {MAGNITUDE}
    return next((name for name, known in KINDS.items() if own in known.sets), None)


def lacking(names: frozenset[str]) -> frozenset[str]:
    """What is missing to the nearest kind; empty when the names belong to none."""
    own = names - {MAGNITUDE}
    missing = [whole - own for known in KINDS.values() for whole in known.sets if own and own < whole]
    return min(missing, key=len, default=frozenset())
