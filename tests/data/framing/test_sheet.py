"""The contact sheet, and the command that draws it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from finetune import cli
from finetune.data.examples import Example
from finetune.data.framing import frames, sheet
from finetune.data.framing.frames import Framed
from finetune.data.framing.sheet import BAD, COLOURS, COLUMNS, GAP, ROWS, SIDE
from finetune.errors import Fault
from finetune.settings import Framing


def example(path: Path, size: tuple[int, int] = (200, 100), caption: str = "a cat") -> Example:
    if not path.exists():
        Image.new("RGB", size, "teal").save(path)
    return Example(path, (caption,), path.name)


def framed(examples: list[Example], framing: Framing | None = None, sides: tuple[int, ...] = (64,)) -> list[Framed]:
    return list(frames.frame(examples, framing or Framing(), sides, 32))


def has(image: Image.Image, colour: str) -> bool:
    return bool((np.asarray(image) == ImageColor.getrgb(colour)).all(-1).any())


def test_the_crop_is_outlined_and_the_rest_faded(tmp_path: Path) -> None:
    (one,) = framed([example(tmp_path / "a.png", (300, 100))], Framing(buckets=False, min_kept=0))
    cell = sheet.cell(one, {64: COLOURS[0]})
    shown = np.asarray(cell)[GAP + (SIDE - 96) // 2 : GAP + (SIDE + 96) // 2, GAP : GAP + SIDE]
    row = shown[48]
    line = np.flatnonzero((row == ImageColor.getrgb(COLOURS[0])).all(-1))
    assert (line.min(), line.max()) == (97, 190) or (line.min(), line.max()) == (96, 191)
    assert tuple(row[SIDE // 2]) == (0, 128, 128)  # teal as it is
    assert row[10].min() > 100 and row[-10].min() > 100


def test_a_focus_and_a_mask_are_drawn(tmp_path: Path) -> None:
    Image.new("L", (200, 100), 0).save(tmp_path / "m.png")
    levels = Image.new("L", (200, 100), 0)
    levels.paste(255, (100, 0, 200, 100))
    levels.save(tmp_path / "m.png")
    plain = example(tmp_path / "a.png")
    masked = Example(plain.path, ("x",), "a.png", mask=tmp_path / "m.png")
    (one,) = framed([masked], Framing(crop="focus", buckets=False))
    cell = sheet.cell(one, {64: COLOURS[0]})
    assert has(cell, BAD)  # the cross of the focus
    pixels = np.asarray(cell)[GAP + SIDE // 2, :, :].astype(int)
    left, right = pixels[GAP + 100], pixels[GAP + 250]
    assert left[0] > left[1] and tuple(right) == (0, 128, 128)


def test_mirror_images_and_random_places_are_shown(tmp_path: Path) -> None:
    picture = Image.new("RGB", (300, 100), "white")
    picture.paste("black", (0, 0, 150, 100))
    picture.save(tmp_path / "a.png")
    one_view = framed([example(tmp_path / "a.png")])[0]
    views = framed([example(tmp_path / "a.png")], Framing(crop="random", flip=True, buckets=False, min_kept=0))[0]
    plain, more = (sheet.cell(one, {64: COLOURS[0]}) for one in (one_view, views))
    assert more.height > plain.height


def test_what_cannot_be_trained_comes_first_and_is_framed_in_red(tmp_path: Path) -> None:
    (tmp_path / "z.png").write_bytes(b"text")
    fine, bad = example(tmp_path / "a.png"), example(tmp_path / "z.png")
    small = example(tmp_path / "small.png", (9, 9))
    one, two, three = framed([fine, small, bad])
    assert one.faults == () and "too few" in two.faults[0] and "text" in three.faults[0]
    (page,) = sheet.pages([one, two, three], "pictures")
    width = SIDE + 2 * GAP
    top = page.height - max(sheet.cell(cell, {64: COLOURS[0]}).height for cell in (one, two, three))
    cells = [page.crop((n * width, top, (n + 1) * width, page.height)) for n in range(3)]
    assert [has(cell, BAD) for cell in cells] == [True, True, False]


def test_pages_are_numbered_and_none_is_lost(tmp_path: Path) -> None:
    path = example(tmp_path / "a.png").path
    many = framed([Example(path, ("x",), f"{n}.png") for n in range(COLUMNS * ROWS + 1)])
    written = sheet.write(many, tmp_path / "sheet.png", "pictures")
    assert [file.name for file in written] == ["sheet.png", "sheet-2.png"]
    tall, short = (Image.open(file).height for file in written)
    assert tall > 3 * short
    assert len(sheet.write(many, tmp_path / "first.png", "pictures", most_pages=1)) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "sheet.png", "sheet-2.png", "first.png"}


def test_nothing_is_written_over_unless_asked(tmp_path: Path) -> None:
    path = example(tmp_path / "a.png").path
    many = framed([Example(path, ("x",), f"{n}.png") for n in range(COLUMNS * ROWS + 1)])
    (tmp_path / "sheet-2.png").write_bytes(b"mine")
    with pytest.raises(Fault, match=r"sheet-2\.png there already"):
        sheet.write(many, tmp_path / "sheet.png", "pictures")
    assert not (tmp_path / "sheet.png").exists() and (tmp_path / "sheet-2.png").read_bytes() == b"mine"
    sheet.write(many, tmp_path / "sheet.png", "pictures", overwrite=True)
    assert Image.open(tmp_path / "sheet-2.png").format == "PNG"


@pytest.mark.parametrize(("name", "said"), [("sheet.jpg", r"ends in \.png"), ("none/sheet.png", "there is no folder")])
def test_where_it_cannot_go_is_said(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(Fault, match=said):
        sheet.write(framed([example(tmp_path / "a.png")]), tmp_path / name, "pictures")


def test_camera_and_place_do_not_get_into_the_sheet(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Planted camera"
    exif.get_ifd(0x8825)[1] = "N"
    Image.new("RGB", (80, 80)).save(tmp_path / "a.jpg", exif=exif, comment=b"Planted comment")
    (file,) = sheet.write(framed([example(tmp_path / "a.jpg")]), tmp_path / "sheet.png", "pictures")
    assert b"Planted" not in file.read_bytes() and str(tmp_path).encode() not in file.read_bytes()
    with Image.open(file) as written:
        written.load()
        assert not written.getexif() and written.info == {}


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(1, 700), height=st.integers(1, 700), caption=st.text(max_size=300), name=st.text(max_size=80),
    crop=st.sampled_from(["centre", "random"]), flip=st.booleans(),
)  # fmt: skip
def test_any_picture_and_text_can_be_drawn(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, caption: str, name: str, crop: Any, flip: bool
) -> None:
    path = tmp_path_factory.mktemp("sheet") / "a.png"
    Image.new("RGB", (width, height), "teal").save(path)
    one = Example(path, (caption or "x",), name or "a")
    framing = Framing(crop=crop, flip=flip, max_upscale=8)
    found = list(frames.frame([one], framing, (64, 96), 32))
    (page,) = sheet.pages(found, "pictures")
    assert page.width == COLUMNS * (SIDE + 2 * GAP) and page.mode == "RGB"


def test_a_picture_that_is_gone_is_crossed_out() -> None:
    one = Framed(Example(Path("gone.png"), ("x",), "gone.png"), faults=("there is no such file",))
    assert has(sheet.cell(one, {}), BAD)


def preview(*words: str) -> int:
    """The exit status of `finetune data preview`."""
    try:
        cli.main(["data", "preview", *words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    example(tmp_path / "pictures" / "a.png", (200, 120))
    example(tmp_path / "pictures" / "b.png", (80, 80))
    (tmp_path / "pictures" / "a.txt").write_text("a cat")
    return tmp_path / "pictures"


def test_the_command_draws_a_folder_as_it_is_and_changes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, output = content(folder), folder.parent / "sheet.png"
    assert preview(str(folder), "--output", str(output)) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(output) and "trained at 64 x 64 (2)" in said.err
    assert content(folder) == before
    with Image.open(output) as sheet_file:
        assert sheet_file.format == "PNG"
    assert preview(str(folder), "--output", str(output)) == 2
    assert "there already" in capsys.readouterr().err


def test_the_command_shows_what_cannot_be_trained_and_says_why(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows 3, 4 and 17: unreadable, and too small; the sheet is drawn all the same."""
    (folder / "c.jpg").write_bytes(b"")
    example(folder / "small.png", (12, 12))
    before, output = content(folder), folder.parent / "sheet.png"
    assert preview(str(folder), "--output", str(output)) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "c.jpg: the file is empty (0 bytes)" in said
    assert "small.png: 12 x 12 pixels are too few for --resolution 64" in said and "x2.67" in said
    with Image.open(output) as page:
        assert has(page.convert("RGB"), BAD)
    assert content(folder) == before


def test_the_command_says_how_far_pictures_are_enlarged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example(folder / "small.png", (40, 40))
    assert preview(str(folder), "--output", str(folder.parent / "sheet.png")) == 0
    assert "enlarged up to x1.60: 1 (small.png)" in capsys.readouterr().err


def test_the_command_needs_a_size_for_a_model_that_is_not_here(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (str(folder), "--output", str(folder.parent / "sheet.png"), "--model", "nobody/none")
    assert preview(*words) == 2
    assert "--resolution" in capsys.readouterr().err
    assert preview(*words, "--resolution", "128") == 0


def test_the_command_takes_concepts_and_masks_from_a_training_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = folder.parent / "masks"
    masks.mkdir()
    Image.new("L", (200, 120), 255).save(masks / "a.png")
    file = folder.parent / "train.toml"
    file.write_text(
        f'[train]\nsteps = 5\n[framing]\nresolution = 128\n[[concepts]]\ndata = "{folder}"\nmasks = "{masks}"\n'
        f'[[concepts]]\ndata = "{folder}"\nprompt = "a photo of sks cat"\n'
    )
    assert preview("--config", str(file), "--output", str(folder.parent / "sheet.png")) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "b.png: no mask of that name" in said and "1 masked; without a mask, trained whole: 2 (a.png, b.png)" in said


def test_the_command_says_what_it_cannot_take(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview(str(folder.parent / "none")) == 2
    assert preview(str(folder), "--max-upscale", "-1") == 2
    assert preview(str(folder), "--pages", "-1") == 2
    assert preview() == 2
    said = capsys.readouterr().err
    assert "no such folder" in said and "--max-upscale" in said and "--pages" in said and "which data" in said
