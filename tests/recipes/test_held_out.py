"""Held-out pictures and averaged weights, through the command line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune import checkpoints, cli, loop, validation


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.effect_noise((64, 64), 30 + 60 * number).convert("RGB").save(folder / f"{number}.png")
    return folder


def train(recipe: str, model: Path, pictures: Path, output: Path, *flags: str) -> None:
    given = ["--model", str(model), "--data", str(pictures), "--output", str(output), "--prompt", "sks", "--no-prior"]
    cli.main(["train", recipe, *given, "--tracker", "none", "--steps", "6", "--checkpoint-every", "2", *flags])


def log(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", "loss", "validation") if name in line} for line in lines]


def test_the_best_checkpoint_stays_and_is_named(
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Measured before the first step, every third and at each checkpoint; step 3 is the lowest and no checkpoint."""
    told = iter([0.9, 0.5, 0.1, 0.6, 0.7])
    monkeypatch.setattr(validation.Validation, "measure", lambda *given: next(told))
    run = tmp_path / "run"
    flags = ["--validation", "0.25", "--validate-every", "3", "--keep-last", "1"]
    train("lora", tiny_models["sd"], pictures, run, *flags)
    assert {line["step"]: line["validation"] for line in log(run) if "validation" in line} == {
        2: 0.5, 3: 0.1, 4: 0.6, 6: 0.7,
    }  # fmt: skip
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000006"]
    said = " ".join(capsys.readouterr().out.split())
    assert "held out" in said and "held out 0.6000" in said
    assert (
        "loss on held-out pictures at step 0: 0.9000; at step 6: 0.7000; lowest of the checkpoints at step 2: 0.5000, "
        "kept in checkpoints/step-000002"
    ) in said


def test_a_run_goes_on_with_its_average_and_its_measurements(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two measurements, and gone on: the same log, the same bytes."""
    flags = ["--validation", "0.25", "--ema", "0.9", "--lr", "1e-2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train("lora", tiny_models["sd"], pictures, whole, *flags)
    take = loop.Training._step

    def watched(self: loop.Training) -> loop.Report:
        if self.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(loop.Training, "_step", watched)
        train("lora", tiny_models["sd"], pictures, stopped, *flags)
    assert stop.value.code == 75
    cli.main(["train", "--output", str(stopped), "--resume"])
    assert log(stopped) == log(whole) and "validation" in log(whole)[-1]
    assert (stopped / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    found, _ = checkpoints.newest(stopped)
    assert found is not None
    kept = found.state["training"]
    assert list(kept["validations"]) == [0, 2, 4, 6]
    assert kept["losses"].tolist() == [line["loss"] for line in log(whole)]


def contents(tensors: dict[str, torch.Tensor]) -> set[bytes]:
    """What the tensors hold, whatever they are called."""
    return {tensor.numpy().tobytes() for tensor in tensors.values()}


@pytest.mark.parametrize("recipe", ["lora", "dreambooth"])
def test_the_average_is_what_is_exported_and_does_not_change_the_training(
    recipe: str, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    flags = ["--lr", "1e-2", "--sample-every", "3", "--sample-steps", "1", "--save-every", "3"]
    train(recipe, tiny_models["sd"], pictures, plain, *flags)
    train(recipe, tiny_models["sd"], pictures, averaged, *flags, "--ema", "0.9", "--ema-on-cpu")
    assert log(plain) == log(averaged)
    (one, _), (other, _) = checkpoints.newest(plain), checkpoints.newest(averaged)
    assert one is not None and other is not None
    state = other.state["training"]
    assert all(
        torch.equal(value, state["parameters"][name]) for name, value in one.state["training"]["parameters"].items()
    )
    assert state["average"]["steps"] == 6
    file = "adapter.safetensors" if recipe == "lora" else "model/unet/diffusion_pytorch_model.safetensors"
    assert contents(load_file(averaged / file)) == contents(state["average"]["average"])
    assert contents(load_file(averaged / file)) != contents(state["parameters"])


def test_an_average_that_cannot_be_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train("lora", tmp_path / "none", tmp_path, tmp_path / "run", "--ema", "1")
    assert stop.value.code == 2 and "--ema 1: from 0 to less than 1" in capsys.readouterr().err


def test_an_average_that_is_asked_for_later_begins_with_the_weights(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, take = tmp_path / "run", loop.Training._step
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop.Training, "_step", lambda self: take(self) if self.done < 4 else 1 / 0)
        train("lora", tiny_models["sd"], pictures, run)
    cli.main(["train", "--output", str(run), "--resume", "--allow-changed", "--ema", "0.9"])
    found, _ = checkpoints.newest(run)
    assert found is not None and found.state["training"]["average"]["steps"] == 2
