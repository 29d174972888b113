"""Files as other programs write them, with one thing or another about their names and alphas, and as they read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune import families, keys
from finetune.families import Family, Source, original

RANK = 2
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
ENDS = ("conv_in", "conv_out", "time_embedding", "add_embedding")


def write(
    model: Path,
    file: Path,
    *,
    layers: str = "attention",
    names: str = "kohya",
    text: str | None = None,
    projections: str = "qkvout",
    alphas: str = "one",
    form: str = "lora",
    header: dict[str, str] | None = None,
) -> Path:
    """An adapter for the tiny model.

    `layers`: attention, locon (all in the blocks), all. `names`: kohya, original, peft, script. `text`: prefix of the
    text encoders' names, without their numbers; "flat": without `text_model`. `alphas`: one, each, none. `form`: lora,
    loha.
    """  # fmt: skip
    family = families.load(Source(str(model)))
    tensors: dict[str, Tensor] = {}
    chosen = [*_unet(family, layers), *_text(family, projections)]
    for number, (part, path, weight) in enumerate(chosen):
        name = _name(family, part, path, names, text)
        alpha = {"one": 1.0, "each": (1.0, 1.0, 2.0, 3.0)[number % 4], "none": None}[alphas]
        tensors |= _tensors(name, weight, names, form, alpha, path)
    said = {
        "ss_base_model_version": "sdxl_base_v1-0" if len(family.text_encoder_names) > 1 else "sd_v1",
        "ss_v2": "False",
    }
    save_file(tensors, file, said if header is None else header or None)
    return file


def changed(file: Path, how: str, to: Path) -> Path:
    """A kohya-named file with one thing wrong, in its first layer of the UNet."""
    tensors = load_file(file)
    some = sorted(name for name in tensors if name.startswith("lora_unet_") and name.endswith("lora_down.weight"))[0]
    layer = some.partition(".")[0]
    if how == "renamed key":
        tensors[f"{layer}.lora_donw.weight"] = tensors.pop(some)
    elif how == "renamed layer":
        for tensor in ("lora_down.weight", "lora_up.weight", "alpha"):
            tensors[f"{layer.replace('to_', 'ot_')}.{tensor}"] = tensors.pop(f"{layer}.{tensor}")
    elif how == "absent layer":
        for tensor in ("lora_down.weight", "lora_up.weight", "alpha"):
            tensors[f"{layer.replace('attentions_0', 'attentions_7')}.{tensor}"] = tensors.pop(f"{layer}.{tensor}")
    elif how == "missing alpha":
        del tensors[f"{layer}.alpha"]
    elif how == "missing half":
        del tensors[f"{layer}.lora_up.weight"]
    elif how == "shape":
        tensors[some] = torch.zeros(RANK, tensors[some].shape[1] + 1)
    elif how == "ranks apart":
        tensors[some] = torch.zeros(RANK + 1, tensors[some].shape[1])
    elif how == "nan":
        tensors[some][0, 0] = float("nan")
    save_file(tensors, to, {"ss_base_model_version": "sd_v1", "ss_v2": "False"})
    if how == "truncated":
        to.write_bytes(to.read_bytes()[:-7])
    return to


def _unet(family: Family, layers: str) -> Iterator[tuple[str, str, Tensor]]:
    for path, module in families.denoiser(family).named_modules():
        wanted = (
            path.endswith(ATTENTION)
            or (layers in ("locon", "all") and not path.startswith(ENDS))
            or (layers == "all" and path.startswith(ENDS))
        )
        if isinstance(module, nn.Linear | nn.Conv2d) and wanted:
            yield "unet", path, module.weight


def _text(family: Family, projections: str) -> Iterator[tuple[str, str, Tensor]]:
    for part, module in families.text_encoders(family).items():
        for path, child in module.named_modules():
            leaf = path.rpartition(".")[2]
            if leaf in [f"{one}_proj" for one in ("q", "k", "v", "out") if one in projections]:
                yield part, path if path.startswith("text_model.") else f"text_model.{path}", child.weight


def _name(family: Family, part: str, path: str, names: str, text: str | None) -> str:
    if names in ("peft", "script"):
        return f"{part}.{path}"
    if part == "unet":
        layout = original.Layout(frozenset({0, 1}) if len(family.text_encoder_names) > 1 else frozenset({1, 2, 3}))
        path = original.written(path, layout) if names == "original" else path
        return f"lora_unet_{path.replace('.', '_')}"
    prefix = family.published.text[family.text_encoder_names.index(part)]
    if text == "flat":
        path = path.removeprefix("text_model.")
    elif text is not None:
        prefix = text
    return f"{prefix}_{path.replace('.', '_')}"


def _tensors(name: str, weight: Tensor, names: str, form: str, alpha: float | None, path: str) -> dict[str, Tensor]:
    def noise(which: str, *shape: int) -> Tensor:
        return 0.3 * keys.normal(shape, 0, "foreign", name, which)

    out, inside = weight.shape[:2]
    kernel = tuple(weight.shape[2:])
    if form == "loha":
        made = {f"hada_w{n}_{half}": noise(f"{n}{half}", *((out, RANK) if half == "a" else (RANK, weight[0].numel())))
                for n in (1, 2) for half in "ab"}  # fmt: skip
    else:
        made = {"lora_down.weight": noise("down", RANK, inside, *kernel),
                "lora_up.weight": noise("up", out, RANK, *(1 for _ in kernel))}  # fmt: skip
    if names in ("peft", "script"):
        old = names == "script" and path.endswith(ATTENTION)
        suffixes = ("lora.down.weight", "lora.up.weight") if old else ("lora_A.weight", "lora_B.weight")
        return {f"{name}.{suffix}": tensor for suffix, tensor in zip(suffixes, made.values(), strict=True)}
    return {f"{name}.{tensor}": value for tensor, value in made.items()} | (
        {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    )


def load_word(pipeline: Any, file: Path) -> None:
    """An embedding onto a pipeline, as diffusers' documentation does it."""
    tensors = load_file(file)
    if len(tensors) == 1:
        pipeline.load_textual_inversion(str(file))
        return
    for name, part in {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}.items():
        parts = {"text_encoder": getattr(pipeline, part),
                 "tokenizer": getattr(pipeline, part.replace("text_encoder", "tokenizer"))}  # fmt: skip
        pipeline.load_textual_inversion(tensors[name], token=file.stem, **parts)
