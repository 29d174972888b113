"""Scaling, cropping and SDXL's size values."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data import BadPicture, Example, Geometry, geometry, pixels

SIDES = st.integers(1, 400)


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


@given(height=SIDES, width=SIDES, target=st.tuples(st.integers(8, 128), st.integers(8, 128)))
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
    tensor, placed = pixels(Example(path, "x"), 30)
    assert tensor.shape == (3, 30, 30) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert placed == Geometry((80, 60), (5, 0), (30, 30))
    assert torch.equal(tensor[:, 2, 15], torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(tensor[:, 27, 15], torch.tensor([-1.0, -1.0, 1.0]))
    assert tensor.min() >= -1 and tensor.max() <= 1


def test_pixels_equal_the_picture_where_nothing_is_scaled(tmp_path: Path) -> None:
    picture = gradient(32, 32)
    picture.save(tmp_path / "a.png")
    tensor, _ = pixels(Example(tmp_path / "a.png", "x"), 32)
    assert np.array_equal(((tensor + 1) * 127.5).round().permute(1, 2, 0).numpy(), np.asarray(picture))


@pytest.mark.parametrize("width", [40, 41])
def test_a_mirror_image_is_the_mirrored_picture_cropped(tmp_path: Path, width: int) -> None:
    picture = gradient(width, 16)
    picture.save(tmp_path / "a.png")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    flipped, placed = pixels(Example(tmp_path / "a.png", "x", flip=True), 16)
    expected, same = pixels(Example(tmp_path / "mirrored.png", "x"), 16)
    assert torch.equal(flipped, expected) and placed == same
    assert torch.equal(flipped, pixels(Example(tmp_path / "a.png", "x"), 16)[0].flip(2)) == (width == 40)


def test_transparent_parts_take_the_background(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert torch.equal(pixels(Example(tmp_path / "a.png", "x"), 8)[0], torch.ones(3, 8, 8))
    assert torch.equal(pixels(Example(tmp_path / "a.png", "x"), 8, "black")[0], -torch.ones(3, 8, 8))


def test_a_picture_that_went_away_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadPicture, match=r"gone\.png: there is no such file"):
        pixels(Example(tmp_path / "gone.png", "x"), 8)
