"""Faults rows 1-4, 8, 14, 18, 19, 37, 38 and 40 through the command line.

What cannot be used ends with status 2 and a message of what, where and how to go on: without a traceback, before
anything is written, and with every file as it was. What only looks odd trains as its plain counterpart does.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from finetune import weights
from finetune.cli import main

ROOT = Path(__file__).parents[1]
Refused = Callable[..., str]
Words = Callable[..., list[str]]


def draw(path: Path, mode: str = "RGB", number: int = 0) -> Path:
    """A small picture that differs by number; in RGBA, its ground is red and transparent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGBA", (80, 72), (255, 0, 0, 0) if mode == "RGBA" else (20, 90, 160, 255))
    ImageDraw.Draw(image).ellipse((8 + number, 12, 60 + number, 64), (240, 200, 40 * number % 256, 255))
    image.convert(mode).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two good pictures."""
    for number, name in enumerate(("one.jpg", "two.png")):
        draw(tmp_path / "photos" / name, number=number)
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A whole adapter file. Read only."""
    folder = tmp_path_factory.mktemp("adapter")
    draw(folder / "photos" / "a.jpg")
    main(["train", "lora", "--model", str(tiny_models["sd"]), "--data", str(folder / "photos"), "--prompt", "a dog",
          "--no-prior", "--steps", "1", "--tracker", "none", "--output", str(folder / "out")])  # fmt: skip
    return folder / "out" / "adapter.safetensors"


@pytest.fixture
def train(tmp_path: Path, tiny_models: dict[str, Path]) -> Callable[..., list[str]]:
    """The words of a training of one step; later ones win."""

    def words(data: Path, *more: str, output: str = "out", prompt: str | None = "a photo of sks dog") -> list[str]:
        base = ["train", "lora", "--data", str(data), "--output", str(tmp_path / output), "--no-prior", "--steps", "1"]
        base += [] if "--model" in more else ["--model", str(tiny_models["sd"])]
        return [*base, "--tracker", "none", *(["--prompt", prompt] if prompt else []), *more]

    return words


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")
    }


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused; gives what it said, on one line."""

    def run(words: list[str]) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(words)
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert "Traceback" not in said.out + said.err
        assert contents(tmp_path) == before, "a refused command wrote or changed something"
        return " ".join((said.out + said.err).split())

    return run


# --- 1-4: folders and files ----------------------------------------------------------------------------------------


def test_row_1_no_pictures(tmp_path: Path, train: Words, refused: Refused) -> None:
    draw(tmp_path / "mine" / "dog" / "a.jpg")
    (tmp_path / "mine" / "film.mp4").write_bytes(b"x")
    said = refused(train(tmp_path / "mine"))
    assert f"{tmp_path / 'mine'}: no pictures to train on. Looked for .jpg, .jpeg" in said
    assert f"Seen there: 1 .mp4, 1 sub-folder. Pictures lie in: {tmp_path / 'mine' / 'dog'} (1)" in said


def test_row_2_no_folder(tmp_path: Path, photos: Path, train: Words, refused: Refused) -> None:
    said = refused(train(tmp_path / "photo"))
    assert f"{tmp_path / 'photo'}: there is no such folder; nothing was created." in said
    assert f"Did you mean {photos}?" in said
    assert "a file, not a folder" in refused(train(photos / "one.jpg"))


def test_rows_3_and_4_all_bad_files_at_once(tmp_path: Path, photos: Path, train: Words, refused: Refused) -> None:
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.jpg").write_text("my dog")
    Image.effect_noise((200, 200), 90).save(photos / "cut.jpg")
    (photos / "cut.jpg").write_bytes((photos / "cut.jpg").read_bytes()[:-3000])
    said = refused(train(photos))
    assert f"{photos}: 3 problems; nothing there was changed." in said
    assert "- cut.jpg: cut short or damaged (image file is truncated" in said
    assert "- empty.jpg: the file is empty (0 bytes)" in said
    assert "- text.jpg: text, not a picture (it begins 'my dog')" in said
    assert "leave them out by name: --skip cut.jpg empty.jpg text.jpg" in said
    main(train(photos, "--skip", "cut.jpg", "empty.jpg", "text.jpg"))  # the remedy is one
    assert (tmp_path / "out" / "adapter.safetensors").is_file()


def test_class_pictures_are_looked_at_as_well(tmp_path: Path, photos: Path, train: Words, refused: Refused) -> None:
    draw(tmp_path / "dogs" / "1.jpg")
    (tmp_path / "dogs" / "2.jpg").write_bytes(b"")
    prior = ["--prior", "--class-prompt", "a dog", "--class-data"]
    words = [word for word in train(photos) if word != "--no-prior"]
    assert "2.jpg: the file is empty" in refused([*words, *prior, str(tmp_path / "dogs")])
    assert "there is no such folder" in refused([*words, *prior, str(tmp_path / "none")])


def test_in_a_process_of_its_own(tmp_path: Path, photos: Path, train: Words) -> None:
    (photos / "empty.jpg").write_bytes(b"")
    before = contents(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-m", "finetune", *train(photos)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert "empty.jpg: the file is empty (0 bytes)" in ran.stderr and "Traceback" not in ran.stderr
    assert ran.stdout == "" and contents(tmp_path) == before


# --- 8, 14: odd, and trained as what it stands for -----------------------------------------------------------------


def trained(tmp_path: Path, words: list[str], output: str) -> dict[str, torch.Tensor]:
    main(words)
    return weights.load_tensors(tmp_path / output / "adapter.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_row_8_transparent_pictures_train_as_if_laid_on_the_background(
    tmp_path: Path, train: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not as the pixels that transparency hides, which `convert("RGB")` would show."""
    with Image.open(draw(tmp_path / "clear" / "a.png", "RGBA")) as opened:
        whole = opened.copy()
    laid = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
    for name, image in (("laid", laid), ("shown", whole)):
        (tmp_path / name).mkdir()
        image.convert("RGB").save(tmp_path / name / "a.png")
    clear, laid, shown = (
        trained(tmp_path, train(tmp_path / name, output=f"{name}-out"), f"{name}-out")
        for name in ("clear", "laid", "shown")
    )
    assert "transparent, put on the background: 1 (a.png)" in " ".join(capsys.readouterr().out.split())
    assert equal(clear, laid) and not equal(clear, shown)


def test_row_8_a_background_that_is_no_colour(photos: Path, train: Words, refused: Refused) -> None:
    assert "background 'whit' is not a colour" in refused(train(photos, "--background", "whit"))


def test_row_14_what_lies_about_in_folders_changes_nothing(
    tmp_path: Path, photos: Path, train: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = trained(tmp_path, train(photos, output="plain"), "plain")
    shutil.copytree(photos, tmp_path / "camera")
    (tmp_path / "camera" / "one.jpg").rename(tmp_path / "camera" / "one.JPG")
    (tmp_path / "camera" / "two.png").rename(tmp_path / "camera" / "two.PnG")
    for name in (".DS_Store", "Thumbs.db", "._one.JPG", "desktop.ini", "one.xmp", "one.AAE"):
        (tmp_path / "camera" / name).write_bytes(b"\0\1\2")
    (tmp_path / "camera" / "__MACOSX").mkdir()
    capsys.readouterr()
    assert equal(trained(tmp_path, train(tmp_path / "camera", output="odd"), "odd"), plain)
    said = " ".join(capsys.readouterr().out.split())
    assert "other files, left alone: 4 (Thumbs.db, desktop.ini, one.AAE, one.xmp)" in said


# --- 18, 19: captions ----------------------------------------------------------------------------------------------


def test_row_18_a_caption_that_is_not_utf8(photos: Path, train: Words, refused: Refused) -> None:
    (photos / "one.txt").write_bytes("un chien au caf\xe9".encode("latin-1"))
    (photos / "two.txt").write_bytes(b"\xef\xbb\xbfa dog")
    said = refused(train(photos))
    assert f"{photos}: 1 problem" in said
    assert "one.txt: not UTF-8 (byte 0xe9 at offset 15). Save it as UTF-8" in said


def test_row_19_captions_missing_or_empty(photos: Path, train: Words, refused: Refused) -> None:
    (photos / "two.txt").write_text(" \n")
    said = refused(train(photos, prompt=None))
    assert "one.jpg: no caption; one.txt would hold it" in said and "two.png: its caption file is empty" in said
    assert "--prompt" in said
    said = refused(train(photos, "--strict"))
    assert "one.jpg: no caption" in said and "two.png: its caption file is empty" in said and "--strict takes" in said


def test_row_19_the_prompt_stands_in_and_this_is_said(
    photos: Path, train: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "two.txt").write_text("a drawn dog")
    main(train(photos))
    said = " ".join(capsys.readouterr().out.split())
    assert '1 caption from a file "a photo of sks dog" for those without: 1 (one.jpg)' in said


# --- 37: settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "right"), [("--rnak", "--rank"), ("--learning-rate", "--lr"), ("--step", "--steps")])
def test_row_37_a_misspelt_flag(photos: Path, train: Words, refused: Refused, wrong: str, right: str) -> None:
    said = refused(train(photos, wrong, "4"))
    assert wrong in said
    assert right in said or wrong == "--learning-rate"


def test_row_37_a_misspelt_setting_in_a_file(tmp_path: Path, photos: Path, train: Words, refused: Refused) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[adapter]\nrank = 4\nalhpa = 2\n\n[optim]\nrank = 8\n")
    said = refused(train(photos, "--config", str(file)))
    assert f"{file}: not all settings are understood" in said
    assert "line 3: alhpa: no such setting in [adapter]." in said and "alpha" in said
    assert "line 6: rank: no such setting in [optim]. It belongs in [adapter]." in said


def test_row_37_a_value_of_another_kind(photos: Path, train: Words, refused: Refused) -> None:
    said = refused(train(photos, "--precision", "fp64"))
    assert "fp64" in said and "bf16" in said


# --- 38: pickles ---------------------------------------------------------------------------------------------------


class Planted:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.safetensors"])
def test_row_38_a_pickled_checkpoint(tmp_path: Path, photos: Path, train: Words, refused: Refused, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(pickle.dumps(Planted(tmp_path / "it ran")))
    said = refused(train(photos, "--model", str(file)))
    assert str(file) in said and "can run code when" in said and "only .safetensors" in said


def test_row_38_a_model_folder_of_pickles(
    tmp_path: Path, photos: Path, train: Words, refused: Refused, tiny_models: dict[str, Path]
) -> None:
    model = shutil.copytree(tiny_models["sd"], tmp_path / "model")
    for file in list(model.rglob("*.safetensors")):
        file.unlink()
        file.with_name("diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Planted(tmp_path / "it ran")))
    said = refused(train(photos, "--model", str(model)))
    assert "pickles can run code when they are loaded" in said and "diffusion_pytorch_model.bin" in said


def test_row_38_one_part_of_a_model_as_a_pickle(
    tmp_path: Path, photos: Path, train: Words, refused: Refused, tiny_models: dict[str, Path]
) -> None:
    model = shutil.copytree(tiny_models["sd"], tmp_path / "model")
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    file.with_suffix(".bin").write_bytes(pickle.dumps(Planted(tmp_path / "it ran")))
    file.unlink()
    assert "diffusion_pytorch_model.bin" in refused(train(photos, "--model", str(model)))


def test_row_38_a_pickled_adapter(tmp_path: Path, refused: Refused, tiny_models: dict[str, Path]) -> None:
    file = tmp_path / "adapter.pt"
    file.write_bytes(pickle.dumps(Planted(tmp_path / "it ran")))
    words = ["generate", "--model", str(tiny_models["sd"]), "--adapter", str(file), "--prompt", "a dog"]
    said = refused([*words, "--output", str(tmp_path / "pictures")])
    assert str(file) in said and "can run code when" in said


# --- 40: broken weights --------------------------------------------------------------------------------------------


def cut(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:-100])
    return "it is cut short: 100 of"


def follow(file: Path) -> str:
    file.write_bytes(file.read_bytes() + b"#!/bin/sh")
    return "9 bytes follow the last tensor"


def inflate(file: Path) -> str:
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    return "its header claims 4,611,686,018,427,387,904 bytes"


def overlap(file: Path) -> str:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    begin, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [begin - 4, end - 4]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return f"tensor {last} begins at byte"


def spoil(file: Path) -> str:
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, file, {"format": "pt"})
    return "NaN or infinite"


BREAKS = [cut, follow, inflate, overlap, spoil]


@pytest.mark.parametrize("damage", BREAKS)
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_row_40_a_model_with_broken_weights(
    tmp_path: Path, photos: Path, train: Words, refused: Refused, tiny_models: dict[str, Path],
    part: str, damage: Callable[[Path], str],
) -> None:  # fmt: skip
    model = shutil.copytree(tiny_models["sd"], tmp_path / "model")
    file = next((model / part).glob("*.safetensors"))
    expected = damage(file)
    said = refused(train(photos, "--model", str(model)))
    assert expected in said
    assert str(file) in said or (damage is spoil and f"{part}." in said)


@pytest.mark.parametrize("damage", BREAKS)
def test_row_40_a_broken_adapter(
    tmp_path: Path, adapter: Path, refused: Refused, tiny_models: dict[str, Path], damage: Callable[[Path], str]
) -> None:
    file = Path(shutil.copy(adapter, tmp_path / "broken.safetensors"))
    expected = damage(file)
    words = ["generate", "--model", str(tiny_models["sd"]), "--adapter", str(file), "--prompt", "a dog"]
    said = refused([*words, "--output", str(tmp_path / "pictures")])
    assert expected in said and str(file) in said


@pytest.mark.parametrize("damage", [cut, follow, inflate])
def test_row_40_a_broken_checkpoint_file(
    tmp_path: Path, photos: Path, train: Words, refused: Refused, damage: Callable[[Path], str]
) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(40)}, file)
    expected = damage(file)
    said = refused(train(photos, "--model", str(file)))
    assert expected in said and str(file) in said
