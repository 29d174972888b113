"""The bench: the same work or no ratio, a training as it is, runs in turn. No time is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from finetune import cli, shelf
from finetune.bench import equal, floor, measuring, model, pictures, tables, trainers
from finetune.bench.floor import Floor
from finetune.bench.measuring import Run, Step
from finetune.bench.observer import plain
from finetune.bench.trainers import Work

SMALL = ["--resolution", "64", "--rank", "2", "--steps", "2", "--pairs", "1"]
XL = ["--against", "diffusers", "scripts", "--model", "sdxl"]
OTHER = """
import argparse
import torch
from accelerate import Accelerator

parser = argparse.ArgumentParser()
parser.add_argument("--max_train_steps", type=int)
steps = parser.parse_known_args()[0].max_train_steps
model = torch.nn.Linear(4, {outputs})
optimizer = torch.optim.AdamW(model.parameters())
accelerator = Accelerator(cpu=True)
model, optimizer = accelerator.prepare(model, optimizer)
for _ in range(steps):
    noise, at = torch.randn_like(torch.ones(2, 4, 8, 8)), torch.randint(0, 1000, (2,))
    accelerator.backward(model(noise.mean((2, 3)) * at[:, None] / 1000).square().mean())
    optimizer.step()
    optimizer.zero_grad()
"""
"""A trainer of something else, with a flag of diffusers' script"""


def test_names_of_one_parameter_are_one_name() -> None:
    named = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0_lora_down_weight"
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert plain(f"parts.unet.{layer}.lora_A.default.weight") == named
    assert plain(f"{layer}.lora_A.default.weight") == named
    assert plain(f"lora_unet_{layer.replace('.', '_')}.lora_down.weight") == named
    assert plain("parts.unet.conv_in.weight") == plain("conv_in.weight") == "conv_in_weight"


def test_runs_are_in_turn() -> None:
    assert list(measuring.alternated(3)) == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2)]


def step(folder: Path, name: str, loss: float, gradients: dict[str, Any], trained: int = 2) -> Step:
    np.savez(folder / name, **gradients)
    return Step(trained, loss, folder / name, kept=2**20, computed=100)


def test_equal_is_of_numbers_loss_and_gradients(tmp_path: Path) -> None:
    def said(loss: float, gradient: float, name: str = "w", trained: int = 2, precision: str = "fp32") -> bool:
        one = step(tmp_path, "one.npz", 1.0, {"w": np.array([3.0, 4.0])})
        other = step(tmp_path, "other.npz", 1 + loss, {name: np.array([3.0, 4.0 + 5 * gradient])}, trained)
        return equal.compare(one, other, precision).holds

    assert said(9e-6, 9e-6) and said(1e-2, 1e-2, precision="bf16")
    assert not said(1.1e-5, 0) and not said(0, 1.1e-5) and not said(0, 3e-2, precision="bf16")
    assert not said(0, 0, name="v") and not said(0, 0, trained=3)


def result(folder: Path, holds: bool) -> tables.Result:
    did = (
        step(folder, "one.npz", 1.0, {"w": np.array([1.0])}),
        step(folder, "two.npz", 1.0 if holds else 2.0, {"w": np.array([1.0])}),
    )

    def run(name: str, seconds: float) -> Run:
        times = {"step": seconds, "start": 10 * seconds, "total": 20 * seconds, "whole": 30 * seconds, "wall": 40.0}
        return Run(name, **times, peak=2**30, before=2**28, versions={"torch": "2"}, device=None)

    mine, other = [run("a", 1.0), run("a", 3.0), run("a", 2.0)], [run("b", 2.0), run("b", 4.0), run("b", 8.0)]
    runs = (mine, other) if holds else ([], [])
    floors = Floor(3 * 10**12, 2**29), None
    return tables.Result(("a", "b"), {"rank": 2}, equal.compare(*did, "fp32"), did, runs, floors, most=6e12)


def test_the_table_tells_medians_and_paired_ratios(tmp_path: Path) -> None:
    told = tables.markdown(result(tmp_path, holds=True))
    assert "| seconds a step | 2.000 s | 4.000 s | 0.50 (0.25 to 0.75) |" in told
    assert "| peak memory | 1,024 MiB | 1,024 MiB | 1.00 (1.00 to 1.00) |" in told
    assert "| kept for the backward pass | 1.0 MiB | 1.0 MiB | 1.00 |" in told


def test_time_is_told_beside_the_arithmetic_and_memory_beside_the_plan(tmp_path: Path) -> None:
    """3 TFLOP in 2 s, of 6 in a second; 768 MiB above what was there before, of 512 planned. Of others nobody knows."""
    told = tables.markdown(result(tmp_path, holds=True))
    assert "| arithmetic of a step | 3 TFLOP |  |  |" in told and "| reached | 1.5 TFLOP/s |  |  |" in told
    assert "| of 6 TFLOP/s at most | 0.25 |  |  |" in told and "| peak of tensors, planned | 512 MiB |  |  |" in told
    assert "| peak above what there was before the model / planned | 1.50 |  |  |" in told
    record = tables.record(result(tmp_path, holds=True))
    assert record["floors"] == {"a": {"flops": 3 * 10**12, "bytes": 2**29}, "b": None} and record["most"] == 6e12


def test_the_models_have_their_true_sizes() -> None:
    """The published UNets' parameters, and those of all other parts; no values are made."""

    def sizes(name: str) -> dict[str, int]:
        parts = model.MODELS[name].make(1).components
        return {
            n: sum(p.numel() for p in part.parameters()) for n, part in parts.items() if isinstance(part, nn.Module)
        }

    first = {"vae": 83_653_863, "text_encoder": 123_060_480}
    assert sizes("sd15") == {"unet": 859_520_964, **first}
    assert sizes("sdxl") == {"unet": 2_567_463_684, **first, "text_encoder_2": 694_659_840}
    assert model.MODELS["quarter"] == replace(model.MODELS["sd15"], divisor=4, resolution=256, dtype=torch.float32)


def test_a_narrow_model_is_written_as_its_files_are_published(tmp_path: Path) -> None:
    """In the precision that is asked for, the same bytes every time, and a plan is made of it."""
    narrow = replace(model.MODELS["sd15"], divisor=8)
    one, two = (model.save(tmp_path / name, narrow) for name in ("one", "two"))
    files = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
    assert [str(file.parent) for file in files] == ["text_encoder", "unet", "vae"]
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    with safe_open(one / "text_encoder" / "model.safetensors", "pt") as file:
        assert file.get_slice("text_model.final_layer_norm.weight").get_dtype() == "BF16"
        assert file.metadata() == {"format": "pt"}
    assert json.loads((one / "text_encoder" / "config.json").read_text())["architectures"] == ["CLIPTextModel"]
    subjects = pictures.squares(shelf.datasets() / "gizmo" / "pictures", tmp_path / "pictures", 64)
    work = Work(one, subjects, None, "lora", "bf16", 64, rank=2, batch=1, steps=2, seed=0)
    found = floor.of(trainers.ours(), work, tmp_path)
    assert found is not None and found.flops > 10**8 and found.bytes > 10**7
    assert floor.of(replace(trainers.ours(), own=False), work, tmp_path) is None


def test_without_the_same_work_no_ratio_is_told(tmp_path: Path) -> None:
    told = tables.markdown(result(tmp_path, holds=False))
    assert "|" not in told and "not the same work" in told and "loss apart by 5.0e-01" in told
    assert not tables.record(result(tmp_path, holds=False))["runs"]


def test_another_script_of_other_work_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is run as it is, seen, and not compared."""
    script = tmp_path / "train_dreambooth_lora.py"
    script.write_text(OTHER.format(outputs=3))
    where = ["--against", "diffusers", str(tmp_path), "--model", str(tiny_models["sd"])]
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", str(tmp_path / "out"), *SMALL, *where])
    assert ended.value.code == 1 and "do not do the same work" in capsys.readouterr().err
    told = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert told["equal"]["trained"][1] == 15 and not told["equal"]["holds"] and not told["runs"]
    mine, other = told["steps"].values()
    assert mine["kept"] > other["kept"] > 0 and mine["computed"] > other["computed"] > 10
    assert script.read_text() == OTHER.format(outputs=3)


def test_what_cannot_be_is_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", str(tmp_path / "out"), *words])
        assert ended.value.code == 2 and not (tmp_path / "out").exists()
        return " ".join(capsys.readouterr().err.split())

    assert "there is no train_dreambooth_lora.py" in refused("--against", "diffusers", str(tmp_path))
    assert "trains adapters" in refused("--against", "kohya", str(tmp_path), "--recipe", "dreambooth")
    assert "--steps 1: at least 2" in refused("--steps", "1")
    assert "another trainer" in refused("--python", "python3")
    assert "no such folder" in refused("--model", "sd14") and "Take sd15" in refused(*XL)
    assert "is there already" in refused("--model", str(tmp_path), "--divisor", "8")


def test_a_script_that_fails_is_told_with_its_last_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = tmp_path / "failing.py"
    failing.write_text("raise SystemExit('no such flag')")
    monkeypatch.setattr(measuring, "WATCHED", failing)
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", str(tmp_path / "out"), *SMALL, "--model", str(tmp_path)])
    told = capsys.readouterr().err
    assert ended.value.code == 1 and "after 0 of 2 steps" in told and "no such flag" in told


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--model", "sd15", "--divisor", "8"], ["--model", "sdxl", "--divisor", "8"]])
def test_fast_beside_plain(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["bench", str(tmp_path / "out"), *SMALL, *words])
    told = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert told["equal"]["holds"] and [run["trainer"] for run in told["runs"]] == told["trainers"]
    mine, other = told["steps"].values()
    assert mine["kept"] < 0.9 * other["kept"] and mine["computed"] < 0.95 * other["computed"]
    floors = told["floors"].values()
    assert all(floor["flops"] > 10**8 and floor["bytes"] > 2**26 for floor in floors) and told["most"] > 10**9
    assert all(run["total"] > run["start"] > run["step"] > 0 and run["peak"] > 2**26 for run in told["runs"])
    table = capsys.readouterr().out
    assert "seconds a step" in table and "TFLOP/s at most" in table and "peak of tensors, planned" in table
    assert str(tmp_path) not in (tmp_path / "out" / "bench.json").read_text()
