"""Adapter files in every format hold PEFT's changes, by formulas and names written here anew; and round trips.

(Names: tests/original.py, which the writer does not know. Formulas: Hu et al. 2021, 2106.09685, eq. 3; Hyeon-Woo et al.
2021, 2108.06098, eq. 2 and proposition 3; Yeh et al. 2023, 2309.14859, section 3.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import live
import original
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune import export, families
from finetune.adapters import NAME
from finetune.errors import Fault
from finetune.export import compare, formats
from finetune.export.carried import carried
from finetune.export.content import Adapter, File, held
from finetune.families import Family, Source

UNET = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
]
"""Linear layers, convolutions of 1 x 1 and 3 x 3, in every kind of block"""
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
TEXT_PREFIX = {
    "sd": {"text_encoder": "lora_te_"},
    "sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}


def adapted(folder: Path, dtype: torch.dtype = torch.float32, mixed: bool = False) -> Family:
    """A LoRA on all that clients read: rank 4, alpha 6; `mixed`: other ranks and alphas in some layers."""
    family = families.load(Source(str(folder)), dtype)
    patterns = (
        {"rank_pattern": {"to_k": 3, "conv2": 5}, "alpha_pattern": {"to_k": 1.7, "proj_in": 9.0}} if mixed else {}
    )
    family.pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=UNET, **patterns), NAME)
    for part in family.text_encoder_names:
        patterns = {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"q_proj": 0.5}} if mixed else {}
        config = LoraConfig(r=4, lora_alpha=6, target_modules=TEXT, **patterns)
        getattr(family.pipeline, part).add_adapter(config, NAME)
    live.randomise(family)
    return family


def changes(family: Family) -> Iterator[tuple[str, str, Tensor]]:
    """Part, path and change of each layer that carries the adapter, as PEFT computes it."""
    for part in ("unet", *family.text_encoder_names):
        for path, layer in getattr(family.pipeline, part).named_modules():
            if isinstance(layer, LoraLayer):
                yield part, path, layer.get_delta_weight(NAME).detach()


def kohya_name(kind: str, part: str, path: str) -> str:
    if part != "unet":
        return TEXT_PREFIX[kind][part] + f"text_model.{path.removeprefix('text_model.')}".replace(".", "_")
    if kind == "sdxl":  # SDXL's up blocks 0 and 1 attend, and only they have upsamplers
        path = original._unet_name(f"{path}.weight").removesuffix(".weight")
        path = path.replace("{up0}", "2").replace("{up1}", "2")
    return f"lora_unet_{path.replace('.', '_')}"


def product(up: Tensor, down: Tensor) -> Tensor:
    """B A, entry by entry of the kernel."""
    if down.ndim == 2:
        return up @ down
    return torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_changes_from_a_kohya_file_are_pefts(
    kind: str, mixed: bool, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Every layer under its name, no other name, one alpha for all."""
    family, file = adapted(tiny_models[kind], mixed=mixed), tmp_path / "a.safetensors"
    formats.write(file, carried(family, NAME), "kohya", {}, family=type(family))
    tensors = load_file(file)
    expected = {kohya_name(kind, part, path): change for part, path, change in changes(family)}
    suffixes = ("alpha", "lora_down.weight", "lora_up.weight")
    assert tensors.keys() == {f"{name}.{suffix}" for name in expected for suffix in suffixes}
    assert len({float(tensors[f"{name}.alpha"]) for name in expected}) == 1
    for name, change in expected.items():
        alpha, down, up = (tensors[f"{name}.{suffix}"] for suffix in suffixes)
        found = alpha / down.shape[0] * product(up, down)
        assert torch.allclose(found, change, rtol=1e-5, atol=1e-6), name
    assert sum(tensor.ndim == 4 for name, tensor in tensors.items() if name.endswith("down.weight")) > 20


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_changes_from_a_diffusers_file_are_pefts(
    kind: str, mixed: bool, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """alpha / rank * B A, with the alpha that the header gives each layer as PEFT looks it up."""
    family, file = adapted(tiny_models[kind], mixed=mixed), tmp_path / "a.safetensors"
    formats.write(file, carried(family, NAME), "diffusers", {}, family=type(family))
    tensors = load_file(file)
    told = json.loads(File(file).metadata["lora_adapter_metadata"])
    names = set()
    for part, path, change in changes(family):
        name = f"{part}.{path}" if part == "unet" else f"{part}.text_model.{path.removeprefix('text_model.')}"
        down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        patterns = told[f"{part}.alpha_pattern"].items()
        alpha = next((own for end, own in patterns if name.endswith(f".{end}")), told[f"{part}.lora_alpha"])
        assert torch.allclose(alpha / down.shape[0] * product(up, down), change, rtol=1e-5, atol=1e-6), name
        names |= {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
    assert tensors.keys() == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("way", [("diffusers", "kohya"), ("kohya", "diffusers")])
def test_there_and_back_is_the_same_to_the_bit(
    way: tuple[str, str], kind: str, dtype: torch.dtype, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    family = adapted(tiny_models[kind])
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    formats.write(files[0], carried(family, NAME), way[0], {}, dtype, type(family))
    for before, after, form in ((files[0], files[1], way[1]), (files[1], files[2], way[0])):
        formats.write(after, formats.read(before), form, {}, None, type(family))
    assert files[0].read_bytes() == files[2].read_bytes()
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_alphas_of_their_own_survive_there_and_back(kind: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """A kohya file has one alpha, so weights are multiplied: once, to rounding, and never again."""
    family = adapted(tiny_models[kind], mixed=True)
    live_adapter, files = carried(family, NAME), [tmp_path / f"{number}.safetensors" for number in range(5)]
    formats.write(files[0], live_adapter, "diffusers", {})
    for number, form in enumerate(("kohya", "diffusers", "kohya", "diffusers")):
        formats.write(files[number + 1], formats.read(files[number]), form, {}, None, type(family))
        assert not compare.other_changes(live_adapter, formats.read(files[number + 1]), torch.float32)
    assert files[1].read_bytes() == files[3].read_bytes() and files[2].read_bytes() == files[4].read_bytes()


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_diffusers_loads_the_kohya_file_with_every_layers_own_change(
    kind: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Its loader takes one alpha for all, which is why the file has only one."""
    family = adapted(tiny_models[kind], mixed=True)
    export.adapter(family, tmp_path / "a.safetensors", settings={}, form="kohya")
    expected = {f"{part}.{path}": change for part, path, change in changes(family)}
    loaded = families.load(Source(str(tiny_models[kind])))
    export.attach(loaded, tmp_path / "a.safetensors", NAME)
    for part, path, change in changes(loaded):
        assert torch.allclose(change, expected.pop(f"{part}.{path}"), rtol=1e-5, atol=1e-6), path
    assert not expected


def drawn(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name.replace("_weight", ".weight"): torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }


def loha(t: dict[str, Tensor]) -> Tensor:
    if "hada_t1" not in t:
        return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    one, other = (
        torch.einsum("pqhw,po,qi->oihw", t[f"hada_t{n}"], t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]) for n in (1, 2)
    )
    return one * other


def lokr(t: dict[str, Tensor]) -> Tensor:
    """W[a p + c, b q + d] = W1[a, b] W2[c, d]"""
    one = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    other = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    made = torch.einsum("ab,cd...->acbd...", one, other)
    return made.reshape(one.shape[0] * other.shape[0], one.shape[1] * other.shape[1], *other.shape[2:])


def lora(t: dict[str, Tensor]) -> Tensor:
    if "lora_mid.weight" not in t:
        return product(t["lora_up.weight"], t["lora_down.weight"])
    up, mid, down = t["lora_up.weight"], t["lora_mid.weight"], t["lora_down.weight"]
    return torch.einsum("op,pqhw,qi->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0])


KINDS = {
    "lora": (lora, 3, {"lora_down_weight": (3, 8), "lora_up_weight": (6, 3)}),
    "locon": (lora, 3, {"lora_down_weight": (3, 8, 3, 3), "lora_up_weight": (6, 3, 1, 1)}),
    "tucker": (
        lora,
        3,
        {"lora_down_weight": (3, 8, 1, 1), "lora_mid_weight": (3, 3, 3, 3), "lora_up_weight": (6, 3, 1, 1)},
    ),
    "loha": (loha, 2, {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)}),
    "loha tucker": (
        loha,
        2,
        {
            **{"hada_w1_a": (2, 6), "hada_w1_b": (2, 8), "hada_t1": (2, 2, 3, 3)},
            **{"hada_w2_a": (2, 6), "hada_w2_b": (2, 8), "hada_t2": (2, 2, 3, 3)},
        },
    ),
    "lokr, both whole": (lokr, None, {"lokr_w1": (2, 2), "lokr_w2": (3, 4)}),
    "lokr of a convolution": (lokr, None, {"lokr_w1": (2, 2), "lokr_w2": (3, 4, 3, 3)}),
    "lokr, second factored": (lokr, 2, {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 4)}),
    "lokr, first factored": (lokr, 1, {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2": (3, 4)}),
    "diff": (lambda t: t["diff"], None, {"diff": (6, 8)}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_every_kinds_change_is_the_papers_and_survives_a_kohya_file(kind: str, seed: int, tmp_path: Path) -> None:
    """Layers of alphas of their own, as LyCORIS writes them, through our file and back."""
    formula, rank, shapes = KINDS[kind]
    paths = [f"down_blocks.1.attentions.{n}.transformer_blocks.0.attn1.to_q" for n in range(2)]
    held_, expected = [], {}
    for number, path in enumerate(paths):
        alpha, tensors = 0.7 + number + seed, drawn(10 * seed + number, **shapes)
        held_.append(held("unet", path, tensors, alpha))
        expected[path] = (1.0 if rank is None else alpha / rank) * formula(tensors)
    adapter = Adapter(held_, family="StableDiffusionXLPipeline")
    formats.write(tmp_path / "a.safetensors", adapter, "kohya", {"ss_base_model_version": "sdxl_base_v1-0"})
    again = formats.read(tmp_path / "a.safetensors")
    assert again.family == adapter.family and [layer.path for layer in again] == paths
    for one in (adapter, again):
        for layer in one:
            found = layer.change().reshape(expected[layer.path].shape)
            assert torch.allclose(found, expected[layer.path], rtol=1e-4, atol=1e-5)
    assert not compare.other_changes(adapter, again, torch.float32)
    altered = Adapter([held("unet", layer.path, layer.tensors(), (layer.alpha or 1) * 1.5) for layer in again])
    assert (rank is None) == (not compare.other_changes(adapter, altered, torch.float32)), "a wrong alpha is seen"


def test_older_spellings_of_diffusers_are_read(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """`.lora.down`, `.lora_linear_layer.down` of its scripts, `processor.to_q_lora` of its first loader; no alpha."""
    family = live.adapted(tiny_models["sd"], alpha=4.0, text=True)
    formats.write(tmp_path / "new.safetensors", carried(family, NAME), "diffusers", {})
    tensors = load_file(tmp_path / "new.safetensors")
    ways = {"lora_A": "down", "lora_B": "up"}
    scripts, first = {}, {}
    for name, tensor in tensors.items():
        layer, half, _ = name.rsplit(".", 2)
        own, _, which = layer.rpartition(".to_") if ".to_" in layer else ("", "", "")
        middle = "lora" if layer.startswith("unet.") else "lora_linear_layer"
        scripts[f"{layer}.{middle}.{ways[half]}.weight"] = tensor
        oldest = f"{own}.processor.to_{which.removesuffix('.0')}_lora.{ways[half]}.weight"
        first[oldest if own else f"{layer}.lora_linear_layer.{ways[half]}.weight"] = tensor
    expected = carried(family, NAME)
    for number, spelling in enumerate((scripts, first)):
        assert not spelling.keys() & tensors.keys()
        save_file(spelling, tmp_path / f"{number}.safetensors")
        assert not compare.other_changes(expected, formats.read(tmp_path / f"{number}.safetensors"), torch.float32)


def test_sdxl_files_by_diffusers_names_are_read(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Both styles of names are about; ours is the original code's."""
    family = adapted(tiny_models["sdxl"])
    tensors = {}
    for part, path, _ in changes(family):
        layer = getattr(family.pipeline, part).get_submodule(path)
        name = kohya_name("sdxl", part, path) if part != "unet" else f"lora_unet_{path.replace('.', '_')}"
        halves = {"lora_down.weight": layer.lora_A[NAME].weight, "lora_up.weight": layer.lora_B[NAME].weight}
        tensors |= {f"{name}.{suffix}": half.detach().clone() for suffix, half in halves.items()}
        tensors[f"{name}.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "a.safetensors")
    found = formats.read(tmp_path / "a.safetensors")
    assert not compare.other_changes(carried(family, NAME), found, torch.float32)
    assert found.family == "StableDiffusionXLPipeline"


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_what_a_file_is_for_is_told_by_its_layers_alone(
    kind: str, form: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Where it has two text encoders. Without them a tiny model's widths, which no real one has, tell nothing."""
    family = live.adapted(tiny_models[kind], text=True)
    file = tmp_path / "a.safetensors"
    formats.write(file, carried(family, NAME), form, {})
    assert formats.read(file).family == type(family.pipeline).__name__  # its header says so
    save_file(load_file(file), file)
    assert formats.read(file).family == ("StableDiffusionXLPipeline" if kind == "sdxl" else None)


def plant(tensors: dict[str, Tensor], how: str) -> str:
    """What is wrong, and the layer that the message must name."""
    name = sorted(name for name in tensors if name.endswith("lora_down.weight"))[0]
    module = name.partition(".")[0]
    if how == "renamed":
        tensors[f"{module}.lora_dawn.weight"] = tensors.pop(name)
        return "attn1.to_k"
    if how == "unknown layer":
        tensors[f"lora_unet_nowhere.{'lora_down.weight'}"] = tensors.pop(name)
        return "lora_unet_nowhere"
    if how == "no alpha":
        del tensors[f"{module}.alpha"]
        return "no alpha, where others have one"
    del tensors[name]
    return "not whole"


@pytest.mark.parametrize("how", ["renamed", "unknown layer", "no alpha", "lost half"])
def test_a_file_that_is_not_whole_is_refused_by_name(how: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    formats.write(tmp_path / "a.safetensors", carried(live.adapted(tiny_models["sd"]), NAME), "kohya", {})
    tensors = load_file(tmp_path / "a.safetensors")
    expected = plant(tensors, how)
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(Fault) as fault:
        formats.read(tmp_path / "b.safetensors")
    assert expected in str(fault.value)
