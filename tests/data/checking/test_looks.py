"""How sharp pictures are and which look alike: measured on the shipped pictures, as they are and spoilt."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from finetune import shelf
from finetune.data.checking import look_memo, looks
from finetune.data.checking.looks import BLURRED, NEAR_BITS, NEAR_COLOURS, Look
from finetune.data.reading import pictures

SHIPPED = sorted(shelf.datasets().glob("*/pictures/*.png"))


def shipped() -> list[Image.Image]:
    return [pictures.decode(path)[0] for path in SHIPPED]


def jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=60)
    return Image.open(file).convert("RGB")


def test_shipped_pictures_are_sharp_and_unlike() -> None:
    assert len(SHIPPED) >= 18
    seen = [looks.look(picture, 64) for picture in shipped()]
    assert min(look.sharpness for look in seen) > 20 * BLURRED
    assert looks.near(seen) == []


def test_blurred_ones_are_found() -> None:
    for picture in shipped():
        soft = picture.filter(ImageFilter.GaussianBlur(2.5))
        assert looks.look(soft, 64).sharpness < BLURRED
    large = planted.picture(1, 640, 480)
    assert looks.look(large, 512).sharpness > BLURRED
    assert looks.look(large.filter(ImageFilter.GaussianBlur(8)), 512).sharpness < BLURRED


def test_sharpness_is_that_at_training_size() -> None:
    picture = planted.picture(1, 640, 640).filter(ImageFilter.GaussianBlur(6))
    assert looks.look(picture, 512).sharpness < BLURRED < looks.look(picture, 64).sharpness


def test_a_background_out_of_focus_is_no_fault() -> None:
    picture = planted.picture(2, 256, 256)
    soft = picture.filter(ImageFilter.GaussianBlur(20))
    soft.paste(picture.crop((64, 64, 128, 128)), (64, 64))
    assert looks.look(soft, 256).sharpness > BLURRED


@pytest.mark.parametrize(
    "spoil",
    [
        jpeg,
        lambda p: p.resize((48, 48), Image.Resampling.LANCZOS),
        lambda p: p.resize((128, 128), Image.Resampling.LANCZOS),
        lambda p: ImageEnhance.Contrast(p).enhance(1.2),
    ],
    ids=["jpeg", "smaller", "larger", "contrast"],
)
def test_near_copies_are_found(spoil: Callable[[Image.Image], Image.Image]) -> None:
    originals = shipped()
    seen = [looks.look(picture, 64) for picture in [*originals, *map(spoil, originals)]]
    found = looks.near(seen)
    right = [group for group in found if len(group) == 2 and group[1] - group[0] == len(originals)]
    assert len(right) >= 0.85 * len(originals) and len(right) == len(found), "most of them, and none that is none"


def test_the_same_shapes_in_other_colours_are_not_alike() -> None:
    base = Image.new("RGB", (64, 64), "red")
    other = Image.new("RGB", (64, 64), "blue")
    assert looks.near([looks.look(base, 64), looks.look(other, 64)]) == []
    assert looks.near([looks.look(base, 64), looks.look(base, 64)]) == [[0, 1]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([64, 512]))
def test_a_picture_of_any_size_has_a_look(width: int, height: int, side: int) -> None:
    look = looks.look(planted.picture(width, width, height), side)
    assert look.sharpness >= 0 and 0 <= look.hash < 2**64 and len(look.thumb) == 192


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2)), max_size=30), st.integers(1, 7))
def test_groups_are_those_of_comparing_each_with_each(drawn: list[tuple[int, int]], block: int) -> None:
    seen = [Look(1.0, number, bytes([shade * 100] * 192)) for number, shade in drawn]

    def alike(a: Look, b: Look) -> bool:
        return abs(a.thumb[0] - b.thumb[0]) <= NEAR_COLOURS and (a.hash ^ b.hash).bit_count() <= NEAR_BITS

    linked = [[alike(a, b) for a in seen] for b in seen]
    reached = np.linalg.matrix_power(np.array(linked, dtype=float), len(seen) or 1) > 0 if seen else np.zeros((0, 0))
    expected = sorted({tuple(np.flatnonzero(row).tolist()) for row in reached if row.sum() > 1})
    assert sorted(map(tuple, looks.near(seen, block))) == expected


def test_looks_are_remembered_by_what_pictures_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [planted.save(tmp_path, f"{number}.png", number) for number in range(4)]
    paths = {pictures.decode(file)[1].digest: file for file in files}
    first = look_memo.looks_of(paths, 64)
    real, decoded = pictures.decode, list[Path]()
    monkeypatch.setattr(pictures, "decode", lambda path, *more: decoded.append(path) or real(path, *more))
    renamed = {digest: path.rename(path.with_name(f"x{path.name}")) for digest, path in paths.items()}
    assert look_memo.looks_of(renamed, 64) == first and decoded == []
    assert [*look_memo.looks_of(renamed, 32)] == [*paths] and len(decoded) == 4, "another size is another look"


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"\1" * 5000])
def test_a_damaged_memory_is_set_aside(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "facts").mkdir(parents=True)
    file = tmp_path / "cache" / "facts" / "looks.sqlite"
    file.write_bytes(content)
    picture = planted.save(tmp_path, "a.png", 1)
    paths = {pictures.decode(picture)[1].digest: picture}
    assert len(look_memo.looks_of(paths, 64)) == 1 and len(look_memo.looks_of(paths, 64)) == 1
    assert (file.parent / "looks.sqlite.damaged").read_bytes() == content
    with sqlite3.connect(file) as known:
        assert known.execute("SELECT count(*) FROM notes").fetchone() == (1,)


def test_without_a_memory_all_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    picture = planted.save(tmp_path, "a.png", 1)
    gone = tmp_path / "gone.png"
    found = look_memo.looks_of({pictures.decode(picture)[1].digest: picture, "gone": gone}, 64)
    assert len(found) == 1, "and a picture that has gone meanwhile has none"


def test_the_hash_is_that_of_imagehash() -> None:
    """Of imagehash 4.3.2, phash of the same pictures."""
    expected = ["9e8222873a76c77c", "d452ee62eea0e913", "98b831efa9778454"]
    pictures = [planted.picture(number, 64, 48) for number in range(3)]
    assert [f"{looks.look(picture, 64).hash:016x}" for picture in pictures] == expected
    assert looks.look(Image.new("RGB", (40, 50), "red"), 64).hash == 1 << 63
