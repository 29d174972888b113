"""Adapter files in each of the formats that clients read: one module a format, one line in `FORMATS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from finetune import families
from finetune.errors import Fault
from finetune.export import hashes, stream
from finetune.export import metadata as headers
from finetune.export.content import Adapter, File, Layer
from finetune.export.formats import diffusers, kohya, peft
from finetune.export.stream import Entry
from finetune.families import Family
from finetune.families.base import Edition


@dataclass(frozen=True)
class Format:
    title: str
    knows: Callable[[Iterable[str]], bool]
    """Whether a file with tensors of these names is of the format."""
    read: Callable[[File], Adapter]
    entries: Callable[[Adapter, type[Family], torch.dtype | None], dict[str, Entry]]
    told: Callable[[Adapter], Adapter]
    """The adapter with the alphas that its file has."""
    metadata: Callable[[Adapter, type[Family]], dict[str, str]]
    """What the format itself keeps in the header."""


FORMATS = {
    name: Format(title, module.knows, module.read, module.entries, module.told, module.metadata)
    for name, title, module in (
        ("diffusers", "diffusers and PEFT", diffusers),
        ("kohya", "A1111, ComfyUI, Forge, InvokeAI, sd-scripts, diffusers", kohya),
        ("peft", "PEFT", peft),
    )
}


def read(path: Path) -> Adapter:
    """An adapter file of any format; its tensors stay in the file until they are asked for.

    Raises Fault for a file that is not whole or no adapter's, and lists the names that are no layer's, and the layers
    whose tensors are not whole or not of one alpha.
    """
    file = File(path)
    adapter = FORMATS[format_of(path, file.shapes)].read(file)
    _require_whole(path, adapter.layers)
    return replace(adapter, family=family_of(adapter))


def format_of(path: Path, names: Iterable[str]) -> str:
    """The name of the format. Raises Fault for what is no adapter."""
    names = list(names)
    for name, known in FORMATS.items():
        if known.knows(names):
            return name
    shown = ", ".join(sorted(names)[:3])
    raise Fault(f"{path}: no adapter in a format that is known ({', '.join(FORMATS)}): its tensors are {shown} ...")


def write(
    path: Path,
    adapter: Adapter,
    name: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    family: type[Family] | None = None,
) -> None:
    """Write the adapter in a format, in the given precision (default: each tensor's own), layer by layer.

    `metadata`: what more its header says than the layers tell by themselves; its base, rank, alpha and hashes always
    stand there. `family`: default is the one that the adapter says it is for. Raises Fault when there is none, or when
    the format has no place for the adapter's kind.
    """
    kind, made = family or known_family(adapter), FORMATS[name]
    base = headers.of_edition(edition(adapter, kind, metadata))
    known = {**base, **headers.passed_on(metadata), **headers.of_layers(made.told(adapter))}
    header = {"format": "pt", **known, **made.metadata(adapter, kind)}
    stream.write(path, made.entries(adapter, kind, dtype), header, hashed=hashes.BLANKS)


def edition(adapter: Adapter, family: type[Family], metadata: Mapping[str, str] | None = None) -> Edition:
    """The base that the adapter is for: as the header says, or by the width of the text that it attends to."""
    return family.published.edition(adapter.metadata if metadata is None else metadata, text_width(adapter))


def text_width(adapter: Adapter) -> int | None:
    """Width of the text that the adapter's denoiser attends to, where it has such a layer."""
    found = (layer.extent[1] for layer in adapter if layer.path.endswith(("attn2.to_k", "attn2.to_v")))
    return next(found, None)


def first(adapter: Adapter, family: type[Family]) -> str:
    """The first format that has a place for the adapter. Raises Fault where none has."""
    reasons = {name: refused(adapter, name, family) for name in FORMATS}
    for name, reason in reasons.items():
        if reason is None:
            return name
    raise Fault(
        "no format has a place for the adapter:", [f"{name}: {why.message}" for name, why in reasons.items() if why]
    )


def refused(adapter: Adapter, name: str, family: type[Family]) -> Fault | None:
    """Why a format has no place for the adapter; None where it has."""
    try:
        FORMATS[name].entries(adapter, family, None)
    except Fault as fault:
        return fault
    return None


def known_family(adapter: Adapter) -> type[Family]:
    """Raises Fault when the file does not tell for what it is."""
    if adapter.family is None:
        raise Fault("the file does not tell which kind of model the adapter is for. Name its base: --model.")
    return families.known(adapter.family)


def _require_whole(path: Path, layers: Iterable[Layer]) -> None:
    """Every layer is of a known kind, its tensors go together, and all of them or none have an alpha."""
    wrong, told = [], {True: [], False: []}  # type: ignore[var-annotated]
    for layer in layers:
        try:
            told[layer.alpha is not None] += [layer.name] if layer.rank else []
            layer.extent  # noqa: B018  (raises when it has none)
        except Fault as fault:
            wrong.append(fault.message)
    if told[True] and told[False]:
        wrong += [f"{name}: no alpha, where others have one" for name in told[False]]
    if wrong:
        raise Fault(f"{path}: the adapter is not whole: {len(wrong)} of its layers are wrong:", wrong)


def family_of(adapter: Adapter) -> str | None:
    """What the adapter is for: its file says so, or only one family has such layers."""
    said = adapter.metadata
    own = headers.own(said).get("pipeline")
    if own in families.KNOWN:
        return str(own)
    for name, family in families.FAMILIES.items():
        published = family.published
        if said.get("ss_base_model_version", "").startswith(published.versions) or said.get(
            "modelspec.architecture", ""
        ).startswith(published.architectures):
            return name
    fitting = [name for name, family in families.FAMILIES.items() if _fits(adapter, family)]
    return fitting[0] if len(fitting) == 1 else None


def _fits(adapter: Adapter, family: type[Family]) -> bool:
    if not set(adapter.parts) <= {family.denoiser_name, *family.text_encoder_names}:
        return False
    width = text_width(adapter)
    known = {width for other in families.FAMILIES.values() for width in other.published.widths}
    return width not in known or width in family.published.widths
