"""A run that is stopped says how to go on, and is gone on with only as it was: through the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune import checkpoints, cli, loop


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures of two sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (128, 64), (70, 64)]):
        noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks dog, red, number {number}")
    return folder


def train(recipe: str, model: Path, pictures: Path, output: Path, *flags: str) -> None:
    given = ["--model", str(model), "--data", str(pictures), "--output", str(output), "--tracker", "none"]
    prior = ["--class-prompt", "a dog", "--class-images", "2", "--class-steps", "1", "--max-upscale", "4"]
    varied = ["--flip", "--shuffle-tags", "--caption-dropout", "0.2"]
    varied += [] if "--lr" in flags else ["--lr", "1e-2", "--schedule", "cosine"]
    cli.main(["train", recipe, *given, *prior, *varied, "--steps", "6", *flags])


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals = signal.SIGTERM) -> None:
    """Send a signal to this process within the given step."""
    take = loop.Training._step

    def watched(self: loop.Training) -> loop.Report:
        if self.done == step - 1:
            os.kill(os.getpid(), number)
        return take(self)

    monkeypatch.setattr(loop.Training, "_step", watched)


def log(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def product(run: Path) -> dict[str, bytes]:
    """The bytes of what a run has made."""
    files = [run / "adapter.safetensors", *sorted((run / "model").rglob("*.safetensors"))]
    return {str(file.relative_to(run)): file.read_bytes() for file in files if file.is_file()}


def begun(model: Path, pictures: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """A run that was stopped after its third step."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(3, patch)
        train("lora", model, pictures, output, *flags)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *words])
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_an_unfinished_run_says_how_to_go_on(
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    begun(tiny_models["sd"], pictures, run, monkeypatch)
    said = capsys.readouterr().err
    assert "Stopped by SIGTERM after step 3 of 6" in said and "--resume" in said
    words = ["lora", "--model", str(tiny_models["sd"]), "--data", str(pictures), "--output", str(run), "--no-prior"]
    said = refused(capsys, *words)
    assert "an unfinished run is there (stopped, 3 of 6 steps)" in said and f"--output {run} --resume" in said
    cli.main(["train", "--output", str(run), "--resume"])
    assert "goes on after step 3" in capsys.readouterr().out
    assert "finished: nothing is left to do" in refused(capsys, "--output", str(run), "--resume")


def test_runs_are_listed_with_their_state(
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun(tiny_models["sd"], pictures, tmp_path / "runs" / "one", monkeypatch)
    train("lora", tiny_models["sd"], pictures, tmp_path / "runs" / "two")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop.Training, "_step", lambda self: 1 / 0)
        train("dreambooth", tiny_models["sd"], pictures, tmp_path / "runs" / "three")
    capsys.readouterr()
    cli.main(["runs", str(tmp_path / "runs")])
    rows = {Path(line.split()[0]).name: line.split()[1:4] for line in capsys.readouterr().out.splitlines()[:3]}
    assert rows == {
        "one": ["lora", "stopped", "3/6"],
        "two": ["lora", "finished", "6/6"],
        "three": ["dreambooth", "interrupted", "0/6"],
    }


def test_there_must_be_something_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run there to go on with" in refused(capsys, "--output", str(tmp_path / "none"), "--resume")
    assert not (tmp_path / "none").exists()


def test_a_broken_checkpoint_is_passed_over_and_kept(
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train("lora", tiny_models["sd"], pictures, whole)
    begun(tiny_models["sd"], pictures, run, monkeypatch, "--checkpoint-every", "1")
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000003"]
    newest = run / "checkpoints" / "step-000003" / checkpoints.TENSORS
    newest.write_bytes(newest.read_bytes()[:-10])
    cli.main(["train", "--output", str(run), "--resume"])
    said = " ".join(capsys.readouterr().out.split())
    assert "step-000003: broken, left as it is; goes on after step 2" in said
    assert product(run) == product(whole) and log(run) == log(whole)
    assert (run / "checkpoints" / "step-000003.broken-1" / checkpoints.TENSORS).is_file()


def test_changed_settings_base_and_data_are_refused(
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, model = tmp_path / "run", shutil.copytree(tiny_models["sd"], tmp_path / "model")
    masks = tmp_path / "masks"
    masks.mkdir()
    for picture in pictures.glob("*.png"):
        Image.new("L", Image.open(picture).size, 255).save(masks / picture.name)
    begun(model, pictures, run, monkeypatch, "--masks", str(masks))
    resume = ["--output", str(run), "--resume"]
    said = refused(capsys, *resume, "--lr", "2e-2", "--sample-every", "2")
    assert "[optim] lr: 0.01, now 0.02" in said and "--allow-changed" in said and "sample_every" not in said
    (pictures / "0.txt").write_text("another caption")
    assert "data: not what it was made with" in refused(capsys, *resume)
    (pictures / "0.txt").write_text("sks dog, red, number 0")
    white = (masks / "0.png").read_bytes()
    Image.new("L", Image.open(masks / "0.png").size, 128).save(masks / "0.png")
    assert "data: not what it was made with" in refused(capsys, *resume)
    (masks / "0.png").write_bytes(white)
    (model / "scheduler" / "note.txt").write_text("changed")
    assert "base: not what it was made with" in refused(capsys, *resume)
    cli.main(["train", *resume, "--allow-changed", "--lr", "2e-2"])
    assert (run / "adapter.safetensors").is_file()


def test_one_process_at_a_time(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune import ledger

    (tmp_path / "run").mkdir()
    lock = ledger.hold(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        train("lora", tiny_models["sd"], pictures, tmp_path / "run")
    lock.release()
    assert stop.value.code == 2
    assert "another process is training there" in capsys.readouterr().err


def test_a_run_that_never_kept_anything_begins_again(
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed after it had begun and before its first checkpoint."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop.Training, "_step", lambda self: 1 / 0)
        train("lora", tiny_models["sd"], pictures, run)
    cli.main(["train", "--output", str(run), "--resume"])
    assert "begins again at its first step" in " ".join(capsys.readouterr().out.split())
    assert [step for step, _ in log(run)] == [1, 2, 3, 4, 5, 6]
