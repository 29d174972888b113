"""The methods by which an adapter is trained: a table, an entry each. PEFT knows how, the family where."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig
from torch import Tensor, nn

from finetune import butterfly
from finetune.errors import Fault
from finetune.settings import Adapter

BLOCK = re.compile(r"blocks?\.")
"""In the path of what is inside a denoiser's blocks. (The patches of a transformer are cut by a convolution too.)"""
Patterns = Sequence[tuple[str, float]]
"""Parts of paths, and what is set for the layers that have them; the last one that fits counts."""


@dataclass(frozen=True)
class Place:
    """A layer that is to be adapted."""

    module: nn.Module
    rank: int
    alpha: float


Places = Mapping[str, Place]
"""By the layers' paths in their part of the pipeline"""


@dataclass(frozen=True)
class Method:
    title: str
    config: Callable[[Adapter, Places], PeftConfig]
    heeds: frozenset[str]
    """The settings that it knows besides rank and alpha. Another one is refused where it is not at its default."""
    linear: bool = False
    """Whether it adds its strength times one change, so that -1 takes off what 1 adds."""
    outside: bool = False
    """Whether it leaves alone what goes into a layer and the layer's weights, so that the layer's own answer is as
    without it"""
    bases: frozenset[str] = frozenset({"nf4", "int8"})
    """How the base under it may be quantised"""
    why: str = ""
    """Why it may not be quantised otherwise"""


def check(adapter: Adapter) -> None:
    """Refuse what cannot be, and what does not go together. Needs no model."""
    method = METHODS[adapter.method]
    for name, value in (("rank", adapter.rank), ("conv-rank", adapter.conv_rank)):
        if value is not None and value < 1:
            raise Fault(f"{name} {value}: an adapter's rank is at least 1; 4 to 64 is usual.")
    if not 0 <= adapter.dropout < 1:
        raise Fault(f"--dropout {adapter.dropout:g}: a share, from 0 to less than 1; 0.1 is usual.")
    if adapter.lora_plus_ratio <= 0:
        raise Fault(f"--lora-plus-ratio {adapter.lora_plus_ratio:g}: more than 0; 1 is plain LoRA, 16 is usual.")
    if wrong := [one for one, rank in ranks(adapter) if rank != int(rank) or rank < 1]:
        raise Fault(f"--rank-pattern {wrong[0]}: a rank is a whole number, at least 1.")
    if adapter.factor == 0 or adapter.factor < -1:
        raise Fault(f"--factor {adapter.factor}: -1, or a number of parts, from 2; 4 to 16 is usual.")
    if adapter.butterflies < 1:
        raise Fault(f"--butterflies {adapter.butterflies}: at least 1; 2 is usual.")
    alphas(adapter)
    for field in fields(Adapter):
        set_here = getattr(adapter, field.name) != field.default
        if set_here and field.name not in method.heeds | {"method", "rank", "alpha"}:
            fitting = ", ".join(name for name, other in METHODS.items() if field.name in other.heeds)
            flag = f"--{field.name.replace('_', '-')}"
            raise Fault(
                f"--method {adapter.method} {flag}: {method.title} has no such thing. Methods that do: {fitting}."
            )


def require_linear(adapter: Adapter) -> None:
    """Refuse a method that is not the opposite of itself at the opposite strength."""
    method = METHODS[adapter.method]
    if not method.linear:
        fitting = ", ".join(name for name, other in METHODS.items() if other.linear)
        raise Fault(
            f"--method {adapter.method}: at strength -1 {method.title} does not take off what it adds at 1, so that it "
            f"has no two directions. Methods that have: {fitting}."
        )


def require_base(adapter: Adapter, quantize: str) -> None:
    """Refuse a quantised base under which a method does not work."""
    method = METHODS[adapter.method]
    if quantize not in method.bases:
        fitting = ", ".join(name for name, other in METHODS.items() if quantize in other.bases)
        other = ", ".join(f"--quantize {name}" for name in sorted(method.bases)) or "a base that is not quantised"
        raise Fault(
            f"--quantize {quantize} --method {adapter.method}: {method.why}. Take {other}, or one of the methods that "
            f"do: {fitting}."
        )


def places(module: nn.Module, adapter: Adapter, ends: Sequence[str], convolutions: bool) -> dict[str, Place]:
    """The layers whose paths end so and, where they are wanted, the convolutions inside the module's blocks."""
    found = {}
    for path, layer in module.named_modules():
        spatial = convolutions and isinstance(layer, nn.Conv2d) and BLOCK.search(path) is not None
        if f".{path}".endswith(tuple(f".{end}" for end in ends)) or spatial:
            usual = adapter.conv_rank if spatial and adapter.conv_rank is not None else adapter.rank
            rank = int(_last(ranks(adapter), path, usual))
            scale = 1.0 if adapter.alpha is None else adapter.alpha / adapter.rank
            found[path] = Place(layer, rank, _last(alphas(adapter), path, scale * rank))
    return found


def ranks(adapter: Adapter) -> Patterns:
    return _patterns("rank-pattern", adapter.rank_pattern)


def alphas(adapter: Adapter) -> Patterns:
    return _patterns("alpha-pattern", adapter.alpha_pattern)


def fits(part: str, path: str) -> bool:
    """Whether a layer's path has such a part: whole names, one or several."""
    return f".{part}." in f".{path}."


def pissa(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) of the largest singular values: U sqrt(S), sqrt(S) V' (Meng et al. 2024, eq. 2, 3)."""
    u, s, v = torch.linalg.svd(weight.float().flatten(1), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) of the QR decomposition: the first columns of Q, the first rows of R."""
    q, r = torch.linalg.qr(weight.float().flatten(1))
    return q[:, :rank], r[:rank]


INITIAL = {"pissa": pissa, "olora": olora}
"""What `--init` begins with. (PEFT takes it out of the base's own weights, which then are no more what the file is for,
nor what prior preservation asks.)"""


def _patterns(flag: str, given: Sequence[str]) -> list[tuple[str, float]]:
    found = []
    for one in given:
        part, _, value = one.partition("=")
        try:
            found.append((part, float(value)))
        except ValueError:
            part = ""
        if not part:
            raise Fault(f"--{flag} {one}: say a part of the layers' paths and a number, e.g. attn2=32.")
    return found


def _last(patterns: Patterns, path: str, usual: float) -> float:
    return next((value for part, value in reversed(patterns) if fits(part, path)), usual)


def _low_rank(adapter: Adapter, places: Places, alpha: str) -> dict[str, Any]:
    """What PEFT is told of ranks and alphas: one for all, and those that differ, by the layers' whole paths."""
    usual = adapter.rank if adapter.alpha is None else adapter.alpha
    return {
        "r": adapter.rank,
        alpha: usual,
        "target_modules": list(places),
        "rank_pattern": {re.escape(path): one.rank for path, one in places.items() if one.rank != adapter.rank},
        "alpha_pattern": {re.escape(path): one.alpha for path, one in places.items() if one.alpha != usual},
    }


def _lora(adapter: Adapter, places: Places, dora: bool = False) -> PeftConfig:
    thin = _low_rank(adapter, places, "lora_alpha")
    return LoraConfig(lora_dropout=adapter.dropout, use_rslora=adapter.rslora, use_dora=dora, **thin)


def _loha(adapter: Adapter, places: Places) -> PeftConfig:
    return LoHaConfig(rank_dropout=adapter.dropout, **_low_rank(adapter, places, "alpha"))


def _lokr(adapter: Adapter, places: Places) -> PeftConfig:
    thin = _low_rank(adapter, places, "alpha")
    return LoKrConfig(rank_dropout=adapter.dropout, decompose_factor=adapter.factor, **thin)


def _ia3(adapter: Adapter, places: Places) -> PeftConfig:
    """Rows, or the columns where there is a bias, which would be multiplied too: no file has a place for that."""
    biased = [path for path, place in places.items() if getattr(place.module, "bias", None) is not None]
    return IA3Config(target_modules=list(places), feedforward_modules=biased)


def _oft(adapter: Adapter, places: Places) -> PeftConfig:
    """With Cayley's own formula: PEFT's series for it stops after five terms, and turns no more than about."""
    blocks = {"r": 0, "oft_block_size": adapter.rank, "use_cayley_neumann": False}
    return OFTConfig(module_dropout=adapter.dropout, target_modules=list(places), **blocks)


def _boft(adapter: Adapter, places: Places) -> PeftConfig:
    """Each weight's inputs must be parted into pairs of blocks, and these into pairs, for each factor but the first."""
    butterfly.use()
    group = adapter.rank * 2 ** (adapter.butterflies - 1)
    for path, place in places.items():
        inputs = int(place.module.get_parameter("weight")[0].numel())
        if inputs % group or (adapter.butterflies > 1 and adapter.rank % 2):
            raise Fault(
                f"--rank {adapter.rank} --butterflies {adapter.butterflies}: {path} has {inputs} inputs, which are no "
                f"multiple of {group}, or cannot be paired. The rank must be even, and its double as often as there "
                "are butterflies after the first must divide them. Lower the one or the other."
            )
    blocks = {"boft_block_size": adapter.rank, "boft_n_butterfly_factor": adapter.butterflies}
    return BOFTConfig(boft_dropout=adapter.dropout, target_modules=list(places), **blocks)


NO, NF4, INT8 = frozenset[str](), frozenset({"nf4"}), frozenset({"int8"})
PACKED = "PEFT makes its change in the shape that a weight is held in, and 4-bit weights are held two in a byte"
RANKS = frozenset({"rank_pattern", "alpha_pattern", "conv_rank", "dropout"})
METHODS = {
    "lora": Method("LoRA", _lora, RANKS | {"rslora", "init", "lora_plus_ratio"}, linear=True, outside=True),
    "dora": Method(
        "DoRA",
        partial(_lora, dora=True),
        RANKS | {"rslora", "lora_plus_ratio"},
        bases=NF4,
        why="PEFT's DoRA measures the weights at each step, and loses the scales of 8-bit ones by it on a CPU",
    ),
    "loha": Method("LoHa", _loha, RANKS, linear=True, outside=True, bases=INT8, why=PACKED),
    "lokr": Method("LoKr", _lokr, RANKS | {"factor"}, linear=True, outside=True, bases=INT8, why=PACKED),
    "oft": Method("OFT", _oft, frozenset({"dropout"})),
    "boft": Method(
        "BOFT", _boft, frozenset({"dropout", "butterflies"}), bases=NO, why="PEFT's BOFT turns the base's own weights"
    ),
    "ia3": Method("(IA)3", _ia3, frozenset(), outside=True),
}
"""Adding one: its line here and in `settings.Method`; how its layers are read in `finetune.export.carried`; if no other
writes changes down so, a formula in `finetune.export.change`."""
