"""`finetune data check`: every fault of a data set in one run, in order of weight; no file is changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import planted
import pytest
from PIL import ImageFile
from planted import MESSY, TABLE, Row

from finetune import config, shelf
from finetune.cli import main
from finetune.data.checking import findings


def checked(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, Any], str]:
    """Exit status, JSON and text of a check."""
    results = []
    for more in (["--json"], []):
        status = 0
        try:
            main(["data", "check", *map(str, words), *more])
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            status = stop.code
        results.append((status, capsys.readouterr().out))
    (status, told), (again, text) = results
    assert status == again and "Traceback" not in text
    return status, json.loads(told), text


def matching(report: dict[str, Any], row: Row) -> list[dict[str, Any]]:
    return [
        one
        for one in report["findings"]
        if one["code"] == row.code and row.said in one["text"] and one["severity"] == row.severity
    ]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    planted.good(tmp_path / "photos")
    return tmp_path / "photos"


def test_good_pictures_give_no_errors_and_a_recommendation(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report, text = checked(capsys, photos)
    assert status == 0 and report["starts"] is True and report["findings"] == []
    assert report["pictures"] == report["captions"] == 2
    assert report["buckets"] == [{"width": 64, "height": 64, "pictures": 2}]
    assert report["recommendation"]["steps"] == 480 and "240 times" in report["recommendation"]["reason"]
    assert text.rstrip().endswith("Training would start.")


def test_the_json_is_as_documented(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted.truncated(photos)
    planted.blurred(photos)
    _, report, _ = checked(capsys, photos)
    assert {*report} == {
        "starts", "pictures", "captions", "concepts", "resolutions", "buckets", "findings", "recommendation"
    }  # fmt: skip
    for one in report["findings"]:
        assert [*one] == ["severity", "code", "text", "files", "advice"]
        assert one["severity"] in findings.SEVERITIES and one["code"] in findings.ADVICE and one["advice"]
    assert {*report["recommendation"]} == {"steps", "repeats", "reason"}
    assert report["concepts"] == {"all": 3} and report["resolutions"] == [64]


def test_a_table_that_contradicts_caption_files_is_said(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "good0.png", "text": "another thing"}))
    status, report, _ = checked(capsys, photos)
    assert status == 1
    assert [one["files"] for one in report["findings"] if one["code"] == "caption-file"] == [["good0.png"]]


def test_folders_that_a_table_enters_are_not_said_to_be_left_out(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("used", "unused"):
        (photos / name).mkdir()
        planted.save(photos / name, "a.png", len(name), caption=None)
    rows = [{"file_name": "used/a.png", "text": "a thing"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    status, report, text = checked(capsys, photos)
    assert status == 0 and report["pictures"] == 3
    assert "1 sub-folders, not entered: unused" in text


@pytest.mark.parametrize("row", MESSY, ids=lambda row: f"{row.number}-{row.code}")
def test_each_row_is_found_alone(row: Row, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row.plant(photos)
    before = planted.snapshot(photos)
    status, report, text = checked(capsys, photos)
    (one,) = matching(report, row)
    assert one["text"] in text and one["advice"] in text
    assert status == (0 if report["starts"] else 1)
    if row.severity == "error":
        assert status == 1
    assert planted.snapshot(photos) == before
    assert planted.PLACE not in json.dumps(report) + text, "row 44: what EXIF data say goes nowhere"


@pytest.mark.parametrize(
    ("make", "said"), [(None, "there is no such folder; nothing was created"), ("notes.md", "no pictures to train on")]
)
def test_rows_1_and_2(make: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    if make:
        folder.mkdir()
        (folder / make).write_text("notes")
    status, report, _ = checked(capsys, folder)
    assert status == 1 and [one["code"] for one in report["findings"] if one["severity"] == "error"] == ["folder"]
    assert said in report["findings"][0]["text"] and report["recommendation"] is None
    assert folder.exists() == bool(make)


def test_row_5_a_truncated_picture_is_found_whatever_others_have_set(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    planted.truncated(photos)
    status, report, _ = checked(capsys, photos)
    assert status == 1 and report["findings"][0]["files"] == ["truncated.jpg"]


def test_row_6_only_what_is_named_is_left_out_and_it_is_said(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted.truncated(photos)
    status, report, text = checked(capsys, photos, "--skip", "truncated.jpg")
    assert status == 0 and report["pictures"] == 2
    assert "1 left out by --skip: truncated.jpg" in text


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.number}-{row.said}")
def test_rows_21_and_22(row: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted.table(tmp_path / "photos")
    status, report, _ = checked(capsys, tmp_path / "photos")
    assert status == 1 and matching(report, row)


def test_row_24_a_step_of_more_pictures_than_there_are(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report, _ = checked(capsys, photos, "--pictures-a-step", "3")
    assert status == 0
    assert [(one["code"], one["text"]) for one in report["findings"]] == [
        ("batch", "a step takes 3 pictures, and there are 2: some would be seen twice in one step")
    ]


def test_everything_at_once_in_order_of_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = planted.everything(tmp_path / "data")
    before = planted.snapshot(tmp_path / "data")
    status, report, text = checked(capsys, "--config", file)
    assert status == 1 and not report["starts"]
    for row in [*MESSY, *TABLE]:
        found = [one for one in report["findings"] if one["code"] == row.code and one["severity"] == row.severity]
        said = row.said.rpartition(": ")[2] if row.severity == "note" else row.said  # others are counted with it
        assert any(said in one["text"].replace("messy/", "") for one in found), (row.number, row.said)
    told = [one["text"] for one in report["findings"]]
    assert any("gone: there is no such folder" in one for one in told), "row 2"
    assert any("nothing: no pictures to train on" in one for one in told), "row 1"
    assert any("a step takes 100 pictures" in one for one in told), "row 24"
    places = [(findings.SEVERITIES.index(one["severity"]), [*findings.ADVICE].index(one["code"]))
              for one in report["findings"]]  # fmt: skip
    assert places == sorted(places)
    assert all(one in text for one in told)
    assert planted.snapshot(tmp_path / "data") == before, "no file is changed"
    assert planted.PLACE not in json.dumps(report) + text


def test_captions_without_the_trigger_with_the_same_tags_and_some_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(6):
        (tmp_path / "p").mkdir(exist_ok=True)
        planted.save(tmp_path / "p", f"{number}.png", number, "white background, a dog" if number else None)
    words = [tmp_path / "p", "--trigger", "sks", "--template", "{caption}", "--prompt", "a photo of sks dog"]
    status, report, _ = checked(capsys, *words)
    assert status == 1 and "leaves out the trigger" in report["findings"][0]["text"]
    status, report, _ = checked(capsys, tmp_path / "p", "--prompt", "a photo of sks dog")
    assert status == 0
    assert [one["text"] for one in report["findings"]] == [
        "1 trained with the prompt: 0.png",
        '"a dog" is in 5 of 5 captions',
        '"white background" is in 5 of 5 captions',
    ]


def test_unbalanced_concepts_get_repeats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, count in (("cat", 8), ("dog", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            planted.save(tmp_path / name, f"{number}.png", len(name) * number + count)
    file = tmp_path / "two.toml"
    file.write_text(
        "".join(f'[[concepts]]\ndata = "{tmp_path / name}"\ntrigger = "{name}"\n' for name in ("cat", "dog"))
    )
    status, report, text = checked(capsys, "--config", file)
    assert status == 0 and report["concepts"] == {"cat": 8, "dog": 2}
    assert any(one["code"] == "balance" and "cat: 8; dog: 2" in one["text"] for one in report["findings"])
    assert report["recommendation"]["repeats"] == {"cat": 1, "dog": 4} and "dog: repeats = 4" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which data?"),
        (["photos", "--data", "other"], "the settings name data too"),
        (["photos", "--resolutoin", "64"], "--resolution"),
    ],
)
def test_a_command_that_makes_no_sense_ends_with_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", "check", *words])
    assert caught.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--resolution", "100"], ["--max-upscale", "-1"], ["--tag-dropout", "2"]])
def test_settings_that_training_would_refuse_are_errors(
    words: list[str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report, _ = checked(capsys, photos, *words)
    assert status == 1 and [one["code"] for one in report["findings"]] == ["setting"]
    assert words[0] in report["findings"][0]["text"]


def test_a_model_that_is_not_here_is_said_and_captions_judged_by_their_words(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "good0.png.txt").write_text(planted.LONG)
    status, report, _ = checked(capsys, photos, "--model", "someone/something", "--max-upscale", "10")
    assert status == 0 and {"unknown-model", "caption-long"} < {one["code"] for one in report["findings"]}
    (cut,) = [one["text"] for one in report["findings"] if one["code"] == "caption-long"]
    assert cut.count("word") == 15, "75 of 90 words are read at most"


@pytest.mark.parametrize("name", [name for name in shelf.settings() if not name.startswith("slider")])
def test_ready_settings_can_be_given(name: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report, _ = checked(capsys, photos, "--config", name, "--max-upscale", "20")
    assert status == 0 and report["recommendation"], report["findings"]


def test_a_sliders_settings_have_no_data(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", str(photos), "--config", "slider-toybox-attribute"])
    assert stop.value.code == 2 and "a slider's, which is trained without pictures" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["lora", "dreambooth", "textual_inversion", "pivotal"])
def test_the_settings_of_a_run_can_be_given(recipe: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = shelf.load(recipe)
    made = config.parse(page.Config, ["--data", str(photos), "--output", "o", "--batch-size", "5"], "finetune")
    (photos.parent / "settings.toml").write_text(config.dumps(made))
    status, report, _ = checked(capsys, "--config", photos.parent / "settings.toml")
    assert status == 0 and [one["code"] for one in report["findings"]] == ["batch"]


def test_the_commands_of_data_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "--help"])
    said = capsys.readouterr().out
    assert all(f"data {verb} " in said for verb in ("check", "preview", "caption", "cache"))


def test_the_exit_status_is_the_processs(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "finetune", "data", "check", str(tmp_path)], capture_output=True)
    assert done.returncode == 1 and b"no pictures to train on" in done.stdout
