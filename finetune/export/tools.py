"""Adapter files made of other files, or of two models, layer by layer. Each is read back and compared with what it is
made of before it takes its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from finetune import families
from finetune.errors import Failure, Fault
from finetune.export import formats, lowrank
from finetune.export.base_weights import BaseWeights
from finetune.export.carried_metadata import carried_metadata
from finetune.export.compare import ROUNDING, coarsest, other_changes
from finetune.export.content import Adapter, File, Layer
from finetune.export.reading import listed
from finetune.export.remade import Gap, Remade, Rule, Wanted, lora_factors, plain, rounding, summed
from finetune.families import Family

T = TypeVar("T")
Track = Callable[[Iterable[T], str], Iterable[T]]
"""Shows how far something is."""


@dataclass(frozen=True)
class Made:
    """A file that was written and read back."""

    path: Path
    ranks: tuple[int, int]
    """The least and the highest; 0 for layers that have none."""
    gaps: Mapping[str, Gap]
    """By layer; empty for a file whose layers are the source's own."""
    alike: bool = False
    """The tensors have the same bits as the source's."""

    @property
    def off(self) -> float:
        """||written - wanted|| / ||wanted||, of all layers together."""
        return _share(sum(gap.gap**2 for gap in self.gaps.values()), sum(gap.norm**2 for gap in self.gaps.values()))

    @property
    def worst(self) -> tuple[float, str]:
        """The same of the layer where it is the most, and its name."""
        return max((_share(gap.gap**2, gap.norm**2), name) for name, gap in self.gaps.items())


@dataclass(frozen=True)
class Extracted(Made):
    outside: float = 0.0
    """The norm of the models' difference in tensors that the file does not hold, as a share of all of it."""
    others: int = 0
    """How many such tensors differ."""


def convert(
    source: Path, path: Path, form: str, *, dtype: torch.dtype | None = None, base: BaseWeights | None = None
) -> Made:
    """Write the same layers in another format, and precision if one is given."""
    adapter = formats.read(source)
    family = family_of([(source, adapter)], base)
    metadata = _header([adapter], family, {"tool": "convert", "format": form}, remade=False)

    def check(written: Adapter, precision: torch.dtype) -> bool:
        pairs = list(zip(adapter, written, strict=True))
        other = [(one, two) for one, two in pairs if not _alike(one, two)]
        if wrong := [line for one, two in other for line in _other_change(one, two, precision)]:
            raise Failure("the file does not hold the same changes. It is not left there. The layers:", listed(wrong))
        return not other

    alike = _write(path, adapter, form, metadata, dtype, family, check)
    return Made(path, _ranks(adapter), {}, alike)


def combine(
    sources: Sequence[tuple[Path, float]],
    path: Path,
    form: str,
    rule: Rule,
    *,
    tool: str,
    dtype: torch.dtype | None = None,
    base: BaseWeights | None = None,
) -> Made:
    """Write the sum of the changes of several adapters (or of one), each multiplied, as a LoRA cut as the rule says.

    `dtype`: by default the finest of the sources'. `base`: for kinds whose change depends on its weights.
    """
    adapters = [formats.read(source) for source, _ in sources]
    family = family_of([(source, adapter) for (source, _), adapter in zip(sources, adapters, strict=True)], base)
    terms: dict[str, list[tuple[Layer, float]]] = {}
    for adapter, (_, times) in zip(adapters, sources, strict=True):
        for layer in adapter:
            terms.setdefault(layer.name, []).append((layer, times))
    remade = Remade([summed(own, base) for own in terms.values()], rule)
    done = {"tool": tool, "rank": rule.rank, "energy": rule.energy, "scale": [times for _, times in sources]}
    dtype = dtype or min(
        (p for source, _ in sources for p in File(source).precisions()), key=lambda p: ROUNDING.get(p, 0.0)
    )
    return _write_remade(path, remade, form, _header(adapters, family, done, remade=True), dtype, family)


def extract(
    base: BaseWeights,
    tuned: BaseWeights,
    path: Path,
    form: str,
    rule: Rule,
    *,
    every: bool = False,
    dtype: torch.dtype,
    metadata: Mapping[str, Any],
    track: Track[str],
) -> Extracted:
    """Write the difference of two models as a LoRA: of the layers that adapters are put on, or of `every` layer.

    Raises Fault when the models are not built alike, or do not differ there.
    """
    _require_alike(base, tuned)
    norms = {name: float(_difference(base, tuned, name).double().norm()) for name in track(_weights(base), "compare")}
    names = _differing(base.family, base.layers() if every else _targets(base), norms)
    if not names:
        raise Fault(f"{tuned.title}: the same as {base.title} in all layers that an adapter is taken from.")
    remade = Remade([_extracted(base, tuned, name) for name in names], rule)
    kind = _pipeline(base.family)
    done = {"tool": "extract", "rank": rule.rank, "energy": rule.energy, **metadata}
    made = _write_remade(path, remade, form, carried_metadata([{}], kind, done, True), dtype, base.family)
    inside = {f"{name}.weight" for name in names}
    others = [norm for name, norm in norms.items() if name not in inside and norm > 0]
    outside = _share(sum(norm**2 for norm in others), sum(norm**2 for norm in norms.values()))
    return Extracted(**vars(made), outside=outside, others=len(others))


def family_of(adapters: Sequence[tuple[Path, Adapter]], base: BaseWeights | None) -> type[Family]:
    """What all of them, and the base, are for. Raises Fault when it is not one, or none of them tells."""
    told = {str(path): families.known(adapter.family) for path, adapter in adapters if adapter.family}
    if base is not None:
        told[base.title] = base.family
    if len({*told.values()}) > 1:
        raise Fault("these do not go together:", [f"{name}: {family.title}" for name, family in told.items()])
    return next(iter(told.values())) if told else formats.known_family(adapters[0][1])


def _write_remade(
    path: Path, remade: Remade, form: str, metadata: Mapping[str, str], dtype: torch.dtype, family: type[Family]
) -> Made:
    adapter = Adapter(remade.layers)
    gaps = _write(path, adapter, form, metadata, dtype, family, remade.gaps)
    return Made(path, _ranks(adapter), gaps)


def _write(
    path: Path,
    adapter: Adapter,
    form: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    family: type[Family],
    check: Callable[[Adapter, torch.dtype], T],
) -> T:
    """Write under another name, read back, check, rename. What the check says is returned; what it raises is too."""
    unverified = path.with_name(f".unverified-{path.name}")
    try:
        formats.write(unverified, adapter, form, metadata, dtype, family)
        said = check(formats.read(unverified), coarsest(File(unverified).precisions()))
        os.replace(unverified, path)
        return said
    except OSError as error:
        raise Failure(f"{path}: cannot be written ({error.strerror}).") from error
    finally:
        unverified.unlink(missing_ok=True)


def _header(
    adapters: Sequence[Adapter], family: type[Family], done: Mapping[str, Any], *, remade: bool
) -> dict[str, str]:
    return carried_metadata([adapter.metadata for adapter in adapters], _pipeline(family), done, remade)


def _pipeline(family: type[Family]) -> str:
    return next(name for name, known in families.FAMILIES.items() if known is family)


def _ranks(adapter: Adapter) -> tuple[int, int]:
    ranks = [layer.rank or 0 for layer in adapter]
    return min(ranks), max(ranks)


def _alike(one: Layer, other: Layer) -> bool:
    if one.scale != other.scale or one.shapes.keys() != other.shapes.keys():
        return False
    pairs = ((one.load(name), other.load(name)) for name in one.shapes)
    return all(mine.dtype == theirs.dtype and torch.equal(mine.flatten(), theirs.flatten()) for mine, theirs in pairs)


def _other_change(one: Layer, other: Layer, dtype: torch.dtype) -> list[str]:
    """A line when the layers' changes differ by more than rounding. Of plain LoRA the matrices are not formed."""
    if one.name != other.name or not (plain(one) and plain(other)):
        return other_changes(Adapter([one]), Adapter([other]), dtype)
    factors = lora_factors(one)
    gap = lowrank.gap(factors, lora_factors(other))
    return [f"{one.name}: another change"] if gap > rounding(factors, dtype) else []


def _share(part: float, whole: float) -> float:
    """Of squares, as a ratio of norms."""
    return (part / whole) ** 0.5 if whole else 0.0


def _extracted(base: BaseWeights, tuned: BaseWeights, name: str) -> Wanted:
    part, _, path = name.partition(".")
    weight = f"{name}.weight"
    return Wanted(part, path, base.shapes[weight], None, lambda: _difference(base, tuned, weight).flatten(1))


def _difference(base: BaseWeights, tuned: BaseWeights, name: str) -> Tensor:
    return tuned.load(name).float() - base.load(name).float()


def _weights(base: BaseWeights) -> list[str]:
    """All tensors that training changes."""
    return [name for name in base.shapes if name.endswith((".weight", ".bias"))]


def _targets(base: BaseWeights) -> list[str]:
    """The layers that an adapter is put on by default."""
    kind = base.family
    ends = {kind.denoiser_name: kind.adapter_targets} | dict.fromkeys(
        kind.text_encoder_names, kind.text_adapter_targets
    )
    return [name for name in base.layers() if name.endswith(tuple(f".{end}" for end in ends[name.partition(".")[0]]))]


def _differing(family: type[Family], layers: Iterable[str], norms: Mapping[str, float]) -> list[str]:
    """Those that differ; of a text encoder all, if one does: some clients read its attention whole or not at all."""
    layers = list(layers)
    differ = {name for name in layers if norms[f"{name}.weight"] > 0}
    whole = {name.partition(".")[0] for name in differ} & {*family.text_encoder_names}
    return [name for name in layers if name in differ or name.partition(".")[0] in whole]


def _require_alike(base: BaseWeights, tuned: BaseWeights) -> None:
    if base.family is not tuned.family:
        raise Fault("these do not go together:", [f"{one.title}: {one.family.title}" for one in (base, tuned)])
    mine, theirs = ({name: one.shapes[name] for name in _weights(one)} for one in (base, tuned))
    other = [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]
    if other:
        raise Fault(
            f"{tuned.title} is not built as {base.title} is: {len(other)} tensors are not in both:", listed(other)
        )
