"""kohya's names, which AUTOMATIC1111, Forge, ComfyUI, InvokeAI, sd-scripts and diffusers read: `lora_unet_...`.

A layer's path has `_` for its dots, `.` parts it from its tensors, `alpha` is one of them. LyCORIS names the tensors of
the other kinds, in the same files. (kohya-ss/sd-scripts, networks/lora.py; KohakuBlueleaf/LyCORIS, lycoris/modules.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from finetune import families
from finetune.errors import Fault
from finetune.export.change import KINDS
from finetune.export.content import Adapter, File, Layer
from finetune.export.naming import LEVEL
from finetune.export.stream import Entry
from finetune.families import Family, original
from finetune.families.original import Layout

PARTS = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "resnets", "attentions", "downsamplers", "upsamplers", "conv_shortcut"),
    *("transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "proj_in"),
    *("proj_out", "conv", "conv1", "conv2", "conv_in", "conv_out", "time_emb_proj", "time_embedding", "add_embedding"),
    *("linear_1", "linear_2", "input_blocks", "output_blocks", "middle_block", "in_layers", "out_layers", "emb_layers"),
    *("skip_connection", "op", "time_embed", "label_emb", "out"),
    *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2"),
    *("text_projection", r"\d+"),
)
"""Parts of paths, some with a `_` of their own: what a name without dots is taken apart by."""
WORD = re.compile(rf"({'|'.join(sorted(WORDS, key=len, reverse=True))})(?:_|$)")
ORIGINAL = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
OTHERS = "the format diffusers (LoRA, DoRA) or peft (other kinds)"
PLAIN = {"lora_down.weight", "lora_up.weight"}
FOLDED = ("lora_up.weight", "hada_w1_a", "lokr_w1_a", "lokr_w1", "diff")
"""Where a scale goes into the weights: the first of these that a layer has."""


def knows(names: Iterable[str]) -> bool:
    return any(name.startswith(("lora_unet_", "lora_te")) for name in names)


def read(file: File) -> Adapter:
    """Raises Fault that lists the names that are no layer's."""
    modules: dict[str, dict[str, str]] = {}
    for key in file.shapes:
        module, _, tensor = key.partition(".")
        modules.setdefault(module, {})[tensor] = key
    layers, wrong = {}, []
    for module, keys in modules.items():
        try:
            part, path = place(module)
        except KeyError:
            wrong += [f"{key}: no layer of a model that is known" for key in keys.values()]
            continue
        told = keys.pop("alpha", None)
        whole = file.layer(part, path, keys, None if told is None else float(file.load(told)))
        try:
            own = _parted(module, whole)
        except Fault as fault:
            wrong.append(fault.message)
            continue
        for layer in own:
            if layer.name in layers:
                wrong.append(f"{module}: {layer.name} is there twice, under two names")
            layers[layer.name] = layer
    if wrong:
        raise Fault(f"{file.path}: {len(wrong)} of its names are not understood:", wrong)
    return Adapter(list(layers.values()), file.metadata)


def entries(adapter: Adapter, family: type[Family], dtype: torch.dtype | None) -> dict[str, Entry]:
    """The file's tensors: one alpha in it, as diffusers takes one for all; where a layer's scale is another, its
    weights are multiplied."""
    common, made = _common_alpha(adapter), dict[str, Entry]()
    if turned := [layer for layer in adapter if layer.kind in ("oft", "boft")]:
        raise Fault(
            f"{turned[0].name}: PEFT's {turned[0].title} turns what goes into a layer, LyCORIS's what comes out: no "
            "name here means it. Take the format peft, a whole model, or the nearest LoRA: `finetune convert FILE OUT "
            "--to-lora RANK --model BASE`."
        )
    for name, places in _joint(adapter, family).items():
        if len(shares := _shares(name, family)) > 1:
            made |= _joined(name, places, shares, common, dtype)
            continue
        layer = places[0]
        rank = layer.rank
        factor = 1.0 if rank is None else layer.scale * rank / common
        folded = next((tensor for tensor in FOLDED if tensor in layer.shapes), None)
        for tensor, shape in layer.shapes.items():
            times = factor if tensor == folded else 1.0
            made[f"{name}.{tensor}"] = layer.entry(tensor, shape, dtype, times)
        if KINDS[layer.kind].act is None:
            made[f"{name}.alpha"] = Entry((), torch.float32, lambda: torch.tensor(common))
    return made


def told(adapter: Adapter) -> Adapter:
    common = _common_alpha(adapter)
    return replace(adapter, layers=[replace(layer, alpha=common) for layer in adapter])


def metadata(adapter: Adapter, family: type[Family]) -> dict[str, str]:
    return {}


def module(layer: Layer, family: type[Family]) -> str:
    """What a layer is called in files of the family, maybe with others. Raises Fault when it has no such layer."""
    return _placed(layer, family)[0]


def _placed(layer: Layer, family: type[Family]) -> tuple[str, int]:
    """The name, and the layer's place among those that have it."""
    joined = family.published.joined
    if layer.part == family.denoiser_name != "unet":
        if joined is None:
            raise Fault(f"{layer.name}: {family.title} has no names in kohya's format. Take {OTHERS}.")
        try:
            path, place = joined.written(layer.path)
        except KeyError as error:
            raise Fault(f"{layer.name}: no layer that {family.title} has in kohya's format.") from error
        return f"lora_unet_{path.replace('.', '_')}", place
    return _alone(layer, family), 0


def _alone(layer: Layer, family: type[Family]) -> str:
    if layer.part == family.denoiser_name:
        layout: Layout | None = family.published.original
        try:
            path = original.written(layer.path, layout) if layout else layer.path
        except KeyError as error:
            raise Fault(f"{layer.name}: no layer of a {family.title} model. Is the adapter for another?") from error
        return f"lora_unet_{path.replace('.', '_')}"
    if layer.part not in family.text_encoder_names:
        raise Fault(f"{layer.name}: a {family.title} model has no {layer.part}. Is the adapter for another?")
    prefix = family.published.text[family.text_encoder_names.index(layer.part)]
    return f"{prefix}_{layer.path.replace('.', '_')}"


def _joint(adapter: Adapter, family: type[Family]) -> dict[str, dict[int, Layer]]:
    """The layers by the names that they have together, and their places in each."""
    made: dict[str, dict[int, Layer]] = {}
    for layer in adapter:
        name, place = _placed(layer, family)
        made.setdefault(name, {})[place] = layer
    return made


def _shares(name: str, family: type[Family]) -> tuple[int, ...]:
    """How the outputs of what has this name are shared out among our layers."""
    joined = family.published.joined
    try:
        return joined.read(name.removeprefix("lora_unet_"))[1] if joined else (1,)
    except KeyError:
        return (1,)


def _joined(
    name: str, places: Mapping[int, Layer], shares: tuple[int, ...], common: float, dtype: torch.dtype | None
) -> dict[str, Entry]:
    """Several layers as one: their downs one below the other, their ups along a diagonal, zeros for those not there."""
    layers = [places[place] for place in sorted(places)]
    if other := [layer for layer in layers if set(layer.shapes) != PLAIN]:
        raise Fault(
            f"{other[0].name}: kohya's format has it in one with other layers, which only a plain LoRA can be: "
            f"`finetune convert FILE OUT --format kohya --to-lora RANK`. Or take {OTHERS}."
        )
    ranks = [layer.shapes["lora_down.weight"][0] for layer in layers]
    rank, kept = sum(ranks), dtype or layers[0].load("lora_up.weight").dtype
    first = min(places)
    rows = places[first].shapes["lora_up.weight"][0] // shares[first]  # of a share of 1

    def down() -> Tensor:
        return torch.cat([layer.load("lora_down.weight") for layer in layers]).to(kept)

    def up() -> Tensor:
        made, column = torch.zeros(rows * sum(shares), rank), 0
        for place, layer, own in zip(sorted(places), layers, ranks, strict=True):
            begin = rows * sum(shares[:place])
            block = layer.load("lora_up.weight").float() * (layer.scale * rank / common)
            made[begin : begin + len(block), column : column + own] = block
            column += own
        return made.to(kept)

    return {
        f"{name}.lora_down.weight": Entry((rank, layers[0].shapes["lora_down.weight"][1]), kept, down),
        f"{name}.lora_up.weight": Entry((rows * sum(shares), rank), kept, up),
        f"{name}.alpha": Entry((), torch.float32, lambda: torch.tensor(common)),
    }


def _parted(module: str, whole: Layer) -> list[Layer]:
    """The other way: our layers of one that joins several, without those that it does not change.

    Where a layer's outputs are made from some of the rank only, as on a diagonal, it has that rank. Raises Fault for
    what is no plain LoRA: its formula is of the whole.
    """
    found = _joins(module)
    if found is None or len(found[0]) == 1:
        return [whole]
    paths, shares = found
    if set(whole.shapes) != PLAIN:
        raise Fault(f"{module}: {whole.said} of {len(paths)} layers in one; of such, plain LoRA alone is understood")
    up, made, begin = whole.load("lora_up.weight"), [], 0
    for path, share in zip(paths, shares, strict=True):
        rows = slice(begin, begin := begin + len(up) * share // sum(shares))
        if columns := up[rows].any(0).nonzero().flatten().tolist():
            made.append(_part(whole, path, rows, columns))
    return made


def _part(whole: Layer, path: str, rows: slice, columns: list[int]) -> Layer:
    rank, inputs = whole.shapes["lora_down.weight"]
    shapes = {"lora_down.weight": (len(columns), inputs), "lora_up.weight": (rows.stop - rows.start, len(columns))}

    def load(name: str) -> Tensor:
        tensor = whole.load(name)
        return tensor[columns] if name == "lora_down.weight" else tensor[rows][:, columns]

    alpha = None if whole.alpha is None else whole.alpha * len(columns) / rank
    return Layer(whole.part, path, shapes, load, alpha)


def _joins(module: str) -> tuple[list[str], tuple[int, ...]] | None:
    """What a name joins in one of the families of transformers."""
    for family in families.FAMILIES.values():
        if (joined := family.published.joined) and module.startswith("lora_unet_"):
            with suppress(KeyError):
                return joined.read(module.removeprefix("lora_unet_"))
    return None


def _common_alpha(adapter: Adapter) -> float:
    """The alpha that most layers have."""
    counted = Counter(round(layer.scale * layer.rank, 9) for layer in adapter if layer.rank is not None)
    return counted.most_common(1)[0][0] if counted else 1.0


def place(module: str) -> tuple[str, str]:
    """Part and path of a name, of one that joins several the first path. Raises KeyError when it is none."""
    if found := _joins(module):
        return "transformer", found[0][0]
    prefix, _, rest = module.partition("_")
    second, _, rest = rest.partition("_")
    part, words = PARTS[f"{prefix}_{second}"], WORD.findall(rest)
    if "_".join(words) != rest or not words:
        raise KeyError(module)
    path = ".".join(words)
    if part != "unet":
        return part, path if path.startswith((LEVEL, "text_projection")) else LEVEL + path
    return part, original.read(path, Layout(frozenset())) if path.startswith(ORIGINAL) else path
