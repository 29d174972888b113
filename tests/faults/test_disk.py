"""Folders that cannot be written to, disks that fill up, two processes at one folder: through the command line."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from driver import Place
from filelock import FileLock, Timeout

from finetune import checkpoints, class_pictures, keeping, ledger, loop, previews, weights
from finetune.data import cache
from finetune.errors import Fault
from finetune.families import source

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


@pytest.mark.parametrize("how", [pytest.param("before", marks=pytest.mark.slow), "within"])
def test_a_full_disk_costs_the_steps_since_the_last_checkpoint(
    how: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended
) -> None:
    with monkeypatch.context() as patch:
        fills_up(patch, 4, how)
        status, said = ended(*place.start())
    assert status == 1
    assert "step-000004: the checkpoint could not be written (the disk is full)" in said
    assert "Make room, then go on with --resume" in said
    assert sorted(os.listdir(place.run / "checkpoints")) == ["step-000002"]
    assert place.kept() == 2
    entry = ledger.seen(place.run)
    assert entry is not None and entry.state == "failed" and entry.step == 2
    assert ended(*place.resume()) == (0, "")
    whole = replace(place, run=tmp_path / "whole")
    assert ended(*whole.start()) == (0, "")
    assert place.product() == whole.product() and place.losses() == whole.losses()


@pytest.mark.slow
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


WRITTEN: dict[str, tuple[object, str, int, str]] = {
    "class pictures": (class_pictures, "sample", 1, "class-pictures/"),
    "cache": (cache, "_checksum", 1, "encodings/texts: the cache cannot be written"),
    "settings": (keeping.config, "dumps", 1, "run/settings.toml: could"),
    "log": (loop.Training, "_step", 3, "run: could"),
    "state": (checkpoints, "_thin", 1, "run/run.json: could"),
    "samples": (previews.sampling, "sample", 1, "run: could"),
    "adapter": (weights, "header_bytes", 1, "run/.unverified-adapter.safetensors: could"),
}
"""What is about to be written when a function is called so many times, and what is said when it cannot be"""


SELDOM = ("settings", "state", "samples", "adapter")


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[pytest.mark.slow] if what in SELDOM else []) for what in WRITTEN]
)
def test_whatever_a_full_disk_refuses_is_said_and_gone_on_with(
    what: str, place: Place, monkeypatch: pytest.MonkeyPatch, ended: Ended
) -> None:
    """The kernel refuses every byte beyond the first hundred of a file, from that call on."""
    owner, name, call, named = WRITTEN[what]
    limits, calls, before = resource.getrlimit(resource.RLIMIT_FSIZE), [], getattr(owner, name)

    def last(*given: object, **more: object) -> object:
        calls.append(1)
        done = before(*given, **more)
        if len(calls) == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        return done

    try:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, last)
            status, said = ended(*place.start("--sample-every", "2", "--sample-steps", "1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and named in said, said
    assert "Make room" in said or "MB are needed there" in said
    assert place.kept() == {"state": 2, "log": 2, "adapter": 4}.get(what, 0)
    goes_on = place.resume() if place.begun else place.start()
    assert ("Go on: `finetune train --output" in said) == (place.begun and what != "cache")
    assert ended(*goes_on) == (0, "")
    assert place.logged() == [1, 2, 3, 4] and place.product()
    assert not list(place.run.glob(".*.writing")) and not list(place.cache.rglob("*.writing"))


def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused is refused before that."""
    monkeypatch.setattr(source.Source, "load", lambda *given: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_file_where_the_folder_should_be(
    below: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended
) -> None:
    """A file has the folder's name, or one of the folders above it is a file."""
    (tmp_path / "taken").write_text("mine")
    words = Place(tmp_path / "taken" / below, place.cache, place.model, place.pictures).start()
    loads_nothing(monkeypatch)
    status, said = ended(*words)
    assert status == 2
    assert str(tmp_path / "taken" / below) in said and "--output" in said
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(place: Place, monkeypatch: pytest.MonkeyPatch, ended: Ended) -> None:
    loads_nothing(monkeypatch)
    place.run.mkdir(mode=0o500)
    status, said = ended(*place.start())
    assert status == 2
    assert f"{place.run}: cannot be written to" in said and "Name another --output" in said


def test_a_folder_that_refuses_is_named(place: Place, monkeypatch: pytest.MonkeyPatch, ended: Ended) -> None:
    """As above, for whoever tests as root: the lock is what is written first."""

    def refused(folder: Path, **given: object) -> ledger.FileLock:
        lock = FileLock(folder, **given)
        monkeypatch.setattr(lock, "acquire", refuse)
        return lock

    def refuse() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    loads_nothing(monkeypatch)
    monkeypatch.setattr(ledger, "FileLock", refused)
    place.run.mkdir()
    status, said = ended(*place.start())
    assert status == 2
    assert f"{place.run}: cannot be written to (Read-only file system)" in said and "Name another --output" in said


def test_a_folder_that_another_holds(place: Place, monkeypatch: pytest.MonkeyPatch, ended: Ended) -> None:
    """It draws class pictures, say: there is no run in its folder yet, and none will be begun there beside it."""
    loads_nothing(monkeypatch)
    place.run.mkdir()
    with FileLock(place.run / ledger.LOCK):
        status, said = ended(*place.start())
    assert status == 2 and f"{place.run}: another process is training there" in said
    assert [path.name for path in place.run.iterdir()] == [ledger.LOCK]


@pytest.mark.parametrize("how", ["alone", "beside"])
def test_of_what_is_refused_nothing_is_left(
    how: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended
) -> None:
    """The folder is held while the model is loaded. What somebody put there is let be."""
    place = replace(place, run=tmp_path / "new" / "run")

    def refused(self: source.Source, *given: object) -> None:
        with pytest.raises(Timeout), FileLock(place.run / ledger.LOCK, timeout=0):
            pass
        if how == "beside":
            (place.run / "mine").write_text("kept")
        raise Fault("the model is broken")

    monkeypatch.setattr(source.Source, "load", refused)
    assert ended(*place.start()) == (2, "the model is broken")
    assert (tmp_path / "new").exists() == (how == "beside")
    if how == "beside":
        assert [path.name for path in place.run.iterdir()] == ["mine"]


@pytest.mark.slow
def test_the_second_process_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch, ended: Ended) -> None:
    """One that begins and one that resumes, while the first trains. The first is not disturbed."""
    refused: list[tuple[int, str]] = []
    take = loop.Training._step

    def watched(self: loop.Training) -> loop.Report:
        if self.done == 2 and not refused:
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
    assert [step for step, _ in place.losses()] == list(range(1, 5))
