"""Launchers start what was asked for, and what they start ends with the same weights everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import apart
import forked
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from finetune import cli

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def given(model: Path, pictures: Path, output: Path) -> list[str]:
    words = ["train", "lora", "--model", str(model), "--data", str(pictures), "--output", str(output)]
    return [*words, "--prompt", "sks", "--no-prior", "--lr", "1e-2", "--steps", "3", "--tracker", "none"]


def launch(
    command: list[str], model: Path, pictures: Path, output: Path, *flags: str
) -> subprocess.CompletedProcess[str]:
    words = [*command, *given(model, pictures, output), *flags]
    return subprocess.run(words, env=dict(os.environ), capture_output=True, text=True, timeout=300)


def accelerate(tmp_path: Path, **changes: object) -> list[str]:
    """`accelerate launch` with the shipped configuration, changed as its comments say."""
    table = yaml.safe_load((ROOT / "accelerate_config.yaml").read_text())
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump({**table, "gpu_ids": "all", "main_process_port": 0, **changes}))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]


def state(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["state"]


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_two_processes_are_two_and_end_with_equal_weights(
    launcher: str, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    two = TORCHRUN if launcher == "torchrun" else accelerate(tmp_path, distributed_type="MULTI_GPU", num_processes=2)
    asserted = ["--processes", "2", "--engine", "ddp"]
    done = launch([*two, "-m", "finetune"], tiny_models["sd"], pictures, tmp_path / "run", *asserted)
    assert done.returncode == 0, done.stderr[-3000:]
    said = " ".join(done.stdout.split())
    assert "2 process(es), ddp" in said and "the trained weights are equal in all 2 processes" in said
    assert "3 of 2 pictures" in said and state(tmp_path / "run") == "finished"


def test_processes_that_trained_other_weights_fail(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """Each process's own weights are looked at here; then one number changes in one of them."""
    done = forked.run([str(tmp_path), "1", *given(tiny_models["sd"], pictures, tmp_path / "run")], 2, apart.__file__)
    one, other = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(2))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(bool(value.any()) for name, value in one.items() if "lora_B" in name), "it has trained"
    assert done.returncode == 1 and "those of process 1 are not process 0's" in done.stderr
    assert state(tmp_path / "run") == "failed" and not (tmp_path / "run" / "adapter.safetensors").exists()


@pytest.mark.slow
def test_one_process_where_two_were_asked_for_is_refused(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """`accelerate launch --cpu --num_processes 2`, and MULTI_CPU on one machine, start one and say nothing.

    (What one process says then is quickly seen in `test_processes.py`.)
    """
    one = accelerate(tmp_path, distributed_type="MULTI_CPU", use_cpu=True, num_processes=2)
    done = launch([*one, "-m", "finetune"], tiny_models["sd"], pictures, tmp_path / "run", "--processes", "2")
    assert done.returncode != 0 and "--processes 2: 1 would train" in done.stderr
    assert not (tmp_path / "run").exists()


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "lora", "--data", str(tmp_path), "--output", str(tmp_path / "run"), *flags])
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed"])
def test_another_engine_than_asked_for_is_refused(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"--engine {engine}: the engine would be single, 1 process(es)" in refused(
        capsys, tmp_path, "--engine", engine
    )


def test_an_engine_that_is_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate drops FSDP without a word on a CPU and in a single process."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "FSDP was asked for (ACCELERATE_USE_FSDP, by the launcher's configuration)" in refused(capsys, tmp_path)


def test_accumulation_by_the_launcher_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert "say --accumulation instead" in refused(capsys, tmp_path)
