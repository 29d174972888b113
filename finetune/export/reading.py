"""Adapter files onto a pipeline, through diffusers, with the promise that no tensor of the file was ignored."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from finetune import families, weights
from finetune.errors import Fault
from finetune.export import naming
from finetune.families import Family
from finetune.quiet import quiet

if TYPE_CHECKING:
    from finetune.export.content import Adapter

LISTED = 10
"""Names in a message before the rest is counted."""
LENGTHS = "lora_magnitude_vector"
"""DoRA's, in the PEFT layout; in files with `.weight` or without."""
KINDS = {"lora_A.weight": 1, "lora_B.weight": 0, "lora_B.bias": 0, LENGTHS: 0}
"""A layer's tensors in the PEFT layout, and the axis of the layer's own weight (out, in, ...) that each must fit."""
NAME = re.compile(rf"(?P<layer>.+)\.(?P<kind>{'|'.join(KINDS)})")
DIFFUSERS_FAULTS = (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError)
"""What diffusers raises for files that it does not understand."""


def attach(family: Family, path: Path, adapter: str) -> None:
    """Put the adapter of a file on the pipeline, under the given name and active alone: through diffusers, or, of kinds
    that diffusers does not load, into the weights (`in_weights`), beside what else is there.

    Raises Fault, and takes it off again, when the file cannot be read, holds a tensor that does not belong to this
    model or that diffusers would ignore, lacks one, or when diffusers makes another change of it than its tensors and
    alphas say (`formats`). The names are listed.
    """
    from finetune.export import in_weights  # it stands above this file

    weights.check_file(path)
    tensors = weights.load_tensors(path)
    if (foreign := _foreign(family, path)) is not None:
        return in_weights.put(family, foreign, adapter, path)
    if family.published.joined and any(name.startswith("lora_unet_") for name in tensors):
        return _attach_parted(family, path, adapter)
    promised = _translated(family, path, tensors)
    _require_fitting(family, path, promised)
    try:
        with quiet():
            family.pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=adapter)
    except DIFFUSERS_FAULTS as error:
        detach(family, adapter)
        raise Fault(f"{path}: cannot be put on this {family.title} model ({first_line(error)}).") from error
    ignored = set(promised) ^ set(adapter_tensors(family, adapter))
    if ignored:
        detach(family, adapter)
        raise Fault(f"{path}: diffusers does not load all of it. What is ignored or missing:", listed(ignored))
    try:
        _require_same(family, path, adapter)
    except Fault:
        detach(family, adapter)
        raise


def _attach_parted(family: Family, path: Path, adapter: str) -> None:
    """A file in kohya's format that has several layers as one: by diffusers' own names."""
    from finetune.export import formats  # it stands above this file

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        formats.write(file, formats.read(path), "diffusers", {}, None, type(family))
        attach(family, file, adapter)


def detach(family: Family, adapter: str) -> None:
    """Take an adapter off again."""
    from finetune.export import in_weights

    if in_weights.holds(family, adapter):
        in_weights.remove(family, adapter)
        return
    with quiet():
        family.pipeline.delete_adapters(adapter)


def set_strengths(family: Family, strengths: Mapping[str, float]) -> None:
    """How strong each adapter is, by its name; those that are live and not named are off."""
    from finetune.export import in_weights

    inside = {name: strength for name, strength in strengths.items() if in_weights.holds(family, name)}
    live = [name for name in strengths if name not in inside]
    if inside:
        in_weights.set_strengths(family, inside)
    if live:
        family.pipeline.set_adapters(live, adapter_weights=[strengths[name] for name in live])


def adaptable(family: Family) -> dict[str, nn.Module]:
    """The parts of the pipeline that can carry an adapter and are in memory, by name."""
    return {family.denoiser_name: families.denoiser(family), **families.text_encoders(family)}


def layers(module: nn.Module, adapter: str) -> dict[str, BaseTunerLayer]:
    """The layers of the module that carry the adapter, by name."""
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {name: layer for name, layer in found.items()
            if any(adapter in getattr(layer, kept) for kept in layer.adapter_layer_names)}  # fmt: skip


def adapter_tensors(family: Family, adapter: str) -> dict[str, Tensor]:
    """The tensors of an adapter that is on the pipeline: `unet.<layer>.lora_A.weight`, by the modules' own names."""
    tensors: dict[str, Tensor] = {}
    for part, module in adaptable(family).items():
        if adapter in getattr(module, "peft_config", {}):
            state = get_peft_model_state_dict(module, adapter_name=adapter, save_embedding_layers=False)
            tensors |= {f"{part}.{name}": tensor for name, tensor in state.items()}
    return tensors


def listed(names: Iterable[str]) -> list[str]:
    """The first few names, and how many more there are."""
    names = sorted(names)
    return names[:LISTED] + ([f"and {len(names) - LISTED} more"] if len(names) > LISTED else [])


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _translated(family: Family, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors by the names that diffusers gives them, as `adapter_tensors` would have them.

    Raises Fault when diffusers cannot translate the names, or drops some of them.
    """
    weighty = [name for name in tensors if not name.endswith(".alpha")]
    try:
        given = family.pipeline.lora_state_dict(
            path.parent, weight_name=path.name, unet_config=families.denoiser(family).config
        )
        state = given if isinstance(given, dict) else given[0]  # some pipelines give alphas beside it
        read = len(state)
        translated: dict[str, Tensor] = {}
        for part, module in adaptable(family).items():
            own = {name.removeprefix(f"{part}."): state.pop(name) for name in [*state] if name.startswith(f"{part}.")}
            known = _to_peft(own, part == family.denoiser_name) if own else {}
            translated |= {f"{part}.{naming.held(module, name)}": tensor for name, tensor in known.items()}
    except DIFFUSERS_FAULTS as error:
        raise Fault(
            f"{path}: not an adapter that diffusers can read ({first_line(error)}). Its tensors:", listed(tensors)
        ) from error
    if not read or read < len(weighty):
        raise Fault(
            f"{path}: diffusers would read {read} of its {len(weighty)} tensors and ignore the rest. Its tensors:",
            listed(tensors),
        )
    return {name.replace(f"{LENGTHS}.weight", LENGTHS): tensor for name, tensor in {**translated, **state}.items()}


def _foreign(family: Family, path: Path) -> Adapter | None:
    """What the file holds, where that is a whole adapter of kinds that diffusers does not load."""
    from finetune.export import formats

    try:
        adapter = formats.read(path)
    except Fault:
        return None  # what follows says why
    return adapter if formats.refused(adapter, "diffusers", type(family)) is not None else None


def _require_same(family: Family, path: Path, adapter: str) -> None:
    """What diffusers has made of the file is what its tensors say by their own formulas."""
    from finetune.export import compare, formats  # these stand above this file
    from finetune.export.carried import carried
    from finetune.export.content import File

    told, loaded = formats.read(path), carried(family, adapter)
    precision = compare.coarsest([*File(path).precisions(), *loaded.dtypes()])
    if wrong := compare.other_changes(told, loaded, precision):
        raise Fault(
            f"{path}: diffusers makes another change of {len(wrong)} of its {len(told.layers)} layers than the file "
            "says (it takes one alpha for all, and leaves DoRA's magnitude out by kohya's names). `finetune convert "
            "FILE OUT --format diffusers` writes it so that it does not.",
            listed(wrong),
        )


def _to_peft(state: dict[str, Tensor], denoiser: bool) -> dict[str, Tensor]:
    """As diffusers' loader does it: a denoiser's names are translated when the first one is not PEFT's already."""
    if denoiser:
        return state if "lora_A" in next(iter(state)) else convert_unet_state_dict_to_peft(state)
    return convert_state_dict_to_peft(convert_state_dict_to_diffusers(state))


def _require_fitting(family: Family, path: Path, promised: Mapping[str, Tensor]) -> None:
    """Every tensor has its layer in the model, fits it, and has its companion."""
    wrong, lacking = [], []
    for name, tensor in promised.items():
        match = NAME.fullmatch(name)
        weight = _weight(family, match["layer"]) if match else None
        if match is None or weight is None:
            wrong.append(f"{name}: this model has no such layer")
        elif _side(tensor, match["kind"]) != weight[KINDS[match["kind"]]]:
            wrong.append(f"{name}: {tuple(tensor.shape)} does not fit the layer's weight {weight}")
        else:
            pair = {f"{match['layer']}.lora_A.weight", f"{match['layer']}.lora_B.weight"}
            lacking += [other for other in pair if other not in promised]
    if wrong:
        raise Fault(
            f"{path}: {len(wrong)} of its {len(promised)} tensors do not belong to this {family.title} model. "
            "Was the adapter made for another kind of model?",
            listed(wrong),
        )
    if lacking:
        raise Fault(f"{path}: tensors are missing, the adapter is not whole:", listed(set(lacking)))


def _side(tensor: Tensor, kind: str) -> int:
    """What must fit the axis of the layer's weight. (Of DoRA's lengths there is one a row, in any shape.)"""
    return tensor.numel() if tensor.ndim < 2 or kind == LENGTHS else tensor.shape[KINDS[kind]]


def _weight(family: Family, name: str) -> tuple[int, ...] | None:
    """The shape of a layer's weight, by its name with the part before it."""
    part, _, layer = name.partition(".")
    try:
        found: Any = adaptable(family)[part].get_submodule(layer)
    except (KeyError, AttributeError):
        return None
    layer = found.get_base_layer() if isinstance(found, LoraLayer) else found
    weight = getattr(layer, "weight", None)
    return families.quantized.shape(layer) if isinstance(weight, Tensor) and weight.ndim >= 2 else None
