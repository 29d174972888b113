"""Two processes train what one does, and share the work of the cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import forked
import numpy as np
import pytest
import stopping
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune import cli
from finetune.data.cache import Shards


def run(words: list[str], processes: int, cache: Path, stop: int | None = None) -> None:
    """Train in processes of their own; `stop`: until one of them is asked to stop, in this step."""
    script, words = ("", words) if stop is None else (stopping.__file__, [str(stop), *words])
    done = forked.run(words, processes, script, {**os.environ, "FINETUNE_CACHE": str(cache)})
    assert (done.returncode == 0) == (stop is None), done.stderr[-3000:]
    assert stop is None or f"after step {stop} of" in done.stderr, done.stderr[-3000:]


def test_another_number_of_processes_than_asked_for_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "lora", "--data", str(tmp_path), "--output", str(tmp_path / "run"), "--processes", "2"])
    assert stop.value.code == 2
    assert "--processes 2: 1 would train" in capsys.readouterr().err


def test_what_two_processes_began_one_goes_on_with(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Stopped by a signal to one of two, gone on by one that takes two passes a step; then two go on again."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{number}.png")
    words = ["train", "lora", "--model", str(tiny_models["sd"]), "--data", str(pictures), "--prompt", "sks"]
    words += ["--no-prior", "--lr", "1e-2", "--steps", "9", "--checkpoint-every", "3", "--tracker", "none"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run([*words, "--accumulation", "2", "--output", str(whole)], 1, tmp_path / "cache")
    run([*words, "--processes", "2", "--output", str(moved)], 2, tmp_path / "cache", stop=3)
    resume = ["train", "--output", str(moved), "--resume"]
    run([*resume, "--accumulation", "2", "--processes", "1"], 1, tmp_path / "cache", stop=6)
    run([*resume, "--accumulation", "1", "--processes", "2"], 2, tmp_path / "cache")
    one, other = (load_file(folder / "adapter.safetensors") for folder in (whole, moved))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (whole, moved)]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in logs]
    assert len(losses[0]) == 9 and losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_two_processes_train_what_one_does(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Pictures of several sizes, mirrored, with captions that vary, and class pictures: two a step, or one each."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, size in enumerate([(128, 128), (120, 128), (256, 64), (64, 256), (250, 64)]):
        noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"sks dog, red, on a sofa, number {number}")
    losses = {}
    for processes in (1, 2):
        output, cache = tmp_path / f"run{processes}", tmp_path / f"cache{processes}"
        words = ["train", "lora", "--model", str(tiny_models["sd"]), "--data", str(pictures), "--output", str(output)]
        words += ["--class-prompt", "a dog", "--class-images", "2", "--class-steps", "1", "--flip", "--shuffle-tags"]
        words += ["--resolution", "128", "--max-upscale", "4", "--min-kept", "0.2", "--caption-dropout", "0.2"]
        words += ["--lr", "1e-2", "--steps", "6", "--batch-size", str(2 // processes), "--tracker", "none"]
        run(words, processes, cache)
        losses[processes] = [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]
        with Shards(cache / "encodings" / "pictures") as kept:
            assert len(kept) == 5 * 2 + 2 * 2  # class pictures are mirrored too
    assert len(losses[1]) == 6
    assert losses[1] == pytest.approx(losses[2], abs=1e-6)
