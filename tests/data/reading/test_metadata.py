"""Folders with a table (rows 21, 22): rows lead to pictures in the folder only, and every broken line is named."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune import data
from finetune.data import Example
from finetune.errors import Fault
from finetune.settings import Data


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path, "PNG")
    return path


def table(folder: Path, *rows: dict[str, Any] | str, name: str = "metadata.jsonl") -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(folder: Path, **given: Any) -> list[Example]:
    return data.read(Data(str(folder), **given))[0]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, **given: Any) -> Fault:
    before = contents(folder)
    with pytest.raises(Fault) as caught:
        read(folder, **given)
    assert contents(folder) == before
    return caught.value


def test_rows_say_all_about_their_pictures(tmp_path: Path) -> None:
    for name in ("a.jpg", "sub/b.jpg", "sub/b-mask.png"):
        picture(tmp_path / name, "white")
    table(
        tmp_path,
        {"file_name": "sub/b.jpg", "captions": ["two", "  three\nfour "], "mask": "sub/b-mask.png", "label": 3},
        "",
        {"file_name": "./a.jpg", "captions": "one", "focus": [0.25, 1], "weight": 2, "repeats": 3},
    )
    first, second = read(tmp_path)
    assert (first.name, first.captions, first.focus, first.weight, first.repeats) == (
        "a.jpg", ("one",), (0.25, 1.0), 2.0, 3,
    )  # fmt: skip
    assert (second.name, second.captions, second.mask) == (
        "sub/b.jpg", ("two", "three four"), tmp_path / "sub" / "b-mask.png",
    )  # fmt: skip
    assert second.own_caption and second.path == tmp_path / "sub" / "b.jpg"
    assert "metadata.jsonl: columns that are not used: label" in data.describe([first, second])


def test_csv_says_the_same(tmp_path: Path) -> None:
    for name in ("a.jpg", "b, c.jpg"):
        picture(tmp_path / name)
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        rows = [
            ["file_name", "text", "focus_x", "focus_y", "weight", "repeats"],
            ["b, c.jpg", 'a "big"\ndog', "0.5", "0", "", ""],
            ["a.jpg", "", "", "", "0.5", "2"],
        ]
        csv.writer(file).writerows(rows)
    first, second = read(tmp_path, prompt="p")
    assert (first.captions, first.weight, first.repeats, first.focus) == (("p",), 0.5, 2, None)
    assert (second.captions, second.weight, second.focus) == (('a "big" dog',), 1.0, (0.5, 0.0))
    assert not first.own_caption
    (tmp_path / "metadata.csv").write_text('file_name,captions\na.jpg,"[""x"", ""y""]"\n"b, c.jpg",z\n')
    assert [one.captions for one in read(tmp_path)] == [("x", "y"), ("z",)]


def test_row_21_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    picture(folder / "good.jpg")
    outside = picture(tmp_path / "private" / "a.jpg")
    (folder / "link.jpg").symlink_to(outside)
    (folder / "links").symlink_to(outside.parent)
    (folder / "loop").symlink_to(folder / "loop")
    names = [str(outside), "../private/a.jpg", "good/../../private/a.jpg", "link.jpg", "links/a.jpg", "C:\\a.jpg",
             "\\\\server\\a.jpg", "..\\private\\a.jpg", "loop", "nul\0.jpg"]  # fmt: skip
    table(folder, *({"file_name": name, "text": "x"} for name in names), {"file_name": "good.jpg", "mask": "../m.png"})
    details = [line for line in refused(folder, prompt="p", skip=("link.jpg",)).details if "metadata" in line]
    said = ["absolute path", "(..)", "(..)", "a link that leads out", "a link that leads out", "absolute path",
            "absolute path", "(..)", "no such file", "not a file name", "mask ../m.png: leads out"]  # fmt: skip
    assert len(details) == len(said)
    for number, (line, part) in enumerate(zip(details, said, strict=True), 1):
        assert line.startswith(f"metadata.jsonl, line {number}: ") and part in line


def test_a_folder_that_is_a_link_itself_is_no_escape(tmp_path: Path) -> None:
    picture(tmp_path / "true" / "a.jpg")
    table(tmp_path / "true", {"file_name": "a.jpg", "text": "x"})
    (tmp_path / "link").symlink_to(tmp_path / "true")
    assert [one.captions for one in read(tmp_path / "link")] == [("x",)]


def test_row_22_every_broken_line_is_named_at_once(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.JPG", "c.jpg"):
        picture(tmp_path / name)
    (tmp_path / "c.jpg").write_bytes(b"")
    table(
        tmp_path,
        {"file_name": "a.jpg", "text": "x"},
        '{"file_name": "b.JPG", "text": ',
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "a.jpg", "text": "y"},
        ["a.jpg"].__repr__(),
        '["a.jpg"]',
        {"text": "x"},
        {"file_name": "b.jpg", "text": "x"},
        {"file_name": "c.jpg", "text": 5, "weight": -1, "repeats": 1.5, "focus": [2, 0], "mask": "m.png"},
    )
    found = refused(tmp_path, prompt="p")
    assert found.details[0].startswith("c.jpg: the file is empty")
    expected = [
        (2, "not valid JSON (Expecting value at letter 32)"),
        (3, "file_name gone.png: there is no such file"),
        (4, "a.jpg again, as in line 1. Several captions: a list"),
        (5, "not valid JSON"),
        (6, "each line is an object"),
        (7, "file_name is missing"),
        (8, "file_name b.jpg: there is no such file. Is b.JPG meant?"),
        (9, "text = 5: expected text, or a list of texts"),
        (9, "weight = -1: expected a number, 0 or more"),
        (9, "repeats = 1.5: expected a whole number, 1 or more"),
        (9, "focus = [2, 0]: expected [x, y], from the top left, each from 0 to 1"),
        (9, "mask m.png: there is no such file"),
    ]
    assert len(found.details) == len(expected) + 1
    for line, (number, part) in zip(found.details[1:], expected, strict=True):
        assert line.startswith(f"metadata.jsonl, line {number}: {part}")


def test_row_22_broken_lines_of_csv(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.jpg,"a\ndog"\nb.jpg,a dog, lying\ngone.jpg,x\n')
    details = refused(tmp_path).details
    assert details[0].startswith("metadata.csv, line 4: 3 cells, the first line has 2; a comma in a text needs quotes")
    assert details[1].startswith("metadata.csv, line 5: file_name gone.jpg: there is no such file")


def test_row_18_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.jpg"}\n{"text": "caf\xe9"}\n')
    assert "metadata.jsonl, line 2: not UTF-8 (byte 0xe9 at offset 36)" in refused(tmp_path).message
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "a.jpg", "text": "x"}\r\n')
    assert [one.captions for one in read(tmp_path)] == [("x",)]


def test_row_19_pictures_without_a_caption_are_listed(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "sub/e.jpg", "sub/f.jpg"):
        picture(tmp_path / name)
    (tmp_path / "c.txt").write_text("its own")
    table(tmp_path, {"file_name": "a.jpg", "text": "x"}, {"file_name": "b.jpg"}, {"file_name": "sub/e.jpg", "text": ""})
    assert refused(tmp_path).details == [
        "b.jpg: no caption in line 2 of metadata.jsonl",
        "d.jpg: no caption; no row of metadata.jsonl names it",
        "sub/e.jpg: no caption in line 3 of metadata.jsonl",
        "sub/f.jpg: no caption; no row of metadata.jsonl names it",
    ]
    made = {one.name: one.captions for one in read(tmp_path, prompt="p")}
    assert made == {"a.jpg": ("x",), "c.jpg": ("its own",)} | {
        name: ("p",) for name in ("b.jpg", "d.jpg", "sub/e.jpg", "sub/f.jpg")
    }
    left_out = read(tmp_path, skip=("b.jpg", "d.jpg", "sub/e.jpg", "f.jpg"))
    assert [one.name for one in left_out] == ["a.jpg", "c.jpg"]


def test_two_captions_for_one_picture_are_said(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("another")
    table(tmp_path, {"file_name": "a.jpg", "text": "one"})
    assert refused(tmp_path).details == [
        "a.jpg: one caption in metadata.jsonl, another in its caption file. Take one away"
    ]
    (tmp_path / "a.txt").write_text("one\n")
    assert [one.captions for one in read(tmp_path)] == [("one",)]


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [
        ([{"filename": "a.jpg"}], {}, "no column file_name, which names the picture of each row. Its columns: filename."
         " Is filename meant?"),
        ([{"file_name": "a.jpg", "text": "x", "caption": "y"}], {}, "columns text and caption may all hold"),
        ([{"file_name": "a.jpg", "tags": "x"}], {"caption_column": "tag"}, "no such column: file_name and tags. Did you"
         " mean tags?"),
        ([{"file_name": "a.jpg", "tags": "x"}], {}, "its columns: file_name and tags; one of text, caption, captions"),
        ([""], {}, "metadata.jsonl: no rows in it"),
    ],
)  # fmt: skip
def test_columns_that_are_not_there(tmp_path: Path, rows: list[Any], given: dict[str, str], said: str) -> None:
    picture(tmp_path / "a.jpg")
    table(tmp_path, *rows)
    assert said in str(refused(tmp_path, **given))


def test_a_column_may_be_chosen(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    table(tmp_path, {"file_name": "a.jpg", "text": "x", "tags": "y"})
    assert [one.captions for one in read(tmp_path, caption_column="tags")] == [("y",)]


def test_two_tables_are_one_too_many(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    table(tmp_path, {"file_name": "a.jpg", "text": "x"})
    (tmp_path / "metadata.csv").write_text("file_name,text\na.jpg,y\n")
    assert "both metadata.jsonl and metadata.csv" in refused(tmp_path).message


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
ROWS = st.dictionaries(
    st.sampled_from(["file_name", "text", "focus", "focus_x", "mask", "weight", "repeats"]), VALUES, max_size=5
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, max_size=3), raw=st.text(max_size=30))
def test_any_table_is_read_or_refused(tmp_path: Path, rows: list[dict[str, Any]], raw: str) -> None:
    picture(tmp_path / "a.jpg")
    lines = [json.dumps({"file_name": "a.jpg", **row}) for row in rows] + [raw.encode("utf-8", "replace").decode()]
    table(tmp_path, *lines)
    try:
        examples = read(tmp_path, prompt="p")
    except Fault as found:
        str(found).encode("utf-8")
    else:
        assert [one.name for one in examples] == ["a.jpg"]
        assert examples[0].weight >= 0 and examples[0].repeats >= 1


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=80))
def test_any_bytes_are_a_table_or_a_fault(tmp_path: Path, raw: bytes) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "metadata.csv").write_bytes(raw)
    with pytest.raises(Fault):
        read(tmp_path)
