"""bf16 weights and the optimizer in the backward pass: the same training in less memory, through the command line."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import finetune
from finetune import checkpoints, cli, loop
from finetune.per_parameter import InBackward
from finetune.planning import tracking

EARLY = ["--optimizer-in-backward", "--max-grad-norm", "0"]
BF16 = ["--weights", "bf16", "--precision", "bf16"]
RATES = {"lion8bit": "1e-4", "schedulefree": "1e-2"}

Train = Callable[..., Path]


@pytest.fixture
def train(tiny_models: dict[str, Path], tmp_path: Path) -> Train:
    """Train all weights on three pictures of two sizes; the run's folder."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, size in enumerate([(64, 64), (128, 64), (70, 64)]):
        noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{number}.png")

    def run(name: str, *flags: str) -> Path:
        given = ["--model", str(tiny_models["sd"]), "--data", str(pictures), "--output", str(tmp_path / name)]
        given += ["--prompt", "sks", "--no-prior", "--max-upscale", "4", "--tracker", "none"]
        given += [] if "--lr" in flags else ["--lr", "1e-3"]
        given += [] if "--steps" in flags else ["--steps", "3"]
        cli.main(["train", "dreambooth", *given, *flags])
        return tmp_path / name

    return run


def log(run: Path) -> list[tuple[int, float, float, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def product(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted((run / "model").rglob("*.safetensors"))}


def state(run: Path) -> dict[str, Any]:
    found, _ = checkpoints.newest(run)
    assert found is not None
    return found.state["training"]  # type: ignore[no-any-return]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


@pytest.mark.parametrize(
    ("optimizer", "flags"),
    [
        ("adamw", ["--batch-size", "3", "--schedule", "cosine"]),
        ("adamw", [*BF16, "--accumulation", "2"]),
        ("adamw8bit", ["--accumulation", "2", "--text-encoder-lr", "1e-4"]),
        ("lion8bit", ["--gradient-checkpointing", "--text-encoder-lr", "1e-4"]),
        ("adafactor", []),
        ("came", ["--batch-size", "2"]),
        ("schedulefree", []),
    ],
)
def test_in_the_backward_pass_it_is_the_same_training_to_the_bit(
    optimizer: str, flags: list[str], train: Train
) -> None:
    """Also where a step has several passes: pictures of two sizes, or accumulated ones."""
    flags = ["--optimizer", optimizer, *flags, "--max-grad-norm", "0", "--lr", RATES.get(optimizer, "1e-3")]
    plain, early = train("plain", *flags), train("early", *flags, "--optimizer-in-backward")
    assert len(log(plain)) == 3 and log(plain) == log(early)
    assert product(plain) and product(plain) == product(early)
    assert same(state(plain), state(early))


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    take = loop.Training._step

    def watched(self: loop.Training) -> loop.Report:
        if self.done == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self)

    monkeypatch.setattr(loop.Training, "_step", watched)


@pytest.mark.parametrize(
    ("flags", "resumed"),
    [
        ([*BF16, "--optimizer", "adamw"], []),
        ([*BF16, *EARLY, "--optimizer", "adamw8bit"], []),
        ([*EARLY, "--optimizer", "came"], ["--no-optimizer-in-backward"]),
    ],
)
def test_stopped_and_resumed_is_the_same_to_the_bit(
    flags: list[str], resumed: list[str], train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where the optimizer steps after the backward pass from then on."""
    whole = train("whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_at(2, patch)
        train("stopped", *flags)
    assert stop.value.code == 75
    stopped = tmp_path / "stopped"
    weights = {value.dtype for value in state(stopped)["parameters"].values()}
    assert weights == {torch.bfloat16 if "--weights" in flags else torch.float32}
    cli.main(["train", "--output", str(stopped), "--resume", *resumed])
    assert log(stopped) == log(whole) and product(stopped) == product(whole)
    assert same(state(stopped), state(whole))


def test_bf16_weights_learn_what_float32_weights_do(train: Train) -> None:
    """Every step draws the same in both. The file holds what was trained, unrounded."""
    flags = ["--precision", "bf16", "--steps", "18", "--batch-size", "3", "--lr", "2e-3"]
    wide, narrow = train("wide", *flags), train("narrow", *flags, "--weights", "bf16")
    curves = [[loss for _, loss, _, _ in log(run)] for run in (wide, narrow)]
    first, last = (sum(curves[0][at]) / 6 for at in (slice(0, 6), slice(12, 18)))
    assert last < 0.9 * first
    assert sum(curves[1][12:]) / 6 == pytest.approx(last, abs=0.1 * (first - last))
    norms = [[norm for _, _, norm, _ in log(run)] for run in (wide, narrow)]
    assert norms[0] == pytest.approx(norms[1], rel=0.2)
    weights = load_file(narrow / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[name.removeprefix("unet.")], v) for name, v in state(narrow)["parameters"].items())


def peak(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the weights that train, and the most bytes that the last step has beside what is there before it."""
    take, seen = loop.Training._step, [0, 0]

    def watched(self: loop.Training) -> loop.Report:
        if self.done < 1:
            return take(self)
        reports: list[loop.Report] = []
        held = tracking.measured(lambda: reports.append(take(self)), torch.device("cpu"))
        seen[:] = sum(p.nbytes for p in self.parameters.values()), held
        return reports[0]

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_step", watched)
        run()
    return seen[0], seen[1]


def test_weights_take_half_the_memory_and_gradients_next_to_none(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured by the profiler. The tiny model's largest gradient is a ninth of all."""
    flags = ["--steps", "2", "--max-grad-norm", "0", "--gradient-checkpointing", "--optimizer", "adamw"]
    weights, plain = peak(monkeypatch, lambda: train("plain", *flags))
    same_weights, early = peak(monkeypatch, lambda: train("early", *flags, "--optimizer-in-backward"))
    half, both = peak(monkeypatch, lambda: train("both", *flags, *BF16, "--optimizer-in-backward"))
    assert weights == same_weights == 2 * half
    assert plain > weights  # all gradients, and activations
    assert early < plain - 0.6 * weights
    assert both < plain - 0.6 * weights


def spoil(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """An infinite gradient, once: the `number`th that is complete in the step."""
    take, left = InBackward._take, [True]

    def broken(self: InBackward, parameter: nn.Parameter) -> None:
        done = self.optimizer.own[next(iter(self.optimizer.own))].state
        steps = max((int(told["step"]) for told in done.values()), default=0)
        if left[0] and steps == step - 1 and len(self.norms) == number - 1:
            left[0] = False
            parameter.grad.fill_(float("inf"))  # type: ignore[union-attr]
        take(self, parameter)

    monkeypatch.setattr(InBackward, "_take", broken)


def test_a_state_that_has_half_stepped_is_not_kept(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--checkpoint-every", "1", *EARLY, "--optimizer", "adamw"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        spoil(patch, 3, 20)
        train("run", *flags)
    said = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 1
    assert "step 3: the loss is" in said and "norm inf" in said and '.png: "sks"' in said
    assert "had stepped some weights already, so only the last checkpoint is kept" in said
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    cli.main(["train", "--output", str(tmp_path / "run"), "--resume"])
    whole = train("whole", *flags)
    assert product(tmp_path / "run") == product(whole) and log(tmp_path / "run") == log(whole)


def test_a_gradient_that_is_first_and_not_finite_leaves_a_state_to_keep(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        spoil(patch, 3, 1)
        train("run", "--checkpoint-every", "0", *EARLY, "--optimizer", "adamw")
    assert "the step was not applied" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()


def test_rollback_goes_on_from_the_last_checkpoint(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint-every", "2", *EARLY, *BF16, "--optimizer", "adamw", "--on-nan", "rollback"]
    with monkeypatch.context() as patch:
        spoil(patch, 3, 20)
        run = train("run", *flags)
    assert "back to step 2, on at 0.5 of the rate" in " ".join(capsys.readouterr().out.split())
    assert [(step, lr) for step, _, _, lr in log(run)] == [(1, 1e-3), (2, 1e-3), (3, 5e-4)]
    assert all(value.isfinite().all() for value in state(run)["parameters"].values())


@pytest.mark.parametrize(
    ("recipe", "flags", "said"),
    [
        ("dreambooth", ["--optimizer-in-backward"], "--max-grad-norm 1: the norm is known when .* --max-grad-norm 0"),
        ("dreambooth", [*EARLY, "--optimizer", "prodigy", "--lr", "1"], "in-backward --optimizer prodigy: .*one rate"),
        (
            "dreambooth",
            [*BF16, "--optimizer", "prodigy", "--lr", "1"],
            "--weights bf16 --optimizer prodigy: .*one rate",
        ),
        ("dreambooth", ["--weights", "bf16"], "--weights bf16 --precision fp32: .*Say --precision bf16"),
        ("dreambooth", [*BF16, "--optimizer", "schedulefree"], "--optimizer schedulefree: .*Say --weights fp32"),
        ("lora", ["--weights", "bf16"], "--weights"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    recipe: str,
    flags: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(finetune, "load", None)
    words = [
        "--model",
        "toybox",
        "--measure",
        "off",
        "--data",
        str(Path(__file__).parents[2] / "datasets" / "gizmo" / "pictures"),
    ]
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", recipe, *words, "--output", str(tmp_path / "run"), "--prompt", "sks", "--no-prior", *flags])
    assert stop.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(said, told), told
    assert not (tmp_path / "run").exists()
