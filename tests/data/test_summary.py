"""What the run's summary says of the pictures (rows 7, 8, 14, 17, 19, 20)."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from transformers import CLIPTokenizer

from finetune import data, toybox
from finetune.data.examples import Item
from finetune.data.framing import geometry
from finetune.settings import Concept, Data


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
    examples, _ = data.read(Data(str(tmp_path), prompt="sks", skip=("d.png",)))
    lines = data.describe(examples)
    assert lines[:-2] == [
        "3 pictures of 64 x 64 to 200 x 300 pixels",
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
    examples, _ = data.read(Data(str(tmp_path), prompt="a photo of sks dog"))
    assert data.describe(examples) == ["8 pictures of 32 x 32 pixels", '"a photo of sks dog" for 8']
    assert data.describe([data.Example(one.path, one.captions) for one in examples]) == data.describe(examples)


def test_items_say_how_they_are_framed(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (32, 24)).save(tmp_path / f"{name}.png")
    examples, _ = data.read(Data(str(tmp_path), prompt="p"))
    views = tuple(geometry.Geometry((24, 32), crop, (64, 64)) for crop in ((0, 0), (0, 20)))
    flipped = geometry.Geometry((24, 32), (0, 0), (64, 64), mirrored=True)
    items = [Item(one, (*views, flipped), ("p", "q")) for one in examples]
    lines = data.describe([*items, *items])
    assert lines[0] == "2 pictures of 32 x 24 pixels, up to 2 crops of each, mirrored too"
    assert any("64 x 64" in line for line in lines[1:]) and any("x2.67" in line for line in lines)
    assert lines[-1] == "1 further caption by shuffled or dropped tags"


def test_concepts_are_counted(tmp_path: Path) -> None:
    for name, count in (("one", 2), ("two", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    given = Data(prompt="p", concepts=(Concept(str(tmp_path / "one")), Concept(str(tmp_path / "two"), repeats=4)))
    assert data.describe(data.read(given)[0])[1] == "2 concepts: 1: 2; 2: 1, 4 an epoch"


def test_row_20_the_text_that_is_cut_off_is_shown(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a " * 80 + "and the end")
    examples, _ = data.read(Data(str(tmp_path), prompt="a dog"))
    tokenizer = CLIPTokenizer.from_pretrained(Path(toybox.__file__).parent / "weights" / "tokenizer")
    said = [line for line in data.describe(examples, [tokenizer]) if "text encoder" in line]
    assert said == ['too long for the text encoder, which does not see "a a a a a and the end": a.png']
