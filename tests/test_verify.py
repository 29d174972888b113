"""`finetune verify`: what is wrong with a file is named; `generate --adapter` refuses the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import foreign
import live
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import cli, export


@pytest.fixture(scope="module")
def files(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    made = {kind: foreign.write(tiny_models[kind], folder / f"{kind}.safetensors") for kind in ("sd", "sdxl")}
    own = folder / "own.safetensors"
    export.adapter(live.adapted(tiny_models["sd"], text=True), own, settings={"data": {"trigger": "sks"}})
    return {**made, "own": own}


def run(*words: str) -> int:
    """The exit status of a command."""
    try:
        cli.main(list(words))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def told(capsys: pytest.CaptureFixture[str], file: Path, *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = run("verify", str(file), "--json", *words)
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_sound_file_with_its_base(
    kind: str, files: dict[str, Path], tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = told(capsys, files[kind], "--model", str(tiny_models[kind]))
    assert status == 0 and report["sound"]
    states = {check["title"]: check["state"] for check in report["checks"]}
    assert states.pop("the hashes in the header hold") == "open"
    assert set(states.values()) == {"holds"} and "both predict the same" in states
    assert [one["client"] for one in report["clients"]] == report["made_for"]
    assert all(one["loaded"] == one["layers"] == report["layers"] for one in report["clients"])


def test_our_own_file_is_for_diffusers(
    files: dict[str, Path], tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = told(capsys, files["own"], "--model", str(tiny_models["sd"]))
    assert status == 0 and report["made_for"] == ["diffusers"]
    assert {check["title"]: check["state"] for check in report["checks"]}["the hashes in the header hold"] == "holds"
    assert run("verify", str(files["own"]), "--clients", "a1111") == 1, "A1111 does not know such names"
    text = capsys.readouterr().out
    assert "A1111" in text and "ignores 136 of 136 layers" in text and "refuses the file" in text
    assert max(map(len, text.splitlines())) <= 80
    assert run("verify", str(files["own"]), "--clients", "a1112") == 2
    assert "no such client" in capsys.readouterr().err


WRONG = [
    ("renamed key", 1, "lora_donw.weight"),
    ("renamed layer", 1, "no layer of a model that is known"),
    ("absent layer", 1, "the model has no such layer"),
    ("missing alpha", 1, "no alpha, where others have one"),
    ("missing half", 1, "lora_up.weight is missing"),
    ("shape", 1, "its change is of shape (8, 9), the model's weight of (8, 8)"),
    ("ranks apart", 1, "do not go together"),
    ("nan", 1, "NaN"),
    ("truncated", 2, "it is cut short"),
]


@pytest.mark.parametrize(("how", "status", "expected"), WRONG, ids=[how for how, *_ in WRONG])
def test_what_is_wrong_is_named_and_generate_refuses_it(
    how: str,
    status: int,
    expected: str,
    files: dict[str, Path],
    tiny_models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = foreign.changed(files["sd"], how, tmp_path / "a.safetensors")
    assert run("verify", str(file), "--model", str(tiny_models["sd"]), *(["--json"] if status == 1 else [])) == status
    said = capsys.readouterr()
    assert expected in (said.out if status == 1 else said.err)
    if how in ("renamed key", "absent layer", "missing alpha", "missing half", "shape"):
        assert "down_blocks" in said.out and "attn1" in said.out, "the layer is named"
    assert draw(tiny_models["sd"], file, tmp_path) == 2
    assert str(file) in capsys.readouterr().err


def draw(model: Path, adapter: Path, tmp_path: Path) -> int:
    words = ["--model", str(model), "--prompt", "a dog", "--steps", "1", "--output", str(tmp_path / "out")]
    return run("generate", *words, "--adapter", str(adapter))


def test_a_pickle_and_no_adapter(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.pt").read_bytes())
    save_file({"model.diffusion_model.out.0.weight": torch.zeros(3)}, tmp_path / "c.safetensors")
    for name in ("a.pt", "b.safetensors", "c.safetensors", "nowhere.safetensors"):
        assert run("verify", str(tmp_path / name)) == 2, name
        assert draw(tiny_models["sd"], tmp_path / name, tmp_path) == 2


def test_an_adapter_for_another_family(
    files: dict[str, Path], tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = told(capsys, files["sdxl"], "--model", str(tiny_models["sd"]))
    failing = [check["title"] for check in report["checks"] if check["state"] == "fails"]
    assert status == 1
    assert failing == ["every layer fits the model", "the header tells the base that the layers are for"]
    assert draw(tiny_models["sd"], files["sdxl"], tmp_path) == 2


def test_what_diffusers_would_misread_is_refused_with_what_to_do(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = foreign.write(tiny_models["sd"], tmp_path / "a.safetensors", layers="locon", alphas="each")
    assert draw(tiny_models["sd"], file, tmp_path) == 2
    assert "finetune convert FILE OUT --format diffusers" in capsys.readouterr().err.replace("\n", " ")


def test_loha_is_tried_by_its_formula(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = foreign.write(tiny_models["sdxl"], tmp_path / "a.safetensors", form="loha", names="original")
    status, report = told(capsys, file, "--model", str(tiny_models["sdxl"]))
    assert status == 0 and report["made_for"] == ["ComfyUI", "A1111", "Forge", "InvokeAI"]
    assert report["checks"][-1] == {"title": "the base with it predicts finite numbers", "state": "holds", "lines": []}


def test_no_alpha_at_all_is_said(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = foreign.write(tiny_models["sd"], tmp_path / "a.safetensors", alphas="none")
    status, report = told(capsys, file, "--model", str(tiny_models["sd"]))
    assert status == 1 and "every client scales by 1" in str(report["checks"])


def test_a_lost_header_is_noticed(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The alpha of diffusers' format stands in the header: without it every layer would count double here."""
    said = {"ss_base_model_version": "sd_v1", "ss_network_dim": "4", "ss_network_alpha": "2"}
    save_file(load_file(files["own"]), tmp_path / "a.safetensors", said)
    status, report = told(capsys, tmp_path / "a.safetensors")
    assert status == 1 and "a scale of 0.5; the layers have 1" in str(report["checks"])


def test_hashes_that_do_not_hold(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = bytearray(files["own"].read_bytes())
    raw[-3] ^= 1
    (tmp_path / "a.safetensors").write_bytes(raw)
    status, report = told(capsys, tmp_path / "a.safetensors")
    assert status == 1 and "sshs_model_hash says" in str(report["checks"])


WIDTHS = {"sd_v1": (320, 768), "sd_v2": (320, 1024), "sdxl_base_v1-0": (640, 2048)}
"""Of the second level's cross attention (SDXL has none in the first): its own, and the text's"""


@pytest.mark.parametrize("version", WIDTHS)
@pytest.mark.parametrize("more", [0, 1])
def test_without_a_base_shapes_are_those_of_the_published_models(
    version: str, more: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out, text), block = WIDTHS[version], "1" if version.startswith("sdxl") else "0"
    layer = f"lora_unet_down_blocks_{block}_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {"lora_down.weight": torch.ones(2, text), "lora_up.weight": torch.ones(out + more, 2)}
    named = {f"{layer}.{name}": tensor for name, tensor in {**tensors, "alpha": torch.tensor(1.0)}.items()}
    save_file(named, tmp_path / "a.safetensors", {"ss_base_model_version": version})
    status, report = told(capsys, tmp_path / "a.safetensors")
    states = {check["title"]: check["state"] for check in report["checks"]}
    assert states["every layer fits the model"] == ("fails" if more else "holds")
    assert states["the header tells the base that the layers are for"] == "holds"
    assert status == (1 if more else 0), report


def test_a_header_that_tells_another_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {"lora_down.weight": torch.ones(2, 768), "lora_up.weight": torch.ones(640, 2), "alpha": torch.tensor(1.0)}
    named = {f"{layer}.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / "a.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    status, report = told(capsys, tmp_path / "a.safetensors")
    assert status == 1 and "layers of such widths are for Stable Diffusion" in str(report["checks"])
