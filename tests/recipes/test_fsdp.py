"""FSDP2 through Accelerate, in two processes on the CPU (see tests/sharded.py): what it trains, keeps and exports."""

from __future__ import annotations

import json
import subprocess
import warnings
from pathlib import Path

import forked
import numpy as np
import pytest
import sharded
import stopping
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from finetune import cli, loop

SCRIPT = str(Path(sharded.__file__))
UNET = "model/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two sizes: what falls on a process makes one pass or several, which FSDP must even out."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(128, 128), (256, 64), (250, 64)]):
        noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def words(recipe: str, model: Path, pictures: Path, output: Path, *flags: str) -> list[str]:
    given = ["train", recipe, "--model", str(model), "--data", str(pictures), "--output", str(output), "--tracker"]
    return [*given, "none", "--prompt", "sks", "--no-prior", "--lr", "1e-3", "--resolution", "128", *flags]


def shared_out(given: list[str], stop: int = 0) -> str:
    """What two processes say. Torch crashed in one of them once (SIGSEGV), and not again when the cause was looked
    for: then the run goes on by `--resume`, as any killed one, and the trace is shown among the warnings.
    """
    done = _launched(given, stop)
    if done.returncode and "(SIGSEGV)" in done.stderr:
        warnings.warn(f"two processes of FSDP on gloo: {done.stderr}", stacklevel=2)
        done = _launched(["train", "--output", given[given.index("--output") + 1], "--resume"], stop)
    assert (done.returncode == 0) == (stop == 0), f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert not stop or f"after step {stop} of" in done.stderr, done.stderr[-3000:]
    return " ".join(done.stdout.split())


def _launched(given: list[str], stop: int) -> subprocess.CompletedProcess[str]:
    asserted = ["--processes", "2", "--engine", "fsdp", "--accumulation", "1"]
    return forked.run([str(stop), *given, *asserted], 2, SCRIPT)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def stopped_alone(words: list[str], step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process, which takes two passes a step, up to a step."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(loop.Training, "_step", stopping.at(step))
        cli.main([*words, "--accumulation", "2", "--processes", "1", "--engine", "single"])
    assert stop.value.code == 75


def require_alike(one: Path, other: Path, *files: str) -> None:
    assert len(losses(one)) == 3 and losses(one) == pytest.approx(losses(other), abs=1e-5)
    for name in (*files, "checkpoints/step-000003/state.safetensors"):
        first, second = (load_file(run / name) for run in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first), name


def test_two_processes_share_out_what_one_began_and_end_as_it_does(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights of the UNet; an export and a sample on the way. The last checkpoints hold the same whole tensors."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    flags = ["--steps", "3", "--save-every", "2", "--sample-every", "2", "--sample-steps", "1"]
    cli.main([*words("dreambooth", tiny_models["sd"], pictures, whole, *flags), "--accumulation", "2"])
    stopped_alone(words("dreambooth", tiny_models["sd"], pictures, moved, *flags), 1, monkeypatch)
    said = shared_out(["train", "--output", str(moved), "--resume"])
    assert "adamw, fp32, cpu:0, 2 process(es), fsdp" in said and "goes on after step 1" in said
    require_alike(whole, moved, UNET, UNET.replace("model/", "model-000002/"))
    configs = [(run / "model" / "unet" / "config.json").read_text() for run in (whole, moved)]
    assert configs[0] == configs[1] and '"UNet2DConditionModel"' in configs[0]
    assert (moved / "samples" / "step-000002-0.png").is_file()


@pytest.mark.slow
def test_two_one_and_two_processes_go_on_with_each_others_checkpoints(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UNet and text encoder, activations recomputed, parts of a step that make one pass or two."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    flags = ["--steps", "3", "--batch-size", "2", "--text-encoder-lr", "1e-4", "--gradient-checkpointing"]
    cli.main([*words("dreambooth", tiny_models["sd"], pictures, whole, *flags), "--accumulation", "2"])
    shared_out(words("dreambooth", tiny_models["sd"], pictures, moved, *flags), stop=1)
    stopped_alone(["train", "--output", str(moved), "--resume"], 2, monkeypatch)
    shared_out(["train", "--output", str(moved), "--resume"])
    require_alike(whole, moved, UNET, "model/text_encoder/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "precision"), [("lora", "fp32"), ("dreambooth", "bf16")])
def test_adapters_and_bf16_train_the_same_as_in_one_process(
    recipe: str, precision: str, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    flags = ["--steps", "4", "--precision", precision, "--save-every", "2"]
    one, two = tmp_path / "one", tmp_path / "two"
    cli.main([*words(recipe, tiny_models["sd"], pictures, one, *flags), "--accumulation", "2"])
    shared_out(words(recipe, tiny_models["sd"], pictures, two, *flags))
    assert losses(one) == pytest.approx(losses(two), abs=1e-5 if precision == "fp32" else 1e-3)


@pytest.mark.parametrize(
    ("environment", "flags", "said"),
    [
        ({"FSDP_VERSION": "1"}, [], "fsdp_version 1: say `fsdp_version: 2`"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, [], "say --gradient-checkpointing"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, [], "fsdp_offload_params: not supported"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, [], "say TRANSFORMER_BASED_WRAP"),
        ({}, ["--optimizer", "adamw8bit"], "--optimizer adamw8bit: not with an engine that shares out its state"),
        ({}, ["--engine", "ddp"], "--engine ddp: the engine would be fsdp"),
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
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(AcceleratorState, "__init__", sharded.believing)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "dreambooth", "--data", str(tmp_path), "--output", str(tmp_path / "run"), *flags])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
