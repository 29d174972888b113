"""What the run's summary says of the pictures (rows 7, 8, 14, 17, 19)."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from finetune import data
from finetune.settings import Data


def test_everything_done_to_the_pictures_is_counted_and_named(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "b.png")
    Image.new("RGB", (128, 128)).save(tmp_path / "c.png", icc_profile=b"garbage")
    Image.new("RGB", (10, 10)).save(tmp_path / "d.png")
    (tmp_path / "c.txt").write_text("a dog")
    for name in ("README.txt", "notes.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "more").mkdir()
    examples = data.read(Data(tmp_path, prompt="sks", flip=True, skip=("d.png",)))
    lines = data.describe(examples, 128)
    assert lines[:-2] == [
        "3 pictures of 64 x 64 to 200 x 300 pixels, and 3 mirrored",
        "smaller than the training size, enlarged up to x2.00: 1 (b.png)",
        "the centre crop keeps 67% to 100% of each picture",
        "turned upright by their EXIF data: 1 (a.jpg)",
        "transparent, put on the background: 1 (b.png)",
        "1 caption from a file",
        '"sks" for those without: 2 (a.jpg, b.png)',
        "left out by --skip: 1 (d.png)",
        "other files, left alone: 2 (notes.md, README.txt)",
        "sub-folders, not entered: 1 (more)",
    ]
    assert lines[-2].startswith("b.png: entirely transparent") and lines[-1].startswith("c.png: its colour profile")


def test_a_plain_folder_takes_two_lines(tmp_path: Path) -> None:
    for name in "abcdefgh":
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    examples = data.read(Data(tmp_path, prompt="a photo of sks dog"))
    assert data.describe(examples) == ["8 pictures of 32 x 32 pixels", '"a photo of sks dog" for 8']
    assert data.describe(examples, 64)[1].endswith("x2.00: 8 (a.png, b.png, c.png, d.png, e.png, f.png, ...)")
    assert data.describe([data.Example(one.path, one.caption) for one in examples]) == data.describe(examples)
