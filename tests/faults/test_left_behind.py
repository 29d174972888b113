"""What a killed process leaves in the run's folder, put there on purpose: no chance has to find it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driver import Place

from finetune import checkpoints, cli, ledger, loop
from finetune.checkpoints import Checkpoint


def save(run: Path, step: int) -> None:
    checkpoints.save(run, Checkpoint(step, {"weights": torch.full((3,), float(step))}), keep_last=1)


def test_half_a_removal_is_done_with_the_next_one(tmp_path: Path) -> None:
    """Else it takes its room for good, and the removal of the same step, done again after a resume, fails on it."""
    save(tmp_path, 2)
    folder = tmp_path / checkpoints.FOLDER
    (folder / ".step-000002.leaving").mkdir()
    (folder / ".step-000002.leaving" / checkpoints.TENSORS).write_bytes(b"half")
    save(tmp_path, 4)
    assert [path.name for path in folder.iterdir()] == ["step-000004"]


def test_half_a_checkpoint_is_written_again(tmp_path: Path) -> None:
    save(tmp_path, 2)
    half = tmp_path / checkpoints.FOLDER / ".step-000004.writing"
    half.mkdir()
    (half / checkpoints.TENSORS).write_bytes(b"half")
    found, broken = checkpoints.newest(tmp_path)
    assert found is not None and found.step == 2 and not broken
    save(tmp_path, 4)
    assert [path.name for path in half.parent.iterdir()] == ["step-000004"]


def test_the_log_begins_again_with_the_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its first step and before its first checkpoint."""
    take = loop.Training._step
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop.Training, "_step", lambda self: take(self) if self.done < 1 else 1 / 0)
        cli.main(place.start())
    assert place.logged() == [1]
    cli.main(place.resume())
    assert place.logged() == list(range(1, 5))


@pytest.mark.parametrize("reached", ["settings.toml", "run.json"])
def test_a_run_that_was_killed_while_it_began_is_begun_again(
    reached: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before that file was written: the folder holds a lock, and settings perhaps, and nothing to go on with."""

    def die(*given: object, **more: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        from finetune import keeping

        patch.setattr(*((keeping.config, "dumps") if reached == "settings.toml" else (ledger, "write")), die)
        cli.main(place.start())
    assert place.run.is_dir() and not place.begun
    cli.main(place.start())
    assert place.logged() == list(range(1, 5))
