"""Folders that cannot be written to, disks that fill up, two processes at one folder: through the command line."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from driver import Place, pictures
from filelock import FileLock

from finetune import checkpoints, cli, ledger, loop


@pytest.fixture
def place(tiny_models: dict[str, Path], tmp_path: Path) -> Place:
    return Place(tmp_path / "run", Path(os.environ["FINETUNE_CACHE"]), tiny_models["sd"], pictures(tmp_path / "data"))


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process: its status, and what it said on stderr."""

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            cli.main(words)
        except SystemExit as stop:
            return int(stop.code or 0), " ".join(capsys.readouterr().err.split())
        return 0, ""

    return run


Ended = Callable[..., tuple[int, str]]


def fills_up(monkeypatch: pytest.MonkeyPatch, at: int, how: str) -> None:
    """Let the disk be full when the checkpoint of that step is written: before it, or in the middle of it."""
    write, save_file = checkpoints._write, checkpoints.save_file

    def half(tensors: object, path: Path) -> None:
        save_file(tensors, path)  # type: ignore[arg-type]
        path.write_bytes(path.read_bytes()[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def watched(folder: Path, tensors: object, facts: dict[str, int]) -> None:
        with monkeypatch.context() as patch:
            if facts["step"] == at and how == "before":
                patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1, used=1, free=1000))
            if facts["step"] == at and how == "within":
                patch.setattr(checkpoints, "save_file", half)
            write(folder, tensors, facts)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "_write", watched)


@pytest.mark.parametrize("how", ["before", "within"])
def test_a_full_disk_costs_the_steps_since_the_last_checkpoint(
    how: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended
) -> None:
    with monkeypatch.context() as patch:
        fills_up(patch, 6, how)
        status, said = ended(*place.start())
    assert status == 1
    assert "step-000006: the checkpoint could not be written (the disk is full)" in said
    assert "Make room, then go on with --resume" in said
    assert sorted(os.listdir(place.run / "checkpoints")) == ["step-000002", "step-000004"]
    assert place.kept() == 4
    entry = ledger.seen(place.run)
    assert entry is not None and entry.state == "failed" and entry.step == 4
    assert ended(*place.resume()) == (0, "")
    whole = Place(tmp_path / "whole", place.cache, place.model, place.pictures)
    assert ended(*whole.start()) == (0, "")
    assert place.product() == whole.product() and place.losses() == whole.losses()


def test_a_limit_on_the_size_of_files_is_said(place: Place) -> None:
    """The kernel's own refusal, in the middle of the tensors: no part of the process is replaced.

    The limit is above the cache's files and below a checkpoint's (Linux would send SIGXFSZ; Python ignores it).
    """
    limit = 200_000
    words = [sys.executable, "-m", "finetune", *place.start("--rank", "64")]
    done = subprocess.run(
        words,
        env=place.environment,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    said = " ".join(done.stderr.split())
    assert done.returncode == 1, said[-3000:]
    assert "step-000002: the checkpoint could not be written" in said and "--resume" in said
    assert "Traceback" not in said
    assert list((place.run / "checkpoints").iterdir()) == []
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *place.resume()],
        env=place.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert place.product()


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_file_where_the_folder_should_be(
    below: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended
) -> None:
    """A file has the folder's name, or one of the folders above it is a file."""
    (tmp_path / "taken").write_text("mine")
    words = Place(tmp_path / "taken" / below, place.cache, place.model, place.pictures).start()
    monkeypatch.setattr(loop.Training, "_step", lambda self: pytest.fail("a step was taken"))
    status, said = ended(*words)
    assert status == 2
    assert str(tmp_path / "taken" / below) in said and "--output" in said
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(place: Place, tmp_path: Path, ended: Ended) -> None:
    place.run.mkdir(mode=0o500)
    status, said = ended(*place.start())
    assert status == 2
    assert f"{place.run}: cannot be written to" in said and "Name another --output" in said


def test_a_folder_that_refuses_is_named(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended
) -> None:
    """As above, for whoever tests as root: the lock is what is written first."""

    def refused(folder: Path, **given: object) -> ledger.FileLock:
        lock = FileLock(folder, **given)
        monkeypatch.setattr(lock, "acquire", refuse)
        return lock

    def refuse() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(ledger, "FileLock", refused)
    place.run.mkdir()
    status, said = ended(*place.start())
    assert status == 2
    assert f"{place.run}: cannot be written to (Read-only file system)" in said and "Name another --output" in said


def test_the_second_process_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch, ended: Ended) -> None:
    """One that begins and one that resumes, while the first trains. The first is not disturbed."""
    refused: list[tuple[int, str]] = []
    take = loop.Training._step

    def watched(self: loop.Training) -> loop.Report:
        if self.done == 3 and not refused:
            for words in (place.start(), place.resume()):
                command = [sys.executable, "-m", "finetune", *words]
                done = subprocess.run(command, env=place.environment, capture_output=True, text=True, timeout=120)
                refused.append((done.returncode, " ".join(done.stderr.split())))
        return take(self)

    monkeypatch.setattr(loop.Training, "_step", watched)
    assert ended(*place.start()) == (0, "")
    (begun, said), (resumed, more) = refused
    assert (begun, resumed) == (2, 2)
    assert str(place.run) in said and "running" in said
    assert f"{place.run}: another process is training there" in more
    assert [step for step, _ in place.losses()] == list(range(1, 13))
