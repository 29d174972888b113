"""Data sets of the library `datasets`, from this machine: parquet, imagefolder, saved ones, streaming or not."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
from PIL import Image

from finetune import data
from finetune.data import Example
from finetune.data.reading import library
from finetune.errors import Fault
from finetune.settings import Captions, Data

SECRET = "Planted-Camera-7"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def encoded(colour: str, kind: str = "JPEG") -> bytes:
    exif, made = Image.Exif(), io.BytesIO()
    exif[0x010F] = SECRET
    Image.new("RGB", (8, 6), colour).save(made, kind, exif=exif)
    return made.getvalue()


def made(**columns: list[Any]) -> datasets.Dataset:
    pictures = [{"bytes": raw, "path": None} for raw in columns.pop("image")]
    features = {name: datasets.List(datasets.Value("string")) if isinstance(values[0], list)
                else datasets.Value("int64" if isinstance(values[0], int) else "string")
                for name, values in columns.items()}  # fmt: skip
    return datasets.Dataset.from_dict(
        {"image": pictures, **columns}, features=datasets.Features({"image": datasets.Image(), **features})
    )


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = made(
        image=[encoded(c) for c in ("red", "green", "blue")], captions=[["a", " b\nc "], ["d"], []], n=[1, 2, 3]
    )
    rows.to_parquet(str(folder / "train.parquet"))
    return folder


def read(place: Path | str, texts: Captions | None = None, **given: Any) -> list[Example]:
    return data.read(Data(f"hf:{place}", **given), texts)[0]


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_become_files_that_are_named_by_content(parquet: Path, streaming: bool) -> None:
    examples = read(parquet, prompt="p", streaming=streaming)
    assert [(one.name, one.captions) for one in examples] == [
        ("row 0", ("a", "b c")), ("row 1", ("d",)), ("row 2", ("p",)),
    ]  # fmt: skip
    assert [one.path.parent for one in examples] == [library.kept()] * 3
    assert len({one.path for one in examples}) == len(list(library.kept().iterdir())) == 3
    assert [one.own_caption for one in examples] == [True, True, False]
    assert data.describe(examples)[0] == "3 pictures of 8 x 6 pixels"
    before = {path: path.stat().st_mtime_ns for path in library.kept().iterdir()}
    assert read(parquet, prompt="p") == examples
    assert {path: path.stat().st_mtime_ns for path in library.kept().iterdir()} == before
    assert read(parquet / "train.parquet", prompt="p") == examples


def test_row_44_nothing_of_the_camera_is_kept(parquet: Path, tmp_path: Path) -> None:
    read(parquet, prompt="p")
    for path in library.kept().iterdir():
        assert SECRET.encode() not in path.read_bytes()
    assert not list(tmp_path.rglob("*.arrow")), "what lies here is not copied by the library"


def test_each_line_may_be_a_caption(parquet: Path) -> None:
    assert read(parquet, Captions(several_captions=True), prompt="p")[0].captions == ("a", "b", "c")


def test_only_so_many_rows(parquet: Path) -> None:
    assert [one.name for one in read(parquet, limit=2)] == ["row 0", "row 1"]
    assert [one.name for one in read(parquet, skip=("row 2", "row 0"))] == ["row 1"]
    with pytest.raises(Fault, match="--limit 0"):
        read(parquet, limit=0)


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    rows = made(image=[encoded("red"), encoded("blue", "PNG")], text=["x", "y"])
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "both"))
    assert [one.captions for one in read(tmp_path / "saved")] == [("x",), ("y",)]
    assert [one.captions for one in read(tmp_path / "both", split="test")] == [("y",)]
    with pytest.raises(Fault, match="no split tset; there is: train and test"):
        read(tmp_path / "both", split="tset")


def test_files_of_a_local_imagefolder_are_used_where_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(encoded("red"))
    lines = [json.dumps({"file_name": name, "text": name}) for name in ("b.jpg", "a.jpg")]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    examples = read(folder)
    assert sorted((one.captions[0], one.path.name) for one in examples) == [("a.jpg", "a.jpg"), ("b.jpg", "b.jpg")]
    assert not library.kept().exists()


def test_all_bad_rows_are_named_at_once(tmp_path: Path) -> None:
    outside = tmp_path / "private.jpg"
    outside.write_bytes(encoded("red"))
    rows = [encoded("red"), b"", b"text, not a picture", encoded("red")[:-40]]
    pictures = [{"bytes": raw, "path": None} for raw in rows] + [{"bytes": None, "path": str(outside)}, None]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    columns = {"image": pictures, "text": ["x", "", "x", "x", "x", "x"]}
    (tmp_path / "set").mkdir()
    rows_of = datasets.Dataset.from_dict(columns, features=features)
    pyarrow.parquet.write_table(rows_of.data.table, tmp_path / "set" / "train.parquet")  # as it is, nothing embedded
    with pytest.raises(Fault) as caught:
        read(tmp_path / "set" / "train.parquet")
    said = [line.partition(" (")[0] for line in caught.value.details]
    assert said == [
        "row 1: the file is empty",
        "row 2: text, not a picture",
        "row 3: cut short or damaged",
        "row 4: names a file outside the data set, which is not read",
        "row 5: no picture in it",
    ]
    assert "--skip 'row 1' 'row 2'" in caught.value.message
    assert len(list(library.kept().iterdir())) == 1


def test_a_row_without_a_caption_is_named(parquet: Path) -> None:
    with pytest.raises(Fault) as caught:
        read(parquet)
    assert caught.value.details == ["row 2: no caption; its column captions is empty"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"image_column": "imgae"}, "--image-column imgae: no such column; there is: image, captions and n. Did"
         " you mean image?"),
        ({"caption_column": "caption"}, "--caption-column caption: no such column.*Did you mean captions?"),
        ({"image_column": "captions"}, "row 0: a picture was expected in it, not list: see --image-column"),
        ({"caption_column": "n"}, "row 0: column n: expected text, or a list of texts, not int"),
        ({"split": "test"}, "the split test cannot be opened: .*train"),
    ],
)  # fmt: skip
def test_columns_and_splits_that_are_not_there(parquet: Path, given: dict[str, str], said: str) -> None:
    with pytest.raises(Fault) as caught:
        read(parquet, prompt="p", **given)
    assert re.search(said.replace("?", r"\?"), str(caught.value))


def test_a_data_set_that_cannot_be_reached(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("nobody/has-this", str(tmp_path / "empty"), str(tmp_path / "gone")):
        with pytest.raises(Fault, match="cannot be opened"):
            read(name)
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(Fault, match="of files"):
        read(tmp_path / "a.zip")
