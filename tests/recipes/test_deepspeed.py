"""DeepSpeed's ZeRO through `accelerate launch`, in two processes on the CPU (see tests/zeroed.py): what it trains and
keeps, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import poisoned
import pytest
import stopping
import torch
import yaml
import zeroed
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from finetune import checkpoints, cli, loop

ROOT = Path(__file__).parents[2]
UNET, ADAPTER = "model/unet/diffusion_pytorch_model.safetensors", "adapter.safetensors"
installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install 'finetune-kit[deepspeed]'"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two sizes: what falls on a process makes one pass or several, which stage 2 must even out."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(128, 128), (256, 64), (250, 64)]):
        noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def words(recipe: str, model: Path, pictures: Path, output: Path, *flags: str) -> list[str]:
    given = ["train", recipe, "--model", str(model), "--data", str(pictures), "--output", str(output), "--tracker"]
    return [*given, "none", "--prompt", "sks", "--no-prior", "--lr", "1e-3", "--resolution", "128", *flags]


def zero(given: list[str], tmp_path: Path, stage: int = 2, stop: int = 0, status: int = 0) -> str:
    """`accelerate launch` with the shipped configuration, changed as its comments say. What was said."""
    table = yaml.safe_load((ROOT / "accelerate_config.yaml").read_text())
    table |= {"distributed_type": "DEEPSPEED", "num_processes": 2, "gpu_ids": "all", "main_process_port": 0}
    file = tmp_path / f"zero{stage}.yaml"
    file.write_text(yaml.safe_dump({**table, "deepspeed_config": {"zero_stage": stage}}))
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(file), zeroed.__file__, str(stop)]
    command = [sys.executable, *launch, *given, "--processes", "2", "--engine", "deepspeed"]
    told = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=told, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == (stop == status == 0), done.stderr[-5000:]
    assert not stop or f"after step {stop} of" in done.stderr, done.stderr[-5000:]
    return " ".join(f"{done.stdout} {done.stderr}".split())


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def norms(run: Path) -> list[float]:
    return [json.loads(line)["grad_norm"] for line in (run / "log.jsonl").read_text().splitlines()]


def stopped_alone(words: list[str], step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process, which takes two passes a step, up to a step."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(loop.Training, "_step", stopping.at(step))
        cli.main([*words, "--accumulation", "2", "--processes", "1", "--engine", "single"])
    assert stop.value.code == 75


def require_alike(one: Path, other: Path, steps: int, *files: str) -> None:
    assert len(losses(one)) == steps and losses(one) == pytest.approx(losses(other), abs=1e-5)
    assert norms(one) == pytest.approx(norms(other), rel=1e-4), "clipped alike"
    for name in (*files, f"checkpoints/step-{steps:06d}/state.safetensors"):
        first, second = (load_file(run / name) for run in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first), name


@installed
def test_two_processes_share_out_what_one_began_and_end_as_it_does(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights of the UNet, clipped, with an average; an export on the way. The last checkpoints hold the same."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    flags = ["--steps", "4", "--save-every", "3", "--ema", "0.5", "--max-grad-norm", "0.05", "--schedule", "cosine"]
    cli.main([*words("dreambooth", tiny_models["sd"], pictures, whole, *flags), "--accumulation", "2"])
    stopped_alone(words("dreambooth", tiny_models["sd"], pictures, moved, *flags), 2, monkeypatch)
    said = zero(["train", "--output", str(moved), "--resume", "--accumulation", "1"], tmp_path)
    assert "adamw, fp32, cpu:0, 2 process(es), deepspeed" in said and "goes on after step 2" in said
    assert "the trained weights are equal in all 2 processes" in said
    require_alike(whole, moved, 4, UNET, UNET.replace("model/", "model-000003/"))


@installed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_two_one_and_two_processes_go_on_with_each_others_checkpoints(
    stage: int, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UNet and text encoder, each at its rate; activations recomputed; gradients of several passes."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    flags = ["--steps", "3", "--batch-size", "1", "--text-encoder-lr", "1e-4", "--gradient-checkpointing"]
    cli.main([*words("dreambooth", tiny_models["sd"], pictures, whole, *flags), "--accumulation", "4"])
    begun = [*words("dreambooth", tiny_models["sd"], pictures, moved, *flags), "--accumulation", "2"]
    zero(begun, tmp_path, stage, stop=1)
    stopped_alone(["train", "--output", str(moved), "--resume", "--batch-size", "2"], 2, monkeypatch)
    zero(["train", "--output", str(moved), "--resume"], tmp_path, stage)
    require_alike(whole, moved, 3, UNET, "model/text_encoder/model.safetensors")


@installed
@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "precision"), [("lora", "fp32"), ("lora", "bf16"), ("dreambooth", "bf16")])
def test_adapters_and_bf16_train_the_same_as_in_one_process(
    recipe: str, precision: str, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """The frozen weights of an adapter are bf16 there. Samples are drawn, held-out pictures measured, on the way."""
    flags = ["--steps", "4", "--precision", precision, "--sample-every", "2", "--sample-steps", "1"]
    flags += ["--validation", "0.34", "--checkpoint-every", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    cli.main([*words(recipe, tiny_models["sd"], pictures, one, *flags), "--accumulation", "2"])
    zero(words(recipe, tiny_models["sd"], pictures, two, *flags), tmp_path)
    assert losses(one) == pytest.approx(losses(two), abs=1e-5 if precision == "fp32" else 1e-3)
    assert (two / "samples" / "step-000002-0.png").is_file()


@installed
@pytest.mark.slow
def test_nan_is_refused_before_the_step_and_gone_back_from(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the fourth step, of one process: back to the checkpoint of the second, on at half the rate, as alone."""
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--steps", "5", "--checkpoint-every", "2", "--on-nan", "rollback"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_accumulate", poisoned.gradient(averaged=False))
        cli.main([*words("lora", tiny_models["sd"], pictures, one, *flags), "--accumulation", "2"])
    monkeypatch.setenv("NAN", "once")
    assert "back to step 2, on at 0.5 of the rate" in zero(
        words("lora", tiny_models["sd"], pictures, two, *flags), tmp_path
    )
    require_alike(one, two, 5, ADAPTER)
    stopped = tmp_path / "stopped"
    said = zero([*words("lora", tiny_models["sd"], pictures, stopped, *flags[:4])], tmp_path, status=1)
    assert "step 4: the loss is" in said and "the step was not applied" in said
    found, _ = checkpoints.newest(stopped)
    assert found is not None and found.step == 3
    assert all(value.isfinite().all() for value in found.state["training"]["parameters"].values())


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "lora", "--data", str(tmp_path), "--output", str(tmp_path / "run"), *flags])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    return " ".join(capsys.readouterr().err.split())


def test_what_is_not_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "deepspeed" else find(name))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "is not installed: `pip install 'finetune-kit[deepspeed]'`" in refused(tmp_path, capsys)


@installed
@pytest.mark.parametrize(
    ("environment", "flags", "said"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, [], "zero_stage 3: DeepSpeed's stages 1 and 2"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, [], "Take FSDP2 (`--engine fsdp`)"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, [], "zero_stage 0"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, [], "offload_optimizer_device"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, [], "say --max-grad-norm instead"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, [], "say --accumulation"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "offload"}, [], "offload_optimizer_device, offload_param_device"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "optimizer"}, [], "say --optimizer instead"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "bf16"}, [], "say --precision bf16 instead"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "fp16"}, [], "Say --precision bf16"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "accumulation"}, [], "say --accumulation"),
        ({}, ["--optimizer", "adamw8bit"], "--optimizer adamw8bit: not with an engine that shares out its state"),
        ({}, ["--engine", "fsdp"], "--engine fsdp: the engine would be deepspeed"),
    ],
)
def test_what_it_cannot_do_is_refused_before_a_model_is_loaded(
    environment: dict[str, str],
    flags: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = {
        "offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "optimizer": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}},
        "bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
        "fp16": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}},
        "accumulation": {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4},
    }
    for name, value in (ZERO | environment).items():
        if value in own:
            (tmp_path / "zero.json").write_text(json.dumps(own[value]))
            value = str(tmp_path / "zero.json")
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(AcceleratorState, "__init__", zeroed.believing)
    assert said in refused(tmp_path, capsys, *flags)
