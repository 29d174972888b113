"""Two processes train what one does, and share the work of the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.data.cache import Shards


def run(words: list[str], processes: int, cache: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "FINETUNE_CACHE": str(cache), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, "-m", "finetune", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


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
