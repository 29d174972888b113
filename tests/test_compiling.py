"""`--compile`: the blocks' steps are compiled, whole, and learn what they learn as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from finetune import cli, optim
from finetune.errors import Fault
from finetune.fast import compiling
from finetune.settings import Full, Optim, Train

Training = Callable[..., Path]


@pytest.fixture
def train(tiny_models: dict[str, Path], tmp_path: Path) -> Training:
    for number, size in enumerate([(64, 64), (128, 64)]):
        noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{number}.png")

    def run(name: str, kind: str, *flags: str) -> Path:
        given = ["--model", str(tiny_models[kind]), "--data", str(tmp_path / "pictures"), "--output"]
        given += [str(tmp_path / name), "--prompt", "sks", "--steps", "3", "--resolution", "64", "--tracker", "none"]
        cli.main(["train", "lora", *given, "--lr", "1e-2", "--rank", "2", *flags])
        return tmp_path / name

    return run


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def assert_the_same(one: Path, other: Path) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    ours, theirs = (load_file(run / "adapter.safetensors") for run in (one, other))
    assert all((ours[name] - theirs[name]).norm() <= 1e-3 * theirs[name].norm() for name in theirs)


BASE = ["--prior-from", "base", "--class-prompt", "dog", "--sample-every", "2", "--sample-steps", "2"]


@pytest.mark.parametrize(
    ("kind", "kinds", "by", "flags"),
    [
        ("sd", ["BasicTransformerBlock"], "eager", ["--no-prior", "--limit", "1"]),
        pytest.param("sd", [], "aot_eager", [*BASE, "--gradient-checkpointing"], marks=pytest.mark.slow),
        pytest.param("flux", [], "aot_eager", ["--no-prior"], marks=pytest.mark.slow),
    ],
)
def test_what_is_learned_is_the_same(
    kind: str, kinds: list[str], by: str, flags: list[str], train: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced by PyTorch's compiler without a break (the slow ones differentiated too), only not made machine code."""
    flags = [*flags, "--dropout", "0.1"]
    plain = train("plain", kind, *flags)
    made, compile_ = CompileCounterWithBackend(by), torch.compile
    told: list[dict[str, Any]] = []

    def traced(forward: Any, **how: Any) -> Any:
        told.append(how)
        return compile_(forward, backend=made, fullgraph=True, recompile_limit=how["recompile_limit"])

    monkeypatch.setattr(torch, "compile", traced)
    if kinds:
        monkeypatch.setattr(UNet2DConditionModel, "_no_split_modules", kinds)
    torch.compiler.reset()
    compiled = train("compiled", kind, *flags, "--compile", "blocks")
    assert_the_same(compiled, plain)
    assert 0 < made.frame_count <= compiling.SHAPES and len(told) > 1
    assert all(how == {"mode": "default", "recompile_limit": compiling.SHAPES} for how in told)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles by a C++ compiler")
def test_compiled_to_machine_code(train: Training) -> None:
    torch.compiler.reset()
    assert_the_same(train("compiled", "sd", "--no-prior", "--compile", "blocks"), train("plain", "sd", "--no-prior"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


def test_blocks_are_compiled_where_they_learn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs overwrite what no backward pass waits for, and gradients that were not there before."""
    called: list[nn.Module] = []

    def counted(forward: Any, **how: Any) -> Any:
        assert how["mode"] == "reduce-overhead"
        return partial(_called, called, forward)

    monkeypatch.setattr(torch, "compile", counted)
    first, one, other = (Block() for _ in range(3))
    model, x = nn.Sequential(first, one, other), torch.ones(1, 2)
    first.requires_grad_(False)
    learn = [*one.parameters(), *other.parameters()]
    blocks = compiling.Blocks([first, one, other], "graphs", [*learn, *first.parameters()])
    expected = torch.autograd.grad(model(x).sum(), learn)
    assert not called
    with blocks:
        held = [parameter.grad for parameter in learn]
        with torch.no_grad():
            model(x)
        assert not called
        model(x).sum().backward()
    assert called == [one, other]
    assert all(p.grad is g for p, g in zip(learn, held, strict=True)) and first.layer.weight.grad is None
    torch.testing.assert_close(held, list(expected))
    model(x)
    assert len(called) == 2 and not any("forward" in vars(module) for module in model.modules())


def _called(called: list[nn.Module], forward: Any, *given: Any) -> Any:
    called.append(forward.__self__)
    return forward(*given)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora", "--compile", "graphs"], "CUDA graphs need a GPU"),
        (["lora", "--compile", "blocks"], "Install g++"),
        (["lora", "--compile", "blocks", "--offload-blocks"], "would be compiled each time"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *words, "--no-prior", "--data", str(tmp_path), "--output", str(tmp_path / "run")])
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_gradients_that_are_given_back_are_no_graphs() -> None:
    early, train = Full(optimizer_in_backward=True), Train(compile="graphs")
    with pytest.raises(Fault, match="gradients that stay where they are"):
        optim.check_full(early, Optim(max_grad_norm=0), train, Accelerator(cpu=True))
