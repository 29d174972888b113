"""Out of memory: where it was and what to change are said, nothing is skipped, and the run goes on from its state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune import class_pictures, cli, generate, loop, memory, sampling, shelf
from finetune.config import parse
from finetune.export import stream
from finetune.families import Source

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 8 GiB")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.")
MPS = RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB, max allowed: 9.07 GB).")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.effect_noise((64, 64), 30 + 60 * number).convert("RGB").save(folder / f"{number}.png")
    return folder


def words(model: Path, pictures: Path, output: Path, *flags: str) -> list[str]:
    given = ["--model", model, "--data", pictures, "--output", output, "--prompt", "sks dog", "--tracker", "none"]
    given += ["--steps", "4", "--checkpoint-every", "2", "--rank", "4", "--dropout", "0.2", "--max-upscale", "4"]
    return ["train", "lora", *map(str, given), *flags]


def failed(capsys: pytest.CaptureFixture[str], *asked: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(asked)
    assert stop.value.code == 1
    return " ".join(capsys.readouterr().err.split())


def raising(error: BaseException, when: Callable[..., bool] = lambda *given: True, real: object = None) -> object:
    def planted(*given: object, **options: object) -> object:
        if when(*given):
            raise error
        return real(*given, **options)  # type: ignore[operator]

    return planted


def test_in_training_the_state_is_kept_and_goes_on_with_less(
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, whole, two = tmp_path / "run", tmp_path / "whole", ("--no-prior", "--batch-size", "2", "--accumulation", "2")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_accumulate", raising(CUDA, lambda *given: given[2] == 2, loop._accumulate))
        said = failed(capsys, *words(tiny_models["sd"], pictures, run, *two))
    assert "Out of memory while training (CUDA out of memory. Tried to allocate 2.00 GiB.)" in said
    assert "the last checkpoint is kept" in said and f"finetune train --output {run} --resume" in said
    offered = ["--gradient-checkpointing", "--batch-size 1 --accumulation 4", "--optimizer adamw8bit", "--resolution"]
    places = [said.index(f"- {flag}" if flag[2] != "r" else flag) for flag in offered]
    assert places == sorted(places) and "a quarter of AdamW's state (in a new run)" in said
    entry = json.loads((run / "run.json").read_text())
    assert (entry["state"], entry["step"]) == ("failed", 2)
    cli.main(["train", "--output", str(run), "--resume", "--gradient-checkpointing"])
    cli.main(words(tiny_models["sd"], pictures, whole, *two))
    one, other = (load_file(folder / "adapter.safetensors") for folder in (run, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("place", "name", "error", "doing", "advice"),
    [
        (Source, "_load", CPU, "loading the model", "--precision bf16"),
        (class_pictures, "sample", MemoryError(), "drawing class pictures", "--prior-from base"),
        (sampling, "sample", MPS, "sampling", "--sample-every 0"),
        (stream, "write", OSError(12, "Cannot allocate memory"), "exporting", "less beside it"),
    ],
)
def test_elsewhere_it_is_said_where_and_what_helps_there(
    place: object,
    name: str,
    error: BaseException,
    doing: str,
    advice: str,
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(place, name, raising(error))
    prior = ["--class-prompt", "a dog", "--class-images", "1", "--class-steps", "1"]
    flags = prior if place is class_pictures else ["--no-prior", "--sample-every", "2" if place is sampling else "0"]
    said = failed(capsys, *words(tiny_models["sd"], pictures, tmp_path / "run", *flags))
    assert f"Out of memory while {doing} (" in said and advice in said
    entry = tmp_path / "run" / "run.json"
    assert not entry.exists() or json.loads(entry.read_text())["state"] == "failed"


def test_drawing_says_it_too(tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(generate, "_draw", raising(CUDA))
    asked = ["--model", str(tiny_models["sd"]), "--prompt", "a dog", "--output", str(tmp_path / "out")]
    said = failed(capsys, "generate", *asked)
    assert "Out of memory while drawing" in said and "--batch 1" in said and "a smaller --size" in said


def test_only_what_is_left_to_change_is_offered(tmp_path: Path) -> None:
    flags = [
        "--gradient-checkpointing",
        "--optimizer",
        "came",
        "--precision",
        "bf16",
        "--rank",
        "4",
        "--quantize",
        "nf4",
    ]
    asked = ["--data", "x", "--output", str(tmp_path), "--resolution", "512", "768", *flags]
    config = parse(shelf.load("lora").Config, asked, "train")
    offered = [remedy.text for remedy in memory.remedies(config, "training")]
    assert offered == ["a smaller --resolution than 768", "less beside it: other programs that use the same memory"]
    config = parse(shelf.load("dreambooth").Config, ["--data", "x", "--output", str(tmp_path)], "train")
    assert any("the recipe lora" in remedy.text for remedy in memory.remedies(config, "training"))


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory.told(None):
        raise RuntimeError("shapes cannot be multiplied")
    with pytest.raises(FileNotFoundError), memory.told(None):
        Path("/no/such/file").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is measured and set as on Linux")
def test_where_the_memory_really_ends(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = words(tiny_models["sd"], pictures, run, "--no-prior", "--resolution", "256", "--batch-size", "3")
    command = [sys.executable, str(Path(__file__).with_name("short.py")), *asked]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    said = " ".join(done.stderr.split())
    assert done.returncode == 1 and "Out of memory while training (" in said, said
    assert "Go on with" in said and "--batch-size 1 --accumulation 3" in said and "Traceback" not in said
    assert json.loads((run / "run.json").read_text())["state"] == "failed"
    cli.main(["train", "--output", str(run), "--resume", "--batch-size", "1", "--accumulation", "3"])
    assert json.loads((run / "run.json").read_text())["state"] == "finished"
