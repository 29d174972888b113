"""`finetune inspect`: what any weight file is, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import foreign
import live
import original
import pytest
import tiny
import torch
from safetensors.torch import save_file

from finetune import cli, export
from finetune.export import formats

FILE_KEYS = {"file", "what", "format", "family", "bytes", "tensors", "parts", "precisions", "metadata", "problems"}
MORE_KEYS = FILE_KEYS | {"base", "base_version", "title", "trigger", "words", "settings", "hashes"}
ADAPTER_KEYS = MORE_KEYS | {"kinds", "layers", "ranks", "alphas", "norms"}


def told(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    capsys.readouterr()
    cli.main(["inspect", str(path), "--json"])
    return dict(json.loads(capsys.readouterr().out))


def test_our_own_adapter(tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.safetensors"
    family = live.adapted(tiny_models["sdxl"], text=True)
    settings = {"model": {"model": "toybox"}, "data": {"trigger": "sks"}, "adapter": {"rank": 4}}
    export.adapter(family, file, settings=settings, form="kohya")
    found = told(capsys, file)
    assert set(found) == ADAPTER_KEYS
    assert (found["what"], found["format"], found["family"]) == ("adapter", "kohya", "Stable Diffusion XL")
    assert (found["base"], found["base_version"], found["trigger"]) == ("toybox", "sdxl_base_v1-0", "sks")
    assert found["kinds"] == {"LoRA": found["layers"]} and found["layers"] == sum(found["parts"].values())
    assert found["ranks"] == [{"rank": 4, "layers": found["layers"]}]
    assert found["alphas"] == [{"alpha": 2.0, "layers": found["layers"]}]
    assert found["problems"] == [] and [one["holds"] for one in found["hashes"]] == [True] * 3
    assert found["settings"]["rank"] == 4

    norms = {row["block"]: row["norm"] for row in found["norms"]}
    changes = [layer.change() for layer in formats.read(file) if layer.name.startswith("unet.mid_block.")]
    assert norms["unet.mid_block"] == pytest.approx(torch.cat([c.flatten() for c in changes]).norm().item(), rel=1e-5)
    assert {"text_encoder", "text_encoder_2", "unet.down_blocks.1", "unet.up_blocks.0"} <= set(norms)

    cli.main(["inspect", str(file)])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for expected in ("LoRA", "Stable Diffusion XL", "sks", "unet.mid_block", "modelspec.architecture", "holds"):
        assert expected in text


def test_foreign_adapters(tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loha = told(capsys, foreign.write(tiny_models["sd"], tmp_path / "a.safetensors", form="loha"))
    assert loha["kinds"] == {"LoHa": loha["layers"]} and loha["hashes"] == []
    assert loha["norms"][0]["norm"] > 0
    mixed = told(capsys, foreign.write(tiny_models["sd"], tmp_path / "b.safetensors", layers="locon", alphas="each"))
    assert {row["alpha"] for row in mixed["alphas"]} == {1.0, 2.0, 3.0}
    sound = foreign.write(tiny_models["sd"], tmp_path / "c.safetensors")
    broken = told(capsys, foreign.changed(sound, "renamed key", tmp_path / "d.safetensors"))
    assert set(broken) == MORE_KEYS and (broken["what"], broken["format"]) == ("adapter", "kohya")
    assert "lora_donw.weight" in broken["problems"][0]


def test_checkpoints_folders_and_embeddings(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = told(capsys, original.save(tiny.pipeline("sd"), tmp_path / "sd.safetensors"))
    assert (checkpoint["what"], checkpoint["format"]) == ("checkpoint", "single-file")
    sizes = {name: sum(p.numel() for p in getattr(tiny.pipeline("sd"), name).parameters()) for name in ("unet", "vae")}
    assert {name: checkpoint["parts"][name] for name in sizes} == sizes

    folder = told(capsys, tiny_models["sd-v"])
    assert set(folder) == FILE_KEYS | {"scheduler"}
    assert (folder["what"], folder["family"]) == ("model", "Stable Diffusion")
    assert folder["scheduler"]["prediction"] == "v_prediction" and set(folder["parts"]) == {
        "unet", "vae", "text_encoder"
    }  # fmt: skip

    save_file({"clip_l": torch.zeros(3, 768), "clip_g": torch.zeros(3, 1280)}, tmp_path / "ti.safetensors")
    embedding = told(capsys, tmp_path / "ti.safetensors")
    assert (embedding["what"], embedding["parts"]) == ("textual inversion", {"clip_g": 3, "clip_l": 3})

    part = told(capsys, tiny_models["sd"] / "unet" / "diffusion_pytorch_model.safetensors")
    assert part["what"] == "part of a diffusers model"
    save_file({"a": torch.zeros(3, 3, 3), "b": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert told(capsys, tmp_path / "x.safetensors")["what"] == "unknown"
    for path in (tmp_path / "sd.safetensors", tiny_models["sd-v"], tmp_path / "ti.safetensors"):
        cli.main(["inspect", str(path)])
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a.pt", tmp_path / "empty", tmp_path / "nowhere.safetensors"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["inspect", str(path)])
        assert stop.value.code == 2 and str(path.name) in capsys.readouterr().err.replace("\n", "")


def test_what_a_foreign_header_says_is_only_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither markup nor a terminal's commands are obeyed."""
    save_file({"a": torch.zeros(3, 3, 3)}, tmp_path / "a.safetensors", {"[bold]x": "[/nothing] \x1b[2J\x1b[31mred"})
    cli.main(["inspect", str(tmp_path / "a.safetensors")])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "[bold]x" in shown and "[/nothing]" in shown
