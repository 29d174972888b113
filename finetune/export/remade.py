"""Layers whose change is computed when it is written: sums of other adapters' changes, differences of models, cut to a
rank. One layer at a time is in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from finetune.errors import Failure, Fault
from finetune.export import lowrank
from finetune.export.base_weights import BaseWeights
from finetune.export.change import MAGNITUDE, halves
from finetune.export.compare import ROUNDING
from finetune.export.content import Adapter, Layer
from finetune.export.lowrank import Decomposed, Factors

KERNELS = ("lora_mid.weight", "lora_down.weight", "hada_t1", "lokr_t2", "lokr_w2", "diff")
"""Tensors whose last two sides are a convolution's kernel, if they have four."""
CONVOLUTION = re.compile(r"(.+\.)?(conv\w*|proj_in|proj_out)")
"""Ends of the names of layers that are, or may be, convolutions."""
COMPUTED = 1e-6
"""Share of a change's norm that may differ when it is computed in float32 twice."""
FIRST = 32
"""Singular values that are looked at first where their number follows from the energy to be kept."""


@dataclass(frozen=True)
class Wanted:
    """What a layer's change is to be."""

    part: str
    path: str
    shape: tuple[int, ...]
    """Of the layer's weight: (out, in) or (out, in, kernel height, kernel width)."""
    rank: int | None
    """Of the factors; None where the change is a whole matrix."""
    make: Callable[[], Tensor | Factors]
    """(out, in * ...)"""

    @property
    def name(self) -> str:
        return f"{self.part}.{self.path}"

    @property
    def most(self) -> int:
        """No change has a rank above this."""
        sides = (self.shape[0], math.prod(self.shape[1:]))
        return min(*sides, *([] if self.rank is None else [self.rank]))


@dataclass(frozen=True)
class Rule:
    """How much of each change is kept: a rank, a share of the sum of its squared singular values, or both at most.

    Neither: all, as the factors are.
    """

    rank: int | None = None
    energy: float | None = None

    def require_sense(self, wanted: Sequence[Wanted]) -> None:
        """Raises Fault for a rank that no layer can have, and when all is to be kept of what is in no factors."""
        most = max(one.most for one in wanted)
        if self.rank is not None and self.energy is None and self.rank > most:
            raise Fault(f"rank {self.rank}: no layer's change has a rank above {most}. Give at most that.")
        whole = [one.name for one in wanted if one.rank is None]
        if whole and self == Rule():
            raise Fault(f"{whole[0]}: its change is no product of two thin matrices: give the rank to take, --rank.")


@dataclass(frozen=True)
class Gap:
    """How far a layer of a file is from what was wanted."""

    gap: float
    """||written - wanted||"""
    norm: float
    """||wanted||"""


class Remade:
    """LoRA layers with the wanted changes, as far as the rule keeps them. `gaps` checks a file of them."""

    def __init__(self, wanted: Sequence[Wanted], rule: Rule) -> None:
        """Raises Fault when the rule makes no sense. A share to be kept needs all changes to be computed twice."""
        rule.require_sense(wanted)
        self._rule, self._wanted = rule, {one.name: one for one in wanted}
        self._missed: dict[str, float] = {}
        self._tensors = lru_cache(maxsize=1)(self._computed)  # both halves of a layer are asked for in turn
        self.layers = [self._layer(one) for one in wanted]

    def gaps(self, written: Adapter, dtype: torch.dtype) -> dict[str, Gap]:
        """Raises Failure when a layer is further from what was wanted than what was cut off, and rounding to `dtype`.

        Both are computed anew: the changes from where they come from, the layers from the file.
        """
        found, wrong = {}, sorted({layer.name for layer in written} ^ self._wanted.keys())
        for layer in written if not wrong else ():
            wanted, factors = self._wanted[layer.name].make(), lora_factors(layer)
            off = Gap(lowrank.gap(wanted, factors), lowrank.norm(wanted))
            found[layer.name] = off
            if not off.gap <= self._missed[layer.name] + rounding(factors, dtype) + COMPUTED * off.norm:
                wrong.append(layer.name)
        if wrong:
            raise Failure("the file does not hold what was computed. It is not left there. The layers:", wrong[:10])
        return found

    def _layer(self, wanted: Wanted) -> Layer:
        rank, (out, inside, *kernel) = self._rank(wanted), wanted.shape
        shapes = {"lora_down.weight": (rank, inside, *kernel), "lora_up.weight": (out, rank, *[1] * len(kernel))}
        return Layer(
            wanted.part,
            wanted.path,
            shapes,
            lambda tensor: self._tensors(wanted.name, rank)[tensor].reshape(shapes[tensor]),
            float(rank),
        )

    def _rank(self, wanted: Wanted) -> int:
        if self._rule.energy is not None:
            rank = self._decomposed(wanted).rank(self._rule.energy) or wanted.most
            return min(rank, wanted.most, self._rule.rank or rank)
        if self._rule.rank is not None:
            return min(self._rule.rank, wanted.most)
        return wanted.rank or wanted.most

    def _computed(self, name: str, rank: int) -> dict[str, Tensor]:
        wanted = self._wanted[name]
        if self._rule == Rule():
            made = wanted.make()
            assert isinstance(made, tuple)
            (up, down), self._missed[name] = made, 0.0
        else:
            decomposed = self._decomposed(wanted, rank)
            (up, down), self._missed[name] = decomposed.factors(rank), decomposed.missed(rank)
        return {"lora_up.weight": up.float(), "lora_down.weight": down.float()}

    def _decomposed(self, wanted: Wanted, rank: int | None = None) -> Decomposed:
        """So many singular values that the rank is among them, or that the rule's energy is kept."""
        made, count = wanted.make(), rank or min(self._rule.rank or FIRST, FIRST)
        if isinstance(made, tuple):
            return lowrank.of_product(*made)
        while True:
            found = lowrank.of_matrix(made, count, wanted.name)
            enough = rank is not None or found.rank(self._rule.energy or 1.0) is not None
            if enough or len(found.values) >= min(made.shape) or count >= (self._rule.rank or math.inf):
                return found
            count *= 4


def summed(terms: Sequence[tuple[Layer, float]], base: BaseWeights | None) -> Wanted:
    """A layer's changes in several adapters, each multiplied. With LoRA alone, a product; else a whole matrix.

    Raises Fault when they do not fit each other or the base, or when one cannot be known without the base.
    """
    first = terms[0][0]
    if base is None:
        for layer, _ in terms:
            layer.require_free()
    shapes = {_weight_shape(layer, base) for layer, _ in terms}
    if len(shapes) > 1:
        said = " and ".join(str(shape) for shape in sorted(shapes))
        raise Fault(f"{first.name}: the adapters are for layers of other shapes, {said}: for different models.")
    low = all(plain(layer) for layer, _ in terms)

    def product() -> Factors:
        return lowrank.joined((times * up, down) for layer, times in terms for up, down in [lora_factors(layer)])

    def matrix() -> Tensor:
        weight = base.load(f"{first.name}.weight") if base else None
        return torch.stack([times * layer.change(weight) for layer, times in terms]).sum(0)

    rank = sum(layer.rank or 0 for layer, _ in terms) if low else None
    return Wanted(first.part, first.path, shapes.pop(), rank, product if low else matrix)


def rounding(factors: Factors, dtype: torch.dtype) -> float:
    """How far a product may be off when its factors were rounded to a precision, at the most."""
    up, down = (float(half.norm()) for half in factors)
    counts = [half.numel() ** 0.5 for half in factors]
    return 2 * ROUNDING[dtype] * up * down + torch.finfo(dtype).tiny * (up * counts[1] + down * counts[0])


def plain(layer: Layer) -> bool:
    """Whether its change is a product of two thin matrices: LoRA, LoCon, with a core or not, and not DoRA."""
    return layer.kind == "lora" and MAGNITUDE not in layer.shapes


def lora_factors(layer: Layer) -> Factors:
    """The change of a layer that is `plain`, its scale in the first."""
    up, down = halves(layer.tensors())
    return layer.scale * up.double(), down.double()


def _weight_shape(layer: Layer, base: BaseWeights | None) -> tuple[int, ...]:
    """Of the weight that the layer changes: from the base, else from its tensors."""
    out, inside = layer.extent
    if base is not None:
        shape = base.shapes.get(f"{layer.name}.weight")
        if shape is None or out not in (None, shape[0]) or inside not in (None, math.prod(shape[1:])):
            told = "it has no such layer" if shape is None else f"there its weight is {shape}"
            raise Fault(f"{layer.name}: a change of ({out}, {inside}) does not fit {base.title}: {told}.")
        return shape
    assert out is not None and inside is not None  # as of all kinds that need no base
    kernel = next((layer.shapes[name][2:] for name in KERNELS if len(layer.shapes.get(name, ())) == 4), None)
    if kernel is None and layer.kind not in ("lora", "diff") and CONVOLUTION.fullmatch(layer.path):
        raise Fault(f"{layer.name}: its {layer.title} does not tell the kernel's shape. Name the base: --model.")
    return (out, inside // math.prod(kernel or ()), *(kernel or ()))
