"""Captions by a vision-language model: written once, whole, and never over what is there. Tiny models, real classes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_captioners
import torch
from PIL import Image

from finetune.cli import main
from finetune.data import captioning
from finetune.data.captioning import Captioner
from finetune.errors import Failure, Fault

COLOURS = ["red", "green", "blue", "white"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_captioners.blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (50, 40), colour).save(folder / f"{number}.png")
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(folder.glob("*.txt"))}


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["data", "caption", *map(str, words)])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_each_picture_gets_a_caption_with_the_trigger(
    blip: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.read_bytes() for file in photos.iterdir()}
    main(["data", "caption", str(photos), "--captioner", str(blip), "--trigger", "sks", "--longest", "5"])
    written = texts(photos)
    assert [*written] == ["0.txt", "1.txt", "2.txt", "3.txt"]
    assert all(text.startswith("sks, ") and text.endswith("\n") and len(text) > 8 for text in written.values())
    assert "[DEC]" not in "".join(written.values())
    assert {name: (photos / name).read_bytes() for name in before} == before
    assert {file.suffix for file in photos.iterdir()} == {".png", ".txt"}, "nothing is left lying about"
    assert "4 captions written" in capsys.readouterr().out


def test_a_template_says_how_the_caption_is_made(blip: Path, photos: Path) -> None:
    words = ["--trigger", "sks", "--template", "{caption} in {trigger} style", "--longest", "4"]
    main(["data", "caption", str(photos), "--captioner", str(blip), *words])
    assert all(text.endswith(" in sks style\n") for text in texts(photos).values())


def test_what_is_there_is_never_written_over_unless_asked(
    blip: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "1.txt").write_text("mine")
    (photos / "2.PNG.TXT").write_text("")  # empty, and in other letters: it is there all the same
    main(["data", "caption", str(photos), "--captioner", str(blip), "--longest", "4"])
    assert (photos / "1.txt").read_text() == "mine" and (photos / "2.PNG.TXT").read_text() == ""
    assert sorted(texts(photos)) == ["0.txt", "1.txt", "3.txt"]
    assert "2 caption files were there and stay" in capsys.readouterr().out
    main(["data", "caption", str(photos), "--captioner", str(blip), "--longest", "4"])
    assert "Nothing to do" in capsys.readouterr().out
    main(["data", "caption", str(photos), "--captioner", str(blip), "--longest", "4", "--overwrite"])
    assert (photos / "1.txt").read_text() != "mine" and (photos / "2.PNG.TXT").read_text() != ""


def test_an_interrupted_run_goes_on_where_it_stopped(blip: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = Captioner.caption, []

    def stops(self: Captioner, picture: Image.Image) -> str:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(picture)
        return real(self, picture)

    monkeypatch.setattr(Captioner, "caption", stops)
    with pytest.raises(SystemExit) as caught:
        main(["data", "caption", str(photos), "--captioner", str(blip), "--longest", "4"])
    assert caught.value.code == 130 and sorted(texts(photos)) == ["0.txt", "1.txt"]
    seen.clear()
    main(["data", "caption", str(photos), "--captioner", str(blip), "--longest", "4"])
    assert len(seen) == 2, "only what was missing"
    assert sorted(texts(photos)) == ["0.txt", "1.txt", "2.txt", "3.txt"]


def test_pictures_of_one_stem_get_files_of_their_own(blip: Path, photos: Path) -> None:
    Image.new("RGB", (40, 40)).save(photos / "0.jpg")
    main(["data", "caption", str(photos), "--captioner", str(blip), "--longest", "4"])
    assert {"0.jpg.txt", "0.png.txt"} < {*texts(photos)} and "0.txt" not in texts(photos)


def test_a_file_that_appears_meanwhile_is_left_as_it_is(photos: Path) -> None:
    class Slow:
        def caption(self, picture: Image.Image) -> str:
            (photos / "0.txt").write_text("mine")
            return "a thing"

    with pytest.raises(Failure, match=r"0\.txt: was made by something else"):
        captioning.write(captioning.plan(photos), Slow())  # type: ignore[arg-type]
    assert texts(photos) == {"0.txt": "mine"} and not [*photos.glob(".*")]


def test_models_that_are_told_what_to_do_are_told(tmp_path: Path) -> None:
    folder = tiny_captioners.llava(tmp_path)
    heard: list[Any] = []
    captioner = Captioner.load(str(folder), None, "small cat", 6, torch.device("cpu"), torch.float32)
    real = captioner.processor.apply_chat_template
    captioner.processor.apply_chat_template = lambda said, **options: heard.append(said) or real(said, **options)
    said = captioner.caption(Image.new("RGB", (50, 40), "red"))
    assert heard[0][0]["content"][1]["text"] == "small cat"
    assert said and "<image>" not in said and not said.startswith("small cat")


def test_bad_pictures_are_all_named_before_a_model_is_loaded(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "4.jpg").write_bytes(b"")
    (photos / "5.jpg").write_text("not a picture")
    said = refused(capsys, photos, "--captioner", "/nowhere", "--skip", "9.png")
    assert "4.jpg: the file is empty" in said and "5.jpg: text" in said and "--skip 9.png" in said
    assert not texts(photos)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--captioner", "/nowhere/at/all"], "cannot be loaded"),
        (["--captioner", "x", "--template", "{caption} {colour}"], "{colour}"),
        (["--captioner", "x", "--longest", "0"], "--longest 0"),
        (["--captioner", "x", "--background", "whit"], "whit"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], said: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, photos, *words)
    assert not texts(photos)


@pytest.mark.parametrize(
    ("spoil", "said"), [("pickle", "only pickles"), ("cut", "cut short"), ("none", "no .safetens")]
)
def test_weights_that_cannot_be_trusted_are_refused(
    spoil: str, said: str, blip: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in blip.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    made: dict[str, Callable[[], object]] = {
        "pickle": lambda: (copy / "pytorch_model.bin").write_bytes(pickle.dumps({})),
        "cut": lambda: weights.write_bytes(whole[:-100]),
        "none": lambda: None,
    }
    made[spoil]()
    assert said in refused(capsys, photos, "--captioner", copy)
    assert not texts(photos)


def test_captions_of_a_table_are_not_doubled(photos: Path) -> None:
    (photos / "metadata.jsonl").write_text("")
    with pytest.raises(Fault, match=r"it has a metadata\.jsonl"):
        captioning.plan(photos)


def test_an_empty_answer_is_not_written(photos: Path) -> None:
    class Dumb:
        def caption(self, picture: Image.Image) -> str:
            return ""

    with pytest.raises(Failure, match=r"0\.png: the model had nothing to say"):
        captioning.write(captioning.plan(photos), Dumb())  # type: ignore[arg-type]
    assert not texts(photos)
