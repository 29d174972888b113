"""What was found in a picture is remembered by its bytes, and never believed of others."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.reading import memo, pictures
from finetune.data.reading.memo import facts, facts_of
from finetune.data.reading.pictures import BadPicture, Facts
from finetune.errors import Fault

in_one_folder = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def picture(path: Path, number: int = 0, **options: object) -> Path:
    pixels = np.random.default_rng(number).integers(0, 256, (5 + number % 3, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def whole(found: Facts | BadPicture) -> dict[str, object]:
    """With the fields that do not count as differences"""
    assert isinstance(found, Facts)
    return vars(found)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were decoded, in order."""
    seen: list[Path] = []
    decode = pictures.decode

    def noted(path: Path, background: str = "white") -> tuple[Image.Image, Facts]:
        seen.append(path)
        return decode(path, background)

    monkeypatch.setattr(pictures, "decode", noted)
    return seen


def test_a_second_look_decodes_nothing_whatever_the_names(tmp_path: Path, decoded: list[Path]) -> None:
    paths = [picture(tmp_path / f"{number}.png", number) for number in range(5)]
    first = [whole(one) for one in facts_of(paths)]
    assert len(decoded) == 5
    assert first == [whole(facts(path)) for path in paths] == [whole(one) for one in facts_of(paths, workers=3)]
    moved = [path.rename(tmp_path / f"other {path.name}") for path in paths]
    os.utime(moved[0], (1, 1))
    assert [whole(one) for one in facts_of(moved)] == first
    assert len(decoded) == 5
    assert first == [whole(pictures.decode(path)[1]) for path in moved]


def test_what_changes_is_decoded_again(tmp_path: Path, decoded: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = picture(tmp_path / "a.png", 1)
    first = facts(path)
    picture(path, 2)
    assert facts(path).digest != first.digest and len(decoded) == 2
    facts(path, "black")
    facts(path, "black")
    assert len(decoded) == 3
    monkeypatch.setattr(memo, "_readers", lambda: ["another Pillow"])
    facts(path)
    assert len(decoded) == 4


@in_one_folder
@given(kinds=st.lists(st.sampled_from(["plain", "odd", "turned", "clear", "cut", "text", "gone"]), max_size=12),
       workers=st.integers(1, 3))  # fmt: skip
def test_it_finds_what_decoding_finds_in_order(kinds: list[str], workers: int, tmp_path: Path) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    paths = [planted(folder / f"{number}.png", kind, number) for number, kind in enumerate(kinds)]
    expected = []
    for path in paths:
        try:
            expected.append(vars(pictures.decode(path)[1]))
        except BadPicture as bad:
            expected.append({"path": bad.path, "reason": bad.reason})
    for _ in range(2):
        found = list(facts_of(iter(paths), workers=workers))
        shown = [{"path": x.path, "reason": x.reason} if isinstance(x, BadPicture) else vars(x) for x in found]
        assert shown == expected


def planted(path: Path, kind: str, number: int) -> Path:
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    options = {"odd": {"icc_profile": b"garbage"}, "turned": {"exif": exif}}.get(kind, {})
    if kind == "clear":
        Image.new("RGBA", (4, 4), (9, 9, number, 0)).save(path)
    elif kind == "text":
        path.write_text("hello")
    elif kind != "gone":
        picture(path, number, **options)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    return path


def test_bad_files_are_not_remembered_and_hold_no_pixels(tmp_path: Path, decoded: list[Path]) -> None:
    path = planted(tmp_path / "a.png", "cut", 1)
    os.mkfifo(tmp_path / "pipe.png")
    for _ in range(2):
        [bad, pipe] = facts_of([path, tmp_path / "pipe.png"])
        assert isinstance(bad, BadPicture) and "cut short" in bad.reason
        assert isinstance(pipe, BadPicture) and pipe.reason == "not a regular file"
        assert bad.__traceback__ is None and bad.__cause__ is None
        with pytest.raises(BadPicture, match="cut short"):
            facts(path)
    assert len(decoded) == 6


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(tmp_path / "a.png", 1)
    before = path.read_bytes()
    decode = pictures.decode

    def swapped(path: Path, background: str = "white") -> tuple[Image.Image, Facts]:
        picture(path, 2)
        return decode(path, background)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "decode", swapped)
        facts(path)
    path.write_bytes(before)
    assert facts(path).digest == decode(path)[1].digest


def test_at_most_two_a_worker_are_looked_at_ahead(tmp_path: Path, decoded: list[Path]) -> None:
    paths = (picture(tmp_path / f"{number}.png", number) for number in range(40))
    found = facts_of(paths, workers=2)
    next(found)
    assert len(decoded) <= 4
    found.close()  # type: ignore[attr-defined]
    assert len(list(tmp_path.glob("*.png"))) <= 4
    assert facts(tmp_path / "0.png") and len(decoded) <= 4  # what was taken is remembered all the same


def test_a_background_that_is_no_colour_is_refused_at_once(tmp_path: Path) -> None:
    for look in (lambda: facts(tmp_path / "a.png", "wite"), lambda: list(facts_of([], "wite"))):
        with pytest.raises(Fault, match="is not a colour"):
            look()


# --- the database --------------------------------------------------------------------------------------------------


def database(tmp_path: Path) -> Path:
    return Path(os.environ["FINETUNE_CACHE"]) / "facts" / "facts.sqlite"


def test_it_holds_no_names(tmp_path: Path) -> None:
    facts(picture(tmp_path / "Secret.png", 1, icc_profile=b"garbage"))
    assert (
        b"ecret" not in database(tmp_path).read_bytes()
        and str(tmp_path).encode() not in database(tmp_path).read_bytes()
    )


def test_two_processes_and_a_kill(tmp_path: Path) -> None:
    """One is killed after 70 pictures: at least the first batch of them is remembered."""
    paths = [picture(tmp_path / f"{number:03}.png", number) for number in range(150)]
    code = """
    import os, pathlib, signal, sys
    from finetune.data.reading.memo import facts_of
    paths = sorted(pathlib.Path(sys.argv[1]).glob("*.png"))
    for number, one in enumerate(facts_of(paths)):
        if number == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    both = [subprocess.Popen([*command, number]) for number in ("70", "-1")]
    assert [one.wait(120) for one in both] == [-9, 0]
    with sqlite3.connect(database(tmp_path)) as known:
        assert known.execute("SELECT count(*) FROM notes").fetchone() == (150,)
        assert known.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert [whole(one) for one in facts_of(paths)] == [whole(pictures.decode(path)[1]) for path in paths]


@pytest.mark.parametrize("content", [b"no database" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_damaged_database_is_set_aside(
    content: bytes, tmp_path: Path, decoded: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = picture(tmp_path / "a.png")
    database(tmp_path).parent.mkdir(parents=True)
    database(tmp_path).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        facts(path)
    assert "damaged" in caplog.text
    assert database(tmp_path).with_name("facts.sqlite.damaged").read_bytes() == content
    facts(path)
    assert len(decoded) == 1


def test_without_a_database_all_is_decoded(
    tmp_path: Path, decoded: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    path = picture(tmp_path / "a.png")
    with caplog.at_level(logging.WARNING):
        assert facts(path) == facts(path)
    assert len(decoded) == 2 and "measured again each time" in caplog.text
    assert [whole(one) for one in facts_of([path])] == [whole(facts(path))]


def test_garbage_in_a_row_is_not_believed(tmp_path: Path, decoded: list[Path]) -> None:
    path = picture(tmp_path / "a.png")
    first = facts(path)
    for text in ("", "[]", '{"height": 1}', "null"):
        with sqlite3.connect(database(tmp_path)) as known:
            known.execute("UPDATE notes SET note = ?", (text.encode(),))
        assert whole(facts(path)) == whole(first)
    assert len(decoded) == 5
