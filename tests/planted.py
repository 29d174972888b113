"""A data set with every fault that a data set can have, one function a row of the list of faults."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from finetune import keys

SIDE = 80
LONG = " ".join(["word"] * 90)
PLACE = "Zugspitze 47.4211"
"""Stands in the EXIF data of a planted picture, and nowhere else ever"""


def picture(number: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """A sharp picture like no other: blocks of random colours."""
    blocks = keys.rng(number, "planted").integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def save(folder: Path, name: str, number: int, caption: str | None = "sks, a thing", **options: object) -> Path:
    path = folder / name
    picture(number).save(path, **options)  # type: ignore[arg-type]
    if caption is not None:
        (folder / f"{name}.txt").write_text(f"{caption}, {number}")
    return path


@dataclass(frozen=True)
class Row:
    """One planted fault."""

    number: int
    plant: Callable[[Path], object]
    code: str
    said: str
    """Part of the finding's text"""
    severity: str = "error"


def good(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        save(folder, f"good{number}.png", number)


def exif(folder: Path, name: str, number: int, orientation: int = 1) -> None:
    data = Image.Exif()
    data[0x0112] = orientation
    data[0x013B] = PLACE
    data.get_ifd(0x8825).update({1: "N", 2: (47.0, 25.0, 16.0), 3: "E", 4: (10.0, 59.0, 7.0)})
    save(folder, name, number, exif=data)


def truncated(folder: Path) -> None:
    path = save(folder, "truncated.jpg", 4)
    path.write_bytes(path.read_bytes()[:-200])


def transparent(folder: Path) -> None:
    image = picture(8)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(folder / "glass.png")
    (folder / "glass.txt").write_text("glass")


def cmyk(folder: Path) -> None:
    picture(9).convert("CMYK").save(folder / "print.jpg", icc_profile=b"not a profile")
    (folder / "print.txt").write_text("print")


def grey16(folder: Path) -> None:
    grey = np.asarray(picture(10).convert("L"), dtype=np.uint16) * 257
    Image.fromarray(grey).save(folder / "deep.png")
    (folder / "deep.txt").write_text("deep")


def animated(folder: Path) -> None:
    picture(11).save(folder / "moves.gif", save_all=True, append_images=[picture(111)])


def huge(folder: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")


def side_files(folder: Path) -> None:
    save(folder, "UPPER.JPG", 14)
    for name in (".DS_Store", "._UPPER.JPG", "Thumbs.db", "notes.xmp"):
        (folder / name).write_bytes(b"\0\1\2")


def shared_caption(folder: Path) -> None:
    for name in ("twin.jpg", "twin.png"):
        save(folder, name, 15 if name.endswith("jpg") else 115, caption=None)
    (folder / "twin.txt").write_text("whose?")


def same(folder: Path) -> None:
    first = save(folder, "same1.png", 16)
    (folder / "same2.png").write_bytes(first.read_bytes())
    (folder / "same2.png.txt").write_text("again")


def nearly_same(folder: Path) -> None:
    save(folder, "near1.png", 116)
    save(folder, "near2.jpg", 116, quality=60)


def small(folder: Path) -> None:
    picture(17, 12, 12).save(folder / "tiny.png")
    (folder / "tiny.txt").write_text("tiny")


def enlarged(folder: Path) -> None:
    picture(117, 48, 48).save(folder / "small.png")
    (folder / "small.txt").write_text("small")


def blurred(folder: Path) -> None:
    picture(50).filter(ImageFilter.GaussianBlur(12)).save(folder / "dull.png")
    (folder / "dull.txt").write_text("dull")


def bad_caption(folder: Path) -> None:
    save(folder, "latin.png", 18, caption=None)
    (folder / "latin.txt").write_bytes("a caf\xe9".encode("latin-1"))


def empty_caption(folder: Path) -> None:
    save(folder, "mute.png", 19, caption=None)
    (folder / "mute.txt").write_bytes(b"\xef\xbb\xbf \n")


def heic(folder: Path) -> None:
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40))


def no_text(folder: Path) -> None:
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "words.jpg").write_text("these are words")


MESSY = [
    Row(3, no_text, "unreadable", "empty.jpg: the file is empty (0 bytes)"),
    Row(3, no_text, "unreadable", "words.jpg: text, not a picture"),
    Row(4, truncated, "unreadable", "truncated.jpg: cut short or damaged"),
    Row(7, lambda f: exif(f, "turned.jpg", 7, 6), "turned", "turned upright by their EXIF data: turned.jpg", "note"),
    Row(8, transparent, "transparent", "transparent, put on the background: glass.png", "note"),
    Row(9, cmyk, "picture", "print.jpg: its colour profile cannot be used", "warning"),
    Row(9, cmyk, "converted", "print.jpg", "note"),
    Row(10, grey16, "converted", "deep.png", "note"),
    Row(11, animated, "animated", "moves.gif: has 2 frames"),
    Row(12, huge, "huge", "huge.png: 10000 x 10000 pixels"),
    Row(13, heic, "decoder", "phone.heic: a picture in HEIC format, which needs a decoder: install pillow-heif"),
    Row(14, side_files, "unused", "notes.xmp", "note"),
    Row(15, shared_caption, "caption-file", "twin.txt: whose caption is it? It could be that of twin.jpg and twin.png"),
    Row(16, same, "duplicate", "the same picture: same1.png, same2.png", "warning"),
    Row(16, nearly_same, "near-duplicate", "look alike: near1.png, near2.jpg", "warning"),
    Row(17, small, "size", "tiny.png: 12 x 12 pixels"),
    Row(17, enlarged, "enlarged", "small.png: enlarged x1.33", "warning"),
    Row(18, bad_caption, "caption-file", "latin.txt: not UTF-8 (byte 0xe9 at offset 5)"),
    Row(19, empty_caption, "caption-missing", "mute.png: its caption file is empty"),
    Row(20, lambda f: save(f, "long.png", 20, LONG), "caption-long", "long.png: the caption is longer", "warning"),
    Row(44, lambda f: exif(f, "place.jpg", 44), "private", "hold the place where they were taken", "note"),
    Row(0, blurred, "blurred", "dull.png: blurred", "warning"),
]
"""Faults that one folder of pictures with caption files can have at the same time"""


def table(folder: Path) -> None:
    """Rows 21 and 22: names that lead out of the folder, a broken line, a missing picture, one that is named twice."""
    good(folder)
    outside = folder.parent / "outside.png"
    picture(21).save(outside)
    os.symlink(outside, folder / "link.png")
    names = ["good0.png", "good0.png", "gone.png", "../outside.png", str(outside), "link.png"]
    lines = [json.dumps({"file_name": name, "text": "a thing"}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join([*lines, '{"file_name": "good1.png", "text"']))
    for caption in folder.glob("*.txt"):
        caption.unlink()


TABLE = [
    Row(21, table, "table", "../outside.png"),
    Row(21, table, "table", "outside.png"),
    Row(21, table, "table", "link.png"),
    Row(22, table, "table", "gone.png"),
    Row(22, table, "table", "good0.png"),
    Row(22, table, "table", "line 7"),
]
"""Those of a folder with a table"""


def everything(root: Path) -> Path:
    """All of it: four concepts in a TOML file. The file."""
    good(root / "messy")
    for plant in dict.fromkeys(row.plant for row in MESSY):
        plant(root / "messy")
    (root / "nothing" / "below").mkdir(parents=True)
    (root / "nothing" / "notes.md").write_text("no pictures here")
    table(root / "table")
    texts = [f'[[concepts]]\ndata = "{root / name}"\n' for name in ("messy", "gone", "nothing", "table")]
    file = root / "all.toml"
    file.write_text('recipe = "lora"\n[train]\nbatch_size = 100\n[adapter]\nrank = 4\n' + "\n".join(texts))
    return file


def snapshot(root: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Every file and folder below, with mode, time and content."""
    found = {}
    for path in sorted(root.rglob("*")):
        state = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        found[str(path.relative_to(root))] = (state.st_mode, state.st_mtime_ns, content)
    return found
