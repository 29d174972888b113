"""Scaling, cropping and SDXL's size values."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.examples import Example, pixels
from finetune.data.framing import geometry
from finetune.data.framing.geometry import Geometry
from finetune.data.reading.pictures import BadPicture, Facts
from finetune.settings import Framing

SIDES = st.integers(1, 400)
TARGETS = st.tuples(st.integers(8, 128), st.integers(8, 128))


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 255 / width, y * 255 / height, (x ^ y) % 256], -1).astype(np.uint8))


def test_the_values_told_to_sdxl_are_the_true_ones() -> None:
    """A portrait of 600 x 800 at 512: scaled to 512 x 683, of which 85 rows above the crop are cut."""
    placed = geometry.centre((800, 600), (512, 512))
    assert placed == Geometry(original=(800, 600), crop=(85, 0), target=(512, 512))
    assert placed.scaled == (683, 512)
    assert placed.tensor().tolist() == [800, 600, 85, 0, 512, 512]
    assert placed.tensor().dtype == torch.float32


def test_scale_and_share() -> None:
    placed = geometry.centre((100, 400), (200, 200))
    assert placed.scale == 2 and placed.kept == 0.25 and placed.crop == (0, 300)


@given(height=SIDES, width=SIDES, resolution=st.integers(8, 128))
def test_the_crop_lies_inside_and_in_the_middle(height: int, width: int, resolution: int) -> None:
    placed = geometry.centre((height, width), (resolution, resolution))
    assert min(placed.scaled) == resolution
    for start, inner, outer in zip(placed.crop, placed.target, placed.scaled, strict=True):
        assert start >= 0 and start + inner <= outer
        assert abs(start - (outer - inner - start)) <= 1
    assert 0 < placed.kept <= 1
    assert math.isclose(placed.scale, resolution / min(height, width))


@given(height=SIDES, width=SIDES, target=TARGETS)
def test_any_target_is_covered(height: int, width: int, target: tuple[int, int]) -> None:
    placed = geometry.centre((height, width), target)
    assert all(outer >= inner for outer, inner in zip(placed.scaled, target, strict=True))
    assert geometry.crop(Image.new("RGB", (width, height)), placed).size == target[::-1]


@settings(deadline=None, max_examples=50)
@given(height=st.integers(8, 200), width=st.integers(8, 200), resolution=st.integers(8, 64))
def test_cropping_is_scaling_all_and_cutting(height: int, width: int, resolution: int) -> None:
    picture = gradient(width, height)
    placed = geometry.centre((height, width), (resolution, resolution))
    whole = picture.resize(placed.scaled[::-1], Image.Resampling.LANCZOS)
    top, left = placed.crop
    cut = whole.crop((left, top, left + resolution, top + resolution))
    apart = np.abs(np.asarray(geometry.crop(picture, placed), int) - np.asarray(cut, int))
    assert apart.max() <= 16 and apart.mean() < 0.3  # the filter's window is rounded to whole pixels in another place


def test_a_strip_takes_no_more_memory_than_its_crop() -> None:
    """Scaled whole, it would be 512 x 40 million pixels."""
    placed = geometry.centre((1, 80_000), (512, 512))
    assert geometry.crop(Image.new("RGB", (80_000, 1), "red"), placed).getpixel((256, 256)) == (255, 0, 0)


def test_pixels_are_upright_in_range_and_in_place(tmp_path: Path) -> None:
    """A photo taken with the camera held sideways: red above, blue below once upright."""
    upright = Image.new("RGB", (60, 80), "red")
    upright.paste("blue", (0, 40, 60, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    placed = geometry.centre((80, 60), (30, 30))
    tensor = pixels(Example(path, ("x",)), placed)
    assert tensor.shape == (3, 30, 30) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert placed == Geometry((80, 60), (5, 0), (30, 30))
    assert torch.equal(tensor[:, 2, 15], torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(tensor[:, 27, 15], torch.tensor([-1.0, -1.0, 1.0]))
    assert tensor.min() >= -1 and tensor.max() <= 1


def test_pixels_equal_the_picture_where_nothing_is_scaled(tmp_path: Path) -> None:
    picture = gradient(32, 32)
    picture.save(tmp_path / "a.png")
    tensor = pixels(Example(tmp_path / "a.png", ("x",)), geometry.centre((32, 32), (32, 32)))
    assert np.array_equal(((tensor + 1) * 127.5).round().permute(1, 2, 0).numpy(), np.asarray(picture))


@settings(deadline=None, max_examples=50)
@given(height=st.integers(8, 100), width=st.integers(8, 100), target=TARGETS, share=st.floats(0, 1))
def test_a_mirrored_view_shows_the_same_part_mirrored(
    height: int, width: int, target: tuple[int, int], share: float
) -> None:
    picture = gradient(width, height)
    view = geometry.around((height, width), target, (share, share))
    mirrored = view.mirror()
    assert mirrored.mirrored and mirrored.mirror() == view
    turned = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    seen, expected = geometry.crop(turned, mirrored), geometry.crop(picture, view)
    apart = np.asarray(seen, int) - np.asarray(expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT), int)
    assert np.abs(apart).max() <= 8  # sums of the filter are rounded in another order


@pytest.mark.parametrize("width", [40, 41])
def test_pixels_of_a_mirrored_view_are_those_of_a_mirrored_file(tmp_path: Path, width: int) -> None:
    picture = gradient(width, 16)
    picture.save(tmp_path / "a.png")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    view = geometry.centre((16, width), (16, 16)).mirror()
    told = replace(view, mirrored=False)
    of_file = pixels(Example(tmp_path / "mirrored.png", ("x",)), told)
    assert torch.equal(pixels(Example(tmp_path / "a.png", ("x",)), view), of_file)
    assert torch.equal(view.tensor(), told.tensor())  # what SDXL is told is true of the mirrored picture
    assert view.crop == (0, width - 16 - (width - 16) // 2)


@given(height=SIDES, width=SIDES, target=TARGETS, x=st.floats(0, 1), y=st.floats(0, 1))
def test_the_focus_is_as_near_the_middle_as_the_edges_allow(
    height: int, width: int, target: tuple[int, int], x: float, y: float
) -> None:
    view = geometry.around((height, width), target, (x, y))
    for start, inner, outer, share in zip(view.crop, target, view.scaled, (y, x), strict=True):
        assert 0 <= start <= outer - inner
        point = share * outer
        assert start - 1e-6 <= point <= start + inner + 1e-6
        off = point - (start + inner / 2)
        assert abs(off) <= 0.51 or (start == 0 and off < 0) or (start == outer - inner and off > 0)


def test_the_focus_of_a_mirror_image_is_mirrored() -> None:
    facts = Facts(100, 400, False, False, digest="d")
    whole, mirrored = geometry.views(facts, (100, 100), Framing(crop="focus", flip=True), (0.2, 0.5))
    assert (whole.crop, whole.mirrored) == ((0, 30), False)
    assert (mirrored.crop, mirrored.mirrored) == ((0, 270), True)  # the point is at 0.8 there


@given(height=SIDES, width=SIDES, target=TARGETS, count=st.integers(1, 9), seed=st.integers(0, 5))
def test_random_places_are_distinct_inside_and_repeatable(
    height: int, width: int, target: tuple[int, int], count: int, seed: int
) -> None:
    facts = Facts(height, width, False, False, digest=f"{height}")
    framing = Framing(crop="random", crop_variants=count)
    found = geometry.views(facts, target, framing, seed=seed)
    assert found == geometry.views(facts, target, framing, seed=seed)
    assert 1 <= len(found) <= count and len(set(found)) == len(found)
    for view in found:
        assert view.target == target and not view.mirrored
        assert all(0 <= a <= outer - b for a, b, outer in zip(view.crop, target, view.scaled, strict=True))
    slack = max(outer - inner for outer, inner in zip(found[0].scaled, target, strict=True))
    assert len(found) == min(count, 1 + slack // geometry.APART)


def test_random_places_reach_all_parts_and_differ_between_pictures_and_seeds() -> None:
    def places(digest: str, seed: int) -> list[int]:
        facts, framing = Facts(64, 1064, False, False, digest=digest), Framing(crop="random", crop_variants=4)
        return [view.crop[1] for view in geometry.views(facts, (64, 64), framing, seed=seed)]

    for part, place in enumerate(places("a", 0)):
        assert 1001 * part // 4 <= place < 1001 * (part + 1) // 4
    assert len({tuple(places(digest, seed)) for digest in "ab" for seed in (0, 1)}) == 4
    many = [place for seed in range(200) for place in places("a", seed)]
    assert min(many) < 10 and max(many) > 990 and abs(np.mean(many) - 500) < 20


def test_a_flip_doubles_the_views() -> None:
    facts = Facts(64, 400, False, False, digest="d")
    found = geometry.views(facts, (64, 64), Framing(crop="random", flip=True))
    assert [view.mirrored for view in found] == [False] * 4 + [True] * 4
    assert [view.mirror() for view in found[4:]] == list(found[:4])
    assert len(geometry.views(facts, (64, 64), Framing(flip=True))) == 2


def test_transparent_parts_take_the_background(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    view = geometry.centre((8, 8), (8, 8))
    assert torch.equal(pixels(Example(tmp_path / "a.png", ("x",)), view), torch.ones(3, 8, 8))
    assert torch.equal(pixels(Example(tmp_path / "a.png", ("x",)), view, "black"), -torch.ones(3, 8, 8))


def test_a_picture_that_went_away_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadPicture, match=r"gone\.png: there is no such file"):
        pixels(Example(tmp_path / "gone.png", ("x",)), geometry.centre((8, 8), (8, 8)))
