"""`finetune animate`: where a frame is a prompt's picture it is that picture, and frames change smoothly between."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Images
from PIL import ImageSequence

from finetune import animation, families, sampling
from finetune.cli import main
from finetune.families import Source


def frames(file: Path) -> list[np.ndarray]:
    return [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(Images.open(file))]


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


def animate(output: Path, *words: str) -> list[np.ndarray]:
    main(["animate", "--output", str(output), *words])
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return frames(output)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_between_prompts_and_seeds(kind: str, tiny_models: dict[str, Path]) -> None:
    """The first, the middle and the last frame are the pictures of `finetune generate`."""
    family = families.load(Source(str(tiny_models[kind])))
    draw = {"steps": 2, "guidance": 4.0}
    drawn = list(animation.between(family, ["a dog", "a red ball", "a cat"], [3, 9], 5, **draw))
    for frame, prompt, seed in ((0, "a dog", 3), (4, "a cat", 9)):
        [expected] = sampling.sample(family, [prompt], [seed], **draw)
        assert np.abs(np.asarray(drawn[frame]).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    noise = animation._on_circle(torch.cat([animation._noise(family, seed, 64) for seed in (3, 9)]), 0.5)
    assert 0.9 < float(noise.std()) < 1.1, "noise between two seeds is as large as theirs"


def test_frames_change_smoothly(tmp_path: Path) -> None:
    """With the embedded model: of the difference between first and last frame, the largest step is less than a half.

    Measured: 37 % at most and 17 % on average, with 25 frames 33 % and 10 %.
    """
    words = ["--prompt", "a photo of a red toy", "a photo of a blue toy", "--frames", "13", "--steps", "8"]
    (tmp_path / "out").mkdir()
    drawn = animate(tmp_path / "out" / "a.webp", *words)
    steps = [apart(one, other) for one, other in pairwise(drawn)]
    assert len(drawn) == 13 and drawn[0].shape == (64, 64, 3)
    whole = apart(drawn[0], drawn[-1])
    assert max(steps) < whole / 2 and sum(steps) / len(steps) < whole / 5


def test_a_path_moves_the_last_frame(tmp_path: Path) -> None:
    """What is to the right comes into the middle; each frame is nearer to the last one than to the first."""
    (tmp_path / "out").mkdir()
    words = [
        "--prompt",
        "a photo of a toy",
        "--frames",
        "5",
        "--steps",
        "10",
        "--pan",
        "0.06",
        "0",
        "--strength",
        "0.3",
    ]
    drawn = animate(tmp_path / "out" / "a.gif", *words)
    assert len(drawn) == 5
    assert all(apart(drawn[i + 1], drawn[i]) < apart(drawn[-1], drawn[0]) for i in range(3))


def test_the_view_moves_as_it_is_told() -> None:
    picture = Images.linear_gradient("L").resize((64, 64)).rotate(90).convert("RGB")  # lighter to the left or right
    pixels = np.asarray(picture).astype(int)
    moved = np.asarray(animation.Path2D(right=0.125).moved(picture)).astype(int)
    assert np.abs(moved[:, :56] - pixels[:, 8:])[:, 2:-2].max() <= 1
    nearer = np.asarray(animation.Path2D(zoom=2.0).moved(picture)).astype(int)
    assert np.abs(nearer[:, 32] - pixels[:, 32]).max() <= 3
    assert np.abs(nearer[32, 2:-2:2] - pixels[32, 17:47]).max() <= 3
    assert np.array_equal(np.asarray(animation.Path2D().moved(picture)), pixels)


def test_from_a_picture(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """The first frame is the picture."""
    Images.linear_gradient("L").convert("RGB").resize((64, 64)).save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    words = ["--model", str(tiny_models["sd"]), "--prompt", "a", "--init", str(tmp_path / "a.png"), "--zoom", "1.1"]
    drawn = animate(tmp_path / "out" / "a.webp", *words, "--frames", "3", "--steps", "4")
    assert apart(drawn[0], np.asarray(Images.open(tmp_path / "a.png")).astype(int)) < 2
    assert len(drawn) == 3 and apart(drawn[1], drawn[2]) > 0


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="there is no ffmpeg here")
def test_mp4(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    main(["animate", "--model", str(tiny_models["sd"]), "--prompt", "a", "b", "--frames", "4", "--steps", "1",
          "--output", str(tmp_path / "a.mp4")])  # fmt: skip
    assert (tmp_path / "a.mp4").stat().st_size > 0


def test_what_ffmpeg_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All frames as raw RGB, their size and rate; what it fails with is said, and nothing stays."""
    seen: dict[str, object] = {}

    def run(command: list[str], input: bytes, **options: object) -> subprocess.CompletedProcess[bytes]:
        seen.update(command=command, bytes=len(input))
        Path(command[-1]).write_bytes(b"mp4")
        return subprocess.CompletedProcess(command, int(seen.get("status", 0)), b"", b"no such codec")

    monkeypatch.setattr(animation.subprocess, "run", run)
    animation.write([Images.new("RGB", (10, 6))] * 3, tmp_path / "a.mp4", 12)
    assert (tmp_path / "a.mp4").read_bytes() == b"mp4" and seen["bytes"] == 3 * 10 * 6 * 3
    assert {"10x6", "12", "yuv420p"} <= set(seen["command"])
    seen["status"] = 1
    with pytest.raises(animation.Failure, match="no such codec"):
        animation.write([Images.new("RGB", (10, 6))], tmp_path / "b.mp4", 12)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt", "a"], "nothing would move"),
        (["--prompt", "a", "b", "--frames", "1"], "--frames 1: at least 2"),
        (["--prompt", "a", "b", "--strength", "0.5"], "nothing would move"),
        (["--prompt", "a", "--pan", "1"], "two numbers"),
        (["--prompt", "a", "--zoom", "1.1", "--seed", "0", "1"], "one seed begins"),
        (["--prompt", "a", "--zoom", "-1"], "above 0"),
        (["--prompt", "a", "b", "--output", "a.avi"], ".gif, .webp, .mp4"),
    ],
)
def test_what_is_no_animation_is_refused(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["animate", "--model", "no-such/model", *words])
    assert stop.value.code == 2 and expected in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_mp4_without_ffmpeg_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(animation.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["animate", "--prompt", "a", "b", "--output", str(tmp_path / "a.mp4")])
    assert stop.value.code == 2 and "which is not on this machine" in " ".join(capsys.readouterr().err.split())
