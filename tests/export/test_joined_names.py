"""SD 3's and FLUX.1's layers in kohya's format, where q, k and v (and FLUX's first half of an MLP) are one."""

from __future__ import annotations

import json
from pathlib import Path

import live
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from finetune import cli, export, families, keys
from finetune.errors import Fault
from finetune.export import compare, formats
from finetune.export.carried import carried
from finetune.export.content import Adapter, held
from finetune.families import Family

NAMES = {
    "sd3": {
        "lora_unet_joint_blocks_0_x_block_attn_qkv": ("transformer_blocks.0.attn", ("to_q", "to_k", "to_v")),
        "lora_unet_joint_blocks_0_x_block_attn2_qkv": ("transformer_blocks.0.attn2", ("to_q", "to_k", "to_v")),
        "lora_unet_joint_blocks_1_context_block_attn_qkv": (
            "transformer_blocks.1.attn", ("add_q_proj", "add_k_proj", "add_v_proj")
        ),
        "lora_unet_joint_blocks_1_x_block_attn_proj": ("transformer_blocks.1.attn", ("to_out.0",)),
        "lora_unet_joint_blocks_1_context_block_attn_proj": ("transformer_blocks.1.attn", ("to_add_out",)),
    },
    "flux": {
        "lora_unet_double_blocks_0_img_attn_qkv": ("transformer_blocks.0.attn", ("to_q", "to_k", "to_v")),
        "lora_unet_double_blocks_1_txt_attn_qkv": (
            "transformer_blocks.1.attn", ("add_q_proj", "add_k_proj", "add_v_proj")
        ),
        "lora_unet_double_blocks_1_txt_attn_proj": ("transformer_blocks.1.attn", ("to_add_out",)),
        "lora_unet_single_blocks_1_linear1": ("single_transformer_blocks.1.attn", ("to_q", "to_k", "to_v")),
    },
}  # fmt: skip
"""By kohya's name: our layers that it joins, in its order (sd-scripts, networks/lora_sd3.py and lora_flux.py)"""


@pytest.fixture(params=NAMES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def family(kind: str, tiny_models: dict[str, Path]) -> Family:
    return live.adapted(tiny_models[kind], text=True)


@pytest.fixture
def file(family: Family, tmp_path: Path) -> Path:
    """Converted through the command line from what a recipe writes."""
    export.adapter(family, tmp_path / "adapter.safetensors", settings={})
    cli.main(
        ["convert", str(tmp_path / "adapter.safetensors"), str(tmp_path / "kohya.safetensors"), "--format", "kohya"]
    )
    return tmp_path / "kohya.safetensors"


def test_each_name_is_its_layers_one_behind_the_other(kind: str, family: Family, file: Path) -> None:
    """A client's own sum: alpha / rank * up @ down, against PEFT's to each layer; zeros where nothing trains."""
    tensors, layers = load_file(file), {layer.path: layer.change() for layer in carried(family, "default")}
    for name, (path, ends) in NAMES[kind].items():
        down, up = (tensors[f"{name}.lora_{way}.weight"] for way in ("down", "up"))
        made = tensors[f"{name}.alpha"] / len(down) * up @ down
        expected = torch.cat([layers[f"{path}.{end}"] for end in ends])
        torch.testing.assert_close(made[: len(expected)], expected, rtol=1e-5, atol=1e-6)
        assert not made[len(expected) :].any()
        assert len(made) == len(expected) * (7 / 3 if "linear1" in name else 1)
    assert len({float(value) for name, value in tensors.items() if name.endswith("alpha")}) == 1
    assert {name.split("_")[1] for name in tensors} == {"unet", *(p.removeprefix("lora_") for p in _texts(kind))}


def _texts(kind: str) -> tuple[str, ...]:
    return ("lora_te1", "lora_te2") if kind == "sd3" else ("lora_te1",)


def test_it_reads_back_as_the_same_layers_of_the_same_rank(family: Family, file: Path, tmp_path: Path) -> None:
    live_ones, read = carried(family, "default"), formats.read(file)
    assert read.family == type(family.pipeline).__name__
    assert not compare.other_changes(live_ones, read, torch.float32)
    assert {layer.rank for layer in read} == {4}
    back = tmp_path / "back.safetensors"
    cli.main(["convert", str(file), str(back), "--format", "diffusers"])
    one, other = load_file(tmp_path / "adapter.safetensors"), load_file(back)
    assert one.keys() == other.keys()


def test_diffusers_translates_flux_names_of_the_published_widths(tmp_path: Path) -> None:
    """Its own table has those only: of a double and a single block, whose layers are known without any model."""
    width, rank, layers = 3072, 2, []
    single = {f"attn.to_{which}": width for which in "qkv"} | {"proj_mlp": 4 * width}
    double = {f"attn.{end}": width for end in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")}
    for block, ends in (("single_transformer_blocks.0", single), ("transformer_blocks.0", double)):
        for end, out in ends.items():
            shapes = {"lora_down.weight": (rank, width), "lora_up.weight": (out, rank)}
            tensors = {name: keys.normal(shape, 0, "test", block, end, name) for name, shape in shapes.items()}
            layers.append(held("transformer", f"{block}.{end}", tensors, 1.0 if "single" in block else 3.0))
    adapter = Adapter(layers, family="FluxPipeline")
    formats.write(tmp_path / "kohya.safetensors", adapter, "kohya", {})
    state = FluxPipeline.lora_state_dict(tmp_path, weight_name="kohya.safetensors")
    for layer in adapter:
        down, up = (state[f"{layer.name}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(up @ down, layer.change(), rtol=1e-4, atol=1e-4)


def test_the_file_is_put_on_its_base(family: Family, file: Path, kind: str, tiny_models: dict[str, Path]) -> None:
    loaded = families.load(families.Source(str(tiny_models[kind])))
    export.attach(loaded, file, "one")
    assert compare.difference(compare.prediction(family), compare.prediction(loaded)) < 1e-5
    assert compare.difference(compare.encoding(family), compare.encoding(loaded)) < 1e-5


@pytest.mark.parametrize(
    ("of", "clients"), [("sd3", "sd-scripts, ComfyUI"), ("flux", "diffusers, sd-scripts, ComfyUI")]
)
def test_verify_knows_for_whom_it_is(
    of: str, clients: str, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export.adapter(live.adapted(tiny_models[of]), tmp_path / "a.safetensors", settings={}, form="kohya")
    capsys.readouterr()
    cli.main(["verify", str(tmp_path / "a.safetensors"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["made_for"] == clients.split(", ") and told["sound"]
    assert {one["client"] for one in told["clients"]} == {"diffusers", "sd-scripts", "ComfyUI"}
    with pytest.raises(SystemExit):
        cli.main(["verify", str(tmp_path / "a.safetensors"), "--clients", "A1111"])
    assert "--clients A1111: not known for" in capsys.readouterr().err


def test_a_family_without_such_names_says_so(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Fault, match="no names in kohya's format"):
        export.adapter(live.adapted(tiny_models["klein"]), tmp_path / "a.safetensors", settings={}, form="kohya")


def test_all_leaves_out_what_the_family_has_not(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "adapter.safetensors"
    export.adapter(live.adapted(tiny_models["klein"]), file, settings={})
    words = ["export", str(file), "--model", str(tiny_models["klein"]), "--output", str(tmp_path / "files")]
    cli.main([*words, "--format", "all"])
    said = " ".join(capsys.readouterr().out.split())
    assert "kohya: not written" in said and "single-file: not written: no single file of FLUX.2 klein models" in said
    assert sorted(path.suffix for path in (tmp_path / "files").iterdir()) == ["", ".safetensors"]
