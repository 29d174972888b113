"""NaN: the step is not applied, its pictures are named, the last good state is kept, a lower rate may go on from it."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
import torch
from PIL import Image

from finetune import batches, checkpoints, cli, loop


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.effect_noise((64, 64), 30 + 60 * number).convert("RGB").save(folder / f"{number}.png")
    return folder


def train(model: Path, pictures: Path, output: Path, *flags: str) -> None:
    given = ["--model", str(model), "--data", str(pictures), "--output", str(output), "--prompt", "sks", "--no-prior"]
    cli.main(["train", "lora", *given, "--tracker", "none", "--steps", "6", "--checkpoint-every", "2", *flags])


def plant(monkeypatch: pytest.MonkeyPatch, name: str, times: int = 99) -> None:
    """NaN in the latents of one picture, as often as said."""
    picture, left = batches.Batches._picture, [times]

    def broken(self: batches.Batches, item: object, place: object) -> batches.Picture:
        made = picture(self, item, place)  # type: ignore[arg-type]
        if made.example.name == name and left[0]:
            left[0] -= 1
            made.latents.fill_(float("nan"))
        return made

    monkeypatch.setattr(batches.Batches, "_picture", broken)


def finite(run: Path) -> bool:
    found, broken = checkpoints.newest(run)
    assert found is not None and not broken
    return all(value.isfinite().all() for value in found.state["training"]["parameters"].values())


def test_nan_in_one_pictures_latents_is_named_and_nothing_is_poisoned(
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(monkeypatch, "1.png")
    with pytest.raises(SystemExit) as stop:
        train(tiny_models["sd"], pictures, tmp_path / "run")
    assert stop.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "the loss is nan" in said and '1.png: "sks"' in said and "not applied" in said
    assert finite(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"
    monkeypatch.undo()
    cli.main(["train", "--output", str(tmp_path / "run"), "--resume"])
    train(tiny_models["sd"], pictures, tmp_path / "whole")
    assert (tmp_path / "run" / "adapter.safetensors").read_bytes() == (
        tmp_path / "whole" / "adapter.safetensors"
    ).read_bytes()


def test_nan_in_a_gradient_stops_before_the_step(
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    accumulate = loop._accumulate

    def broken(model: torch.nn.Module, *given: object) -> float:
        loss = accumulate(model, *given)  # type: ignore[arg-type]
        if given[1] == 3:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))  # type: ignore[union-attr]
        return loss

    monkeypatch.setattr(loop, "_accumulate", broken)
    with pytest.raises(SystemExit):
        train(tiny_models["sd"], pictures, tmp_path / "run")
    assert "step 4: the loss is" in capsys.readouterr().err
    found, _ = checkpoints.newest(tmp_path / "run")
    assert found is not None and found.step == 3 and finite(tmp_path / "run")


def test_rollback_goes_on_at_a_lower_rate(
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The NaN comes once, after the first checkpoint: what a rate too high does."""
    accumulate, left = loop._accumulate, [1]

    def broken(*given: object) -> float:
        loss = accumulate(*given)  # type: ignore[arg-type]
        if given[2] == 3 and left[0]:
            left[0] -= 1
            return float("nan")
        return loss

    monkeypatch.setattr(loop, "_accumulate", broken)
    train(tiny_models["sd"], pictures, tmp_path / "run", "--on-nan", "rollback", "--lr", "1e-3")
    assert "step 4: the loss is nan" in (said := " ".join(capsys.readouterr().out.split()))
    assert "back to step 2, on at 0.5 of the rate" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["lr"]) for line in lines] == [
        (1, 1e-3), (2, 1e-3), (3, 5e-4), (4, 5e-4), (5, 5e-4), (6, 5e-4),
    ]  # fmt: skip


def test_gradients_of_the_step_that_failed_do_not_stay_and_rates_are_halved_once_each_time(
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Gradients are infinite once in step 4 and once in step 6, with a checkpoint at the lower rate in between."""
    accumulate, left = loop._accumulate, {3: 1, 5: 1}

    def broken(model: torch.nn.Module, *given: object) -> float:
        loss = accumulate(model, *given)  # type: ignore[arg-type]
        if left.pop(given[1], 0):  # type: ignore[call-overload]
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(loop, "_accumulate", broken)
    train(tiny_models["sd"], pictures, tmp_path / "run", "--on-nan", "rollback", "--lr", "1e-3")
    said = " ".join(capsys.readouterr().out.split())
    assert "back to step 2, on at 0.5 of the rate" in said and "back to step 4, on at 0.25 of the rate" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]


def test_rollback_gives_up_in_the_end(
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(monkeypatch, "1.png")
    with pytest.raises(SystemExit) as stop:
        train(tiny_models["sd"], pictures, tmp_path / "run", "--on-nan", "rollback", "--batch-size", "3")
    assert stop.value.code == 1 and "1.png" in capsys.readouterr().err


def test_nan_in_one_of_two_processes_is_the_same_for_both(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    words = ["lora", "--model", tiny_models["sd"], "--data", pictures, "--prompt", "sks", "--no-prior", "--lr", "1e-3"]
    words += ["--tracker", "none", "--steps", "6", "--checkpoint-every", "2", "--processes", "2"]
    done = forked.run([str(tmp_path), *map(str, words)], 2, Path(__file__).parents[1] / "poisoned.py")
    assert done.returncode == 0, done.stderr[-3000:]
    said = " ".join(done.stderr.split())
    assert said.count("step 4: the loss is nan") == 1 and said.count('.png: "sks"') == 2  # once, of both
    found, _ = checkpoints.newest(tmp_path / "latents")
    assert found is not None and found.step == 3 and finite(tmp_path / "latents")
    assert json.loads((tmp_path / "latents" / "run.json").read_text())["state"] == "failed"
    for name in ("gradient", "averaged"):
        run = tmp_path / name
        rates = [json.loads(line)["lr"] for line in (run / "log.jsonl").read_text().splitlines()]
        assert rates == [1e-3, 1e-3, 5e-4, 5e-4, 5e-4, 5e-4] and finite(run)
        assert (run / "weights-0").read_text() == (run / "weights-1").read_text()
    one, other = (tmp_path / name / "adapter.safetensors" for name in ("gradient", "averaged"))
    assert one.read_bytes() == other.read_bytes()
    assert done.stdout.count("step 4: the loss is") == 2 and done.stdout.count("back to step 2") == 2
