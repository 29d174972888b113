"""Faults rows 19, 21 and 22 through the command line: tables, data sets and concepts that cannot be trained on.

Each ends with status 2 before a model is loaded, with all that is wrong and every file as it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.cli import main


def pictures(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (70, 64), (60 * number, 90, 160)).save(folder / name)
    return folder


def rows(folder: Path, *given: dict[str, Any] | str) -> None:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in given)
    (folder / "metadata.jsonl").write_text(text)


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")
    }


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a training that must be refused says, on one line."""
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["train", "lora", "--output", str(tmp_path / "out"), "--no-prior", "--tracker", "none", *words])
    said = capsys.readouterr()
    assert stop.value.code == 2 and "Traceback" not in said.out + said.err
    assert contents(tmp_path) == before, "a refused command wrote or changed something"
    return " ".join((said.out + said.err).split())


def test_row_21_names_that_lead_out_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = pictures(tmp_path / "private", "secret.png") / "secret.png"
    folder = pictures(tmp_path / "set", "a.png")
    (folder / "link.png").symlink_to(outside)
    rows(folder, *({"file_name": name, "text": "x"} for name in (str(outside), "../private/secret.png", "link.png")))
    said = refused(tmp_path, capsys, "--data", str(folder), "--prompt", "a dog")
    assert f"{folder}: 3 problems; nothing there was changed." in said
    assert f"line 1: file_name {outside}: an absolute path. Name files from the folder on: secret.png" in said
    assert "line 2: file_name ../private/secret.png: leads out of the folder (..)" in said
    assert "line 3: file_name link.png: a link that leads out of the folder" in said


def test_row_22_broken_rows_with_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "set", "a.png", "b.png")
    row = {"file_name": "a.png", "text": "x"}
    rows(folder, row, {"file_name": "gone.png", "text": "x"}, row, '{"file_name": "b.png",')
    said = refused(tmp_path, capsys, "--data", str(folder))
    assert "metadata.jsonl, line 2: file_name gone.png: there is no such file" in said
    assert "metadata.jsonl, line 3: a.png again, as in line 1" in said
    assert "metadata.jsonl, line 4: not valid JSON" in said
    assert "b.png: no caption; no row of metadata.jsonl names it" in said and "--prompt" in said


def test_row_19_captions_that_a_table_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "set", "a.png", "b.png")
    rows(folder, {"file_name": "a.png", "text": " "}, {"file_name": "b.png", "text": "x"})
    assert "a.png: no caption in line 1 of metadata.jsonl" in refused(tmp_path, capsys, "--data", str(folder))
    said = refused(tmp_path, capsys, "--data", str(folder), "--prompt", "x", "--strict")
    assert "a.png: no caption in line 1" in said and "--strict takes" in said


def test_all_concepts_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dogs, cats = pictures(tmp_path / "dogs", "a.png"), pictures(tmp_path / "cats", "a.png")
    (dogs / "b.png").write_bytes(b"")
    file = tmp_path / "two.toml"
    tables = [f"[[concepts]]\ndata = {json.dumps(str(folder))}\n" for folder in (dogs, cats)]
    file.write_text(tables[0] + "prompt = 'a dog'\n" + tables[1])
    said = refused(tmp_path, capsys, "--config", str(file))
    assert f"concept 1 ({dogs}): b.png: the file is empty" in said
    assert f"concept 2 ({cats}): a.png: no caption; a.txt would hold it" in said
    assert "are both given" in refused(tmp_path, capsys, "--config", str(file), "--data", str(dogs))
    file.write_text(file.read_text() + "triger = 'x'\n")
    said = refused(tmp_path, capsys, "--config", str(file))
    assert "line 6: triger: no such setting in [[concepts]]. Did you mean trigger?" in said


def test_no_data_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no pictures to learn: give --data FOLDER" in refused(tmp_path, capsys)


def test_a_data_set_without_the_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "set", "a.png")
    rows(folder, {"file_name": "a.png", "text": "x"})
    said = refused(tmp_path, capsys, "--data", f"hf:{folder}", "--image-column", "imge")
    assert "--image-column imge: no such column; there is: image and text. Did you mean image?" in said


def test_a_caption_template_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "set", "a.png")
    said = refused(tmp_path, capsys, "--data", str(folder), "--trigger", "sks", "--template", "{triger} {caption}")
    assert "{triger} is not known. It knows {trigger} and {caption}" in said
