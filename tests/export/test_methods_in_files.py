"""Files of every method: PEFT's layers, our formulas and the library LyCORIS make the same of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune import adapters, cli, export, families, keys
from finetune.adapters import NAME
from finetune.errors import Failure, Fault
from finetune.export import compare, formats, naming
from finetune.export import metadata as headers
from finetune.export.change import KINDS
from finetune.export.formats import kohya
from finetune.export.reading import adaptable
from finetune.families import Family, Source
from finetune.settings import Adapter

METHODS = {
    "lora": Adapter("lora", rank=4, alpha=2.0, conv_rank=2),
    "dora": Adapter("dora", rank=4, alpha=2.0, conv_rank=2),
    "loha": Adapter("loha", rank=4, alpha=2.0, conv_rank=2),
    "lokr": Adapter("lokr", rank=4, alpha=2.0, conv_rank=2),
    "lokr-1": Adapter("lokr", rank=1, alpha=2.0, factor=2),
    "oft": Adapter("oft", rank=4),
    "boft": Adapter("boft", rank=4),
    "ia3": Adapter("ia3"),
}
"""LoKr once with two whole factors, once with one in two halves"""
TURNED = ("oft", "boft")
"""What LyCORIS has no names for"""


def trained(folder: Path, method: str) -> Family:
    """As after training: each number a little off where it begins."""
    family = families.load(Source(str(folder)))
    adapter = METHODS[method] if family.denoiser_name == "unet" else replace(METHODS[method], conv_rank=None)
    adapters.adapt(family, adapter, 1e-3, 1e-4 if family.trained_text_encoders else None, 0)
    for part, module in adaptable(family).items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * keys.normal(tuple(parameter.shape), 0, "test", part, name)
    return family


@pytest.fixture(scope="module")
def base_of(tiny_models: dict[str, Path]) -> Callable[[str], Family]:
    """A family's base, loaded once. Each test leaves it as it was."""
    return cache(lambda kind: families.load(Source(str(tiny_models[kind]))))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in TURNED])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_pefts_layers_and_lycoris_answer_alike(
    kind: str, method: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Layer by layer, on random inputs, by the file in kohya's names."""
    family, file = trained(tiny_models[kind], method), tmp_path / "a.safetensors"
    export.adapter(family, file, settings={}, form="kohya")
    state, parts = load_file(file), adaptable(family)
    known = formats.read(file)
    assert {layer.kind for layer in known} == {method.partition("-")[0].replace("dora", "lora")}
    told = json.loads(known.metadata.get("ss_network_args", "{}"))
    assert told.get("algo", "lora") == method.partition("-")[0].replace("dora", "lora")
    assert ("dora_wd" in told) == (method == "dora")
    for layer in known:
        module = parts[layer.part].get_submodule(naming.held(parts[layer.part], layer.path))
        assert isinstance(module, BaseTunerLayer)
        base = module.get_base_layer()
        shape = (2, base.weight.shape[1], *[5] * (base.weight.ndim - 2))
        given = keys.normal(shape, 0, "test", layer.name)
        with torch.no_grad():
            ours, theirs = module(given), by_lycoris(state, kohya.module(layer, type(family)), base)(given)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5), layer.name
        assert not torch.allclose(ours, base(given), rtol=1e-4, atol=1e-5), layer.name


def by_lycoris(state: dict[str, Tensor], name: str, base: nn.Module) -> nn.Module:
    from lycoris.modules import get_module, make_module
    from lycoris.modules.ia3 import IA3Module

    kind, params = get_module(state, name)
    if kind is IA3Module:  # its own loader passes one argument too many (lycoris-lora 4.1.3)
        made = IA3Module(name, base, train_on_input=bool(state[f"{name}.on_input"]))
        made.weight.data.copy_(state[f"{name}.weight"].reshape(made.weight.shape))
    else:
        made = make_module(kind, params, name, base)
    made.org_forward = base.forward
    return made.eval()


@pytest.mark.parametrize(("ours", "theirs"), [("oft", "diag_oft"), ("boft", "boft")])
def test_lycoris_turns_outputs_where_peft_turns_inputs(ours: str, theirs: str) -> None:
    """Ours keeps W W', theirs W'W, and neither keeps the other: no tensors of the one make the change of the other."""
    from lycoris.modules import get_module, make_module

    base, given = nn.Linear(16, 16), keys.normal((3, 4, 4, 4), 0, "test")
    state = {"x.oft_blocks": given if ours == "boft" else given[0], "x.alpha": torch.tensor(0.0)}
    kind, params = get_module(state, "x")
    assert kind.__module__ == f"lycoris.modules.{theirs}"
    weight = base.weight.detach()
    by_them = make_module(kind, params, "x", base).get_merged_weight()[0].detach()
    act, wings = KINDS[ours].act, {"boft_R": given, "boft_s": torch.ones(16, 1)}
    assert act is not None
    by_us = weight + act(wings if ours == "boft" else {"oft_R.weight": given[0, :, :2, :3].flatten(1)}, weight)
    for made, before in ((by_us, weight), (by_them.T, weight.T)):
        assert torch.allclose(made @ made.T, before @ before.T, atol=1e-5)
        assert not torch.allclose(made.T @ made, before.T @ before, atol=1e-2)


@pytest.mark.parametrize("method", ["loha", "lokr", "lokr-1", "oft", "boft", "ia3"])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_peft_loads_its_file(kind: str, method: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """As docs/methods.md says, by what its header tells, on the base: the same answers."""
    from peft import get_peft_config, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors import safe_open

    family, file = trained(tiny_models[kind], method), tmp_path / "a.safetensors"
    export.adapter(family, file, settings={}, form="peft")
    wanted, fresh = compare.prediction(family), families.load(Source(str(tiny_models[kind])))
    with safe_open(file, "pt") as handle:
        configs = json.loads(handle.metadata()["peft_config"])
    part, denoiser = fresh.denoiser_name, families.denoiser(fresh)
    inject_adapter_in_model(get_peft_config(configs[part]), denoiser)
    state = {name: tensor for name, tensor in load_file(file).items() if name.startswith(f"{part}.")}
    own = {name.removeprefix(f"{part}."): tensor for name, tensor in state.items()}
    assert not set_peft_model_state_dict(denoiser, own).unexpected_keys
    assert compare.difference(wanted, compare.prediction(fresh)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["sd3", "flux", "klein", "zimage"])
def test_transformers_take_every_method(
    kind: str, method: str, tiny_models: dict[str, Path], base_of: Callable[[str], Family], tmp_path: Path
) -> None:
    """Each has a format that holds it, from which a base gets it back; kohya's holds what can be joined there."""
    family, file = trained(tiny_models[kind], method), tmp_path / "a.safetensors"
    export.adapter(family, file, settings={})
    assert formats.format_of(file, load_file(file)) == ("diffusers" if method in ("lora", "dora") else "peft")
    base = base_of(kind)
    wanted, before = compare.prediction(family), compare.prediction(base)
    export.attach(base, file, "one")
    gap = compare.difference(wanted, compare.prediction(base))
    export.detach(base, "one")
    assert gap < 1e-5 and gap < 0.01 * compare.difference(wanted, before)
    if kind in ("sd3", "flux") and method == "lora":
        export.adapter(family, file, settings={}, form="kohya")
        return
    said = "what goes into a layer" if method in TURNED else "only a plain LoRA can be"
    with pytest.raises(Fault, match=said if kind in ("sd3", "flux") or method in TURNED else "no names in kohya's"):
        export.adapter(family, file, settings={}, form="kohya")


def test_of_layers_in_one_plain_lora_alone_is_understood(tmp_path: Path) -> None:
    """In kohya's names of a transformer: a Kronecker product of all three is none of each."""
    from safetensors.torch import save_file

    file, name = tmp_path / "a.safetensors", "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{name}.lokr_w1": torch.ones(3, 1), f"{name}.lokr_w2": torch.ones(16, 16)}, file)
    with pytest.raises(Fault) as fault:
        formats.read(file)
    assert fault.value.details == [f"{name}: LoKr of 3 layers in one; of such, plain LoRA alone is understood"]


@pytest.mark.parametrize("method", ["loha", "oft", "ia3"])
def test_of_other_precision_it_is_the_same_but_for_rounding(
    method: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    family, file = trained(tiny_models["sd"], method), tmp_path / "a.safetensors"
    export.adapter(family, file, settings={}, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(file).values() if tensor.ndim} == {torch.float16}
    export.verify_adapter(family, file)


def test_a_file_that_was_changed_does_not_pass(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    family, file = trained(tiny_models["sd"], "lokr"), tmp_path / "a.safetensors"
    export.adapter(family, file, settings={})
    state = load_file(file)
    name = next(name for name in state if name.endswith("lokr_w2"))
    save_file({**state, name: 1.1 * state[name]}, file)
    with pytest.raises(Failure, match="does not load back"):
        export.verify_adapter(family, file)


def test_strengths_are_exact_and_taken_back(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """W + s dW, beside a LoRA that diffusers has loaded; off, and taken off, it is the base to the bit."""
    loha, lora = tmp_path / "loha.safetensors", tmp_path / "lora.safetensors"
    for method, file in (("loha", loha), ("lora", lora)):
        export.adapter(trained(tiny_models["sd"], method), file, settings={})
    family = families.load(Source(str(tiny_models["sd"])))
    before = compare.prediction(family)
    export.attach(family, lora, "one")
    with_lora = compare.prediction(family)
    export.attach(family, loha, "two")
    [first, *_] = [layer for layer in formats.read(loha) if layer.part == "unet"]
    weight = family.pipeline.unet.get_submodule(first.path).weight
    for strength in (0.0, 0.5, -1.0):
        export.set_strengths(family, {"one": 1.0, "two": strength})
        base = families.load(Source(str(tiny_models["sd"]))).pipeline.unet.get_submodule(first.path).weight
        assert torch.allclose(weight, base + strength * first.change().reshape(base.shape), atol=1e-6)
        assert torch.equal(compare.prediction(family), with_lora) == (strength == 0)
    export.detach(family, "two")
    assert torch.equal(compare.prediction(family), with_lora)
    export.detach(family, "one")
    assert torch.equal(compare.prediction(family), before)


def test_commands_take_files_of_all_kinds(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`inspect` and `verify` name the kind, `generate` draws with it at any strength, `convert` says what cannot be."""
    model = str(tiny_models["sd"])
    for method, title in (("lokr", "LoKr"), ("oft", "OFT")):
        file = tmp_path / f"{method}-file.safetensors"
        export.adapter(trained(tiny_models["sd"], method), file, settings={"adapter": {"method": method, "factor": 2}})
        cli.main(["inspect", str(file), "--json"])
        told = json.loads(capsys.readouterr().out)
        assert (told["kinds"].keys(), told["settings"]["method"]) == ({title}, method)
        assert ("ss_network_module" in told["metadata"]) == (method != "oft"), "none of sd-scripts makes it"
        cli.main(["verify", str(file), "--model", model])
        assert "Nothing is wrong with what could be asked" in " ".join(capsys.readouterr().out.split())
        pictures = {}
        for scale in ("0", "1"):
            words = ["--adapter", str(file), "--scale", scale, "--output", str(tmp_path / f"{method}-{scale}")]
            cli.main(["generate", "--model", model, "--prompt", "a dog", "--steps", "2", *words])
            [picture] = (tmp_path / f"{method}-{scale}").glob("*.png")
            pictures[scale] = Image.open(picture).tobytes()
        assert pictures["0"] != pictures["1"]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(["convert", str(file), str(tmp_path / "b.safetensors"), "--format", "diffusers"])
        assert stop.value.code == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"diffusers loads LoRA and DoRA only, not {title}" in said and "--to-lora RANK" in said
        words = ["--format", "diffusers", "--to-lora", "4", "--model", model]
        cli.main(["convert", str(file), str(tmp_path / f"{method}.safetensors"), *words])
        made = formats.read(tmp_path / f"{method}.safetensors")
        assert {layer.kind for layer in made} == {"lora"}
        assert not {"method", "factor"} & headers.own(made.metadata).keys(), "of what it was before"
        capsys.readouterr()
    merged = tmp_path / "merged.safetensors"  # the first file is in PEFT's names, which have no place for a LoRA
    cli.main(["merge", "--adapter", str(file), "--rank", "4", "--model", model, "--output", str(merged)])
    assert not compare.other_changes(formats.read(merged), made, torch.float32)
    cli.main(["convert", str(tmp_path / "lokr-file.safetensors"), str(tmp_path / "d.safetensors"), "--format", "peft"])
    assert formats.format_of(tmp_path / "d.safetensors", load_file(tmp_path / "d.safetensors")) == "peft"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["convert", str(file), str(tmp_path / "c.safetensors"), "--format", "kohya", "--to-lora", "4"])
    assert "OFT depends on the base's weights. Name the base: --model" in " ".join(capsys.readouterr().err.split())


def test_of_a_transformer_the_whole_model_has_the_bases_names(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """T5's tied weights are not there twice, and what was changed can be taken out again. Alpha is told as it is."""
    model, file, out = tiny_models["flux"], tmp_path / "a.safetensors", tmp_path / "out"
    export.adapter(trained(model, "loha"), file, settings={})
    cli.main(["verify", str(file), "--model", str(model)])
    cli.main(["merge", "--adapter", str(file), "--into-base", "--model", str(model), "--output", str(out)])
    for part in ("transformer", "text_encoder_2"):
        [one], [other] = (list((folder / part).glob("*.safetensors")) for folder in (model, out))
        assert load_file(one).keys() == load_file(other).keys()
    difference = tmp_path / "b.safetensors"
    cli.main(["extract", "--model", str(model), "--tuned", str(out), "--rank", "16", "--format", "diffusers",
              "--precision", "fp32", "--output", str(difference)])  # fmt: skip
    taken = {layer.name: layer.change() for layer in formats.read(difference)}
    assert all(torch.allclose(taken[one.name], one.change(), atol=1e-4) for one in formats.read(file))


def test_of_what_was_trained_a_whole_model_is_made(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's layers merged, loaded back and compared."""
    for method in ("loha", "lokr", "oft", "ia3"):
        family = trained(tiny_models["sd"], method)
        export.merged(family, tmp_path / method, dtype=torch.float32)
        assert NAME in family.pipeline.unet.peft_config
