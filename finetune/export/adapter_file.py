"""The live adapter as one safetensors file, loaded back by diffusers before it is believed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from finetune import families
from finetune.adapters import LIVE, NAME, beside, off
from finetune.data.examples import Example
from finetune.errors import Failure, Fault
from finetune.export import formats, in_weights
from finetune.export import metadata as headers
from finetune.export.carried import carried
from finetune.export.change import MAGNITUDE
from finetune.export.compare import REPEATED, REROUNDED, coarsest, difference, encoding, other_changes, prediction
from finetune.export.content import Adapter, File
from finetune.export.reading import adaptable, attach, detach, layers, listed
from finetune.families import Family

LOADED = "verify"
"""Name under which a file is put beside the live adapter for a moment."""


def adapter(
    family: Family,
    path: Path,
    *,
    settings: Mapping[str, Any],
    form: str | None = None,
    dtype: torch.dtype | None = None,
    examples: Sequence[Example] = (),
) -> None:
    """Write the live adapter, verified; the same adapter and settings give the same bytes.

    `form`: one of `formats.FORMATS`; by default the first that has a place for its kind. `dtype`: by default the
    precision that it trained in. The header tells those settings that may be told, the number of `examples`, and their
    captions where the settings allow it. Parts that do not train may be out of memory. Raises Failure, and leaves what
    was at `path`, when the file does not load back equal.
    """
    told, live = headers.of_run(family, settings, examples=examples), carried(family, NAME)
    convert(live, path, form or formats.first(live, type(family)), metadata=told, dtype=dtype, live=family)


def convert(
    adapter: Adapter,
    path: Path,
    form: str,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    family: type[Family] | None = None,
    live: Family | None = None,
) -> None:
    """Write an adapter in a format, verified: read back and compared, and, where the base is at hand, in diffusers.

    `live`: the base that carries the adapter, see `verify_adapter`. Without it `family` says what the adapter is for,
    where its own file does not. Raises Failure, and leaves what was at `path`, when the file is not equal.
    """
    unverified = path.with_name(f".unverified-{path.name}")
    try:
        formats.write(unverified, adapter, form, metadata, dtype, family if live is None else type(live))
        # Of layers that kohya's names join, diffusers translates those of the published widths only, or none.
        if live is not None and (form != "kohya" or live.published.joined is None):
            verify_adapter(live, unverified)
        elif wrong := other_changes(adapter, formats.read(unverified), coarsest(File(unverified).precisions())):
            raise Failure("the adapter does not read back as it was written:", listed(wrong))
        os.replace(unverified, path)
    finally:
        unverified.unlink(missing_ok=True)


def verify_adapter(family: Family, path: Path) -> None:
    """Load the file through diffusers beside the live adapter and compare: changes, encodings, prediction.

    What diffusers does not load is compared by its formulas, see `_verify_by_formula`. The live model is the same
    afterwards. Raises Failure that lists what differs.
    """
    with _undisturbed(family):
        live = carried(family, NAME)
        if not _diffusers_reads(live, path, type(family)):
            _verify_by_formula(family, live, path)
            return
        live = replace(live, layers=[layer.copied() for layer in live])
        try:
            attach(family, path, LOADED)
        except Fault as fault:
            raise Failure(f"the adapter does not load back: {fault.message}", fault.details) from fault
        try:
            loaded = carried(family, LOADED)
            precision = coarsest([*File(path).precisions(), *loaded.dtypes()])
            exact = coarsest([precision, *families.quantized.precisions(family)])
            wrong = other_changes(live, loaded, precision) or _other_answers(family, exact)
        finally:
            detach(family, LOADED)
    if wrong:
        raise Failure("the adapter does not load back as it was written:", listed(wrong))


def _diffusers_reads(live: Adapter, path: Path, family: type[Family]) -> bool:
    """It loads LoRA, and by kohya's names leaves DoRA's magnitude out."""
    if formats.refused(live, "diffusers", family) is not None:
        return False
    return formats.format_of(path, File(path).shapes) == "diffusers" or not any(MAGNITUDE in one.shapes for one in live)


def _verify_by_formula(family: Family, live: Adapter, path: Path) -> None:
    """The base's weights changed as the file says answer as PEFT's layers do."""
    loaded = formats.read(path)
    precision = coarsest(File(path).precisions())
    wrong = other_changes(live, loaded, precision)
    if not wrong:
        with in_weights.opened(family, loaded):  # what is rounded anew at each call is not the adapter's
            answers = _answers(family, LIVE)
            with off(family), in_weights.changed(family, loaded):
                again = _asked(family, bool(answers.keys() - {"prediction"}))
        denoiser: Any = families.denoiser(family)
        allowed = REROUNDED[coarsest([precision, denoiser.dtype, *families.quantized.precisions(family)])]
        wrong = _gaps(answers, again, allowed)
    if wrong:
        raise Failure("the adapter does not load back as it was written:", listed(wrong))


def _gaps(one: Mapping[str, Tensor], other: Mapping[str, Tensor], allowed: float) -> list[str]:
    gaps = {what: difference(answer, other[what]) for what, answer in one.items()}
    return [f"the {what} differs by {gap:.1e} of its norm" for what, gap in gaps.items() if not gap <= allowed]


def _other_answers(family: Family, precision: torch.dtype) -> list[str]:
    """Ask with each of the two adapters alone, the live one rounded as diffusers rounds it to the base's precision."""
    for module in adaptable(family).values():
        parameters = dict(module.named_parameters())
        for name, parameter in parameters.items():
            if any(f".{live}." in name for live in LIVE):
                there = name.replace(f".{NAME}.", f".{LOADED}.").replace(f".{LIVE[1]}.", f".{LOADED}.")
                parameter.data = parameter.data.to(parameters[there].dtype)
    one, other = (_answers(family, adapters) for adapters in (LIVE, [LOADED]))
    allowed = (REROUNDED if beside(family) else REPEATED)[precision]  # two products, where the file has one
    return _gaps(one, other, allowed)


def _answers(family: Family, names: list[str]) -> dict[str, Tensor]:
    for part in adaptable(family).values():
        for layer in layers(part, names[0]).values():
            layer.set_adapter(names)
    return _asked(family, any(layers(module, names[0]) for module in families.text_encoders(family).values()))


def _asked(family: Family, text: bool) -> dict[str, Tensor]:
    return {"prediction": prediction(family)} | ({"text encoding": encoding(family)} if text else {})


@contextmanager
def _undisturbed(family: Family) -> Iterator[None]:
    """Afterwards the live adapter is active as it was, and every parameter has the values, precision and flag it had.

    (Loading another adapter activates it, freezes the others, and casts a whole text encoder to the base's precision.)
    """
    parts = list(adaptable(family).values())
    active = [
        (layer, layer.active_adapters)
        for part in parts
        for layer in part.modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    held = [(parameter, parameter.data, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    try:
        yield
    finally:
        for layer, names in active:
            layer.set_adapter(names)
        for module, mode in modes:
            module.training = mode
        for parameter, data, trains in held:
            parameter.data = data
            parameter.requires_grad_(trains)
