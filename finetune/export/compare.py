"""The same question put to two models: what does the denoiser predict, what do the text encoders say?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from finetune import families, keys
from finetune.export.change import KINDS, MAGNITUDE
from finetune.export.content import Adapter, Layer
from finetune.families import Conditions, Family
from finetune.sampling import inference

PROMPT = "a photo of a dog on a beach"
SIDE = 16
"""Side of the latents in which predictions are compared; the least that SD's four levels go well with is 8."""
REPEATED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}
"""Of an answer, relative to its norm: the same weights asked twice. A CPU repeats itself exactly, a GPU may not."""
REROUNDED = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
"""The same for weights that were rounded to this precision, which adds up over a network. (They are compared first,
each within a rounding error; this shows that they are also put together rightly.)"""
ROUNDING = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of one number, relative: a rounding error of this precision, doubled."""


def prediction(family: Family) -> Tensor:
    """The denoiser's answer to keyed noise under keyed conditions, (1, C, h, w), float32 on the CPU."""
    denoiser: Any = families.denoiser(family)
    device = denoiser.device  # diffusers looks through all modules for it
    conditions: Conditions = {
        name: keys.normal((1, *shape), 0, "verify", name).to(device)
        for name, shape in family.condition_shapes().items()
    }
    channels, factor = family.latents()
    if more := families.beside(family):
        conditions[families.BESIDE] = keys.normal((1, more, SIDE, SIDE), 0, "verify", "beside").to(device)
    objective = family.objective()
    noised = keys.normal((1, channels, SIDE, SIDE), 0, "verify", "latents").to(device)
    timesteps = objective.told(torch.tensor([objective.timesteps // 2], device=device))
    side = float(SIDE * factor)
    sizes = torch.tensor([[side, side, 0, 0, side, side]], device=device)
    with torch.no_grad(), inference(family):
        return family.predict(noised, timesteps, conditions, sizes).float().cpu()


def encoding(family: Family) -> Tensor:
    """The text encoders' answer to a prompt, all conditions in one row, float32 on the CPU."""
    with torch.no_grad(), inference(family):
        conditions = family.encode_prompts([PROMPT])
    return torch.cat([tensor.float().cpu().flatten() for tensor in conditions.values()])


def difference(one: Tensor, other: Tensor) -> float:
    """||one - other|| / ||one||; infinite when something is not finite."""
    if one.shape != other.shape or not (one.isfinite().all() and other.isfinite().all()):
        return float("inf")
    return float((one - other).norm() / one.norm().clamp(min=1e-12))


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one of these precisions that rounds most."""
    return max(dtypes, key=lambda dtype: ROUNDING.get(dtype, 0.0))


def other_changes(one: Adapter, other: Adapter, dtype: torch.dtype) -> list[str]:
    """Lines that say which layers the two change in other ways than rounding to `dtype` explains."""
    mine, theirs = ({layer.name: layer for layer in adapter} for adapter in (one, other))
    wrong = [f"{name}: only in one of the two" for name in sorted(mine.keys() ^ theirs.keys())]
    for name in sorted(mine.keys() & theirs.keys()):
        gap = _gap(mine[name], theirs[name], dtype)
        wrong += [f"{name}: {gap}"] if gap else []
    return wrong


def _gap(one: Layer, other: Layer, dtype: torch.dtype) -> str | None:
    """Each factor of a change is off by a rounding error: so much is the change itself, by the factors' sizes.

    (Where the factors are the same by themselves, they need not be multiplied.)
    """
    if _same_factors(one, other, dtype):
        return None
    if KINDS[one.kind].act or KINDS[other.kind].act:
        return "other factors"
    (mine, bound), (theirs, _) = (_change_and_size(layer) for layer in (one, other))
    if mine.shape != theirs.shape:
        return f"shape {tuple(mine.shape)} and {tuple(theirs.shape)}"
    error = 4 * ROUNDING[dtype] * bound + 64 * torch.finfo(dtype).smallest_normal
    if not ((mine - theirs).abs() <= error).all():
        return f"other values, by {difference(mine, theirs):.1e} of their norm"
    lengths = [layer.load(MAGNITUDE).flatten() for layer in (one, other) if MAGNITUDE in layer.shapes]
    if len(lengths) == 1 or (lengths and not rounded_alike(lengths[0], lengths[1], dtype)):
        return f"another {MAGNITUDE}"
    return None


def _same_factors(one: Layer, other: Layer, dtype: torch.dtype) -> bool:
    same = one.shapes == other.shapes and abs(one.scale - other.scale) <= ROUNDING[torch.float32] * abs(one.scale)
    return same and all(rounded_alike(one.load(name), other.load(name), dtype) for name in one.shapes)


def _change_and_size(layer: Layer) -> tuple[Tensor, Tensor]:
    """The change without DoRA, and the same of the tensors' absolute values."""
    tensors, formula = layer.tensors(), KINDS[layer.kind].change
    assert formula is not None
    size = formula({name: tensor.abs() for name, tensor in tensors.items()})
    return (layer.scale * formula(tensors)).cpu(), (abs(layer.scale) * size).cpu()


def rounded_alike(one: Tensor, other: Tensor, dtype: torch.dtype, slack: float = 0.0) -> bool:
    """Whether all numbers agree to a rounding error of `dtype` and to `slack`.

    Numbers below the smallest normal one of `dtype` count as zero.
    """
    one, other = one.float().cpu(), other.float().cpu()
    if one.shape != other.shape:
        return False
    allowed = ROUNDING.get(dtype, 0.0) * one.abs() + slack
    allowed = allowed + (torch.finfo(dtype).tiny if dtype.is_floating_point else 0.0)
    return bool(((one - other).abs() <= allowed).all())
