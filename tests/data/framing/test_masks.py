"""Masks: found, checked, and averaged to latent resolution through the picture's own geometry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.examples import Example, pixels
from finetune.data.framing import frames, geometry, masks
from finetune.data.framing.geometry import Geometry
from finetune.data.plan import plan
from finetune.data.reading import pictures
from finetune.errors import Fault
from finetune.settings import Framing

SIDES = st.integers(8, 90)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("pictures", "masks"):
        (tmp_path / name).mkdir()
    return tmp_path / "pictures", tmp_path / "masks"


def picture(folder: Path, name: str, size: tuple[int, int] = (80, 60)) -> Example:
    path = folder / name
    Image.new("RGB", size, "teal").save(path)
    return Example(path, ("x",), name, facts=pictures.decode(path)[1])


def mask(path: Path, size: tuple[int, int] = (80, 60), box: tuple[int, int, int, int] = (20, 10, 40, 30)) -> Path:
    levels = Image.new("L", size, 0)
    levels.paste(255, box)
    levels.save(path)
    return path


def example_size(example: Example) -> tuple[int, int]:
    assert example.facts is not None
    return example.facts.width, example.facts.height


def test_masks_are_found_by_stem_or_whole_name(folders: tuple[Path, Path]) -> None:
    shown, hidden = folders
    examples = [picture(shown, "a.jpg"), picture(shown, "a.png"), picture(shown, "b.png")]
    mask(hidden / "a.jpg.png"), mask(hidden / "a.png.png"), mask(hidden / "b.bmp")
    found, faults = masks.attach(examples, hidden, alpha=False)
    assert faults == []
    assert [one.mask and one.mask.name for one in found] == ["a.jpg.png", "a.png.png", "b.bmp"]


def test_all_that_is_wrong_with_masks_is_said(folders: tuple[Path, Path]) -> None:
    shown, hidden = folders
    names = ["a.jpg", "a.png", "b.png", "c.png", "d.png", "e.png", "f.png", "g.png", "h.png", "i.png"]
    examples = [picture(shown, name) for name in names]
    mask(hidden / "a.png")
    mask(hidden / "b.png"), mask(hidden / "b.bmp")
    mask(hidden / "c.png", (60, 80), (10, 10, 20, 20))
    mask(hidden / "d.png", (80, 80))
    mask(hidden / "e.png", box=(0, 0, 0, 0))
    Image.new("L", (80, 60), 1).save(hidden / "f.png")
    (hidden / "g.png").write_bytes(b"text")
    mask(hidden / "i.png", (40, 30))
    _, faults = masks.attach(examples, hidden, alpha=False)
    said = {line.split(":")[0]: line for line in faults}
    assert list(said) == ["a.jpg", "a.png", "b.png", "c.png", "d.png", "e.png", "f.png", "g.png", "h.png"]
    assert "a.png would be the mask of a.jpg, a.png: name it a.jpg.png" in said["a.jpg"]
    assert "several masks: b.bmp, b.png" in said["b.png"]
    assert "turned by 90 degrees" in said["c.png"]
    assert "80 x 80 pixels, the picture (upright) 80 x 60" in said["d.png"]
    assert "black all over" in said["e.png"]
    assert "nowhere brighter than 1 of 255" in said["f.png"]
    assert "text, not a picture" in said["g.png"]
    assert "no mask of that name" in said["h.png"]


def test_a_mask_that_the_example_has_already_stays(folders: tuple[Path, Path]) -> None:
    shown, hidden = folders
    own = Example(picture(shown, "a.png").path, ("x",), mask=mask(hidden / "other.png"))
    mask(hidden / "a.png")
    found, faults = masks.attach([own], hidden, alpha=True)
    assert faults == [] and found == [own]


def test_a_folder_that_is_not_there_is_said(folders: tuple[Path, Path]) -> None:
    with pytest.raises(Fault, match="no such folder"):
        masks.attach([picture(folders[0], "a.png")], folders[1] / "none", alpha=False)


@settings(deadline=None, max_examples=40)
@given(
    levels=st.lists(st.integers(0, 255), min_size=12, max_size=12).filter(lambda values: max(values) >= 128),
    colour=st.tuples(*[st.integers(0, 255)] * 3),
)
def test_the_alpha_channel_is_read_exactly(
    tmp_path_factory: pytest.TempPathFactory, levels: list[int], colour: tuple[int, int, int]
) -> None:
    path = tmp_path_factory.mktemp("alpha") / "a.png"
    image = Image.new("RGBA", (4, 3), (*colour, 255))
    wanted = np.array(levels, np.uint8).reshape(3, 4)
    image.putalpha(Image.fromarray(wanted))
    image.save(path)
    example = Example(path, ("x",), facts=pictures.decode(path)[1])
    (found,), faults = masks.attach([example], None, alpha=True)
    assert faults == []
    if min(levels) < 255:
        assert found.mask == path and np.array_equal(masks.levels(found), wanted)
    else:
        assert found.mask is None  # opaque: trained whole


def test_an_alpha_channel_of_nothing_is_said(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    _, faults = masks.attach([Example(tmp_path / "a.png", ("x",), "a.png")], None, alpha=True)
    assert len(faults) == 1 and "its transparency is black all over" in faults[0]


@settings(deadline=None, max_examples=200)
@given(
    height=SIDES, width=SIDES, target=st.tuples(st.integers(8, 90), st.integers(8, 90)), cells=st.integers(1, 12),
    mirrored=st.booleans(), focus=st.tuples(st.floats(0, 1), st.floats(0, 1)), seed=st.integers(0, 99),
)  # fmt: skip
def test_means_are_exact(
    height: int,
    width: int,
    target: tuple[int, int],
    cells: int,
    mirrored: bool,
    focus: tuple[float, float],
    seed: int,
) -> None:
    """Against the definition: each mask pixel's overlap with each cell, by brute force."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    view = geometry.around((height, width), target, focus)
    view = view.mirror() if mirrored else view
    found = masks.averaged(levels, view, (cells, cells + 1))
    assert found.shape == (cells, cells + 1) and found.min() > -1e-9 and found.max() < 1 + 1e-9
    top, left, bottom, right = view.box
    rows = _overlaps(np.linspace(top, bottom, cells + 1) * height, height)
    columns = _overlaps(np.linspace(left, right, cells + 2) * width, width)
    seen = levels[:, ::-1] if mirrored else levels
    assert np.allclose(found, rows @ (seen / 255) @ columns.T, atol=1e-9)


def _overlaps(edges: np.ndarray, count: int) -> np.ndarray:
    pixel = np.arange(count)
    inside = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return inside.clip(0) / np.diff(edges)[:, None]


def test_weights_stand_where_the_picture_stands(tmp_path: Path) -> None:
    """A white square on black is both picture and mask: scaled, cropped and mirrored alike."""
    drawn = Image.new("L", (120, 80), 0)
    drawn.paste(255, (70, 16, 102, 48))
    drawn.save(tmp_path / "a.png")
    example = Example(tmp_path / "a.png", ("x",), mask=mask(tmp_path / "m.png", (240, 160), (140, 32, 204, 96)))
    for view in (geometry.centre((80, 120), (32, 32)), geometry.around((80, 120), (64, 32), (0.7, 0.4)).mirror()):
        found = masks.weights(example, view, (view.target[0] // 4, view.target[1] // 4))
        seen = (pixels(example, view)[:1] + 1) / 2
        expected = torch.nn.functional.avg_pool2d(seen[None], 4)[0]
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert (found - expected).abs().max() < 0.08 and (found - expected).abs().mean() < 0.02  # Lanczos rings
        assert found.max() == 1 and found.min() == 0


def test_weights_of_a_mask_that_was_changed_are_the_new_ones(tmp_path: Path) -> None:
    example = picture(tmp_path, "a.png", (64, 64))
    view = Geometry((64, 64), (0, 0), (64, 64))
    with_mask = Example(example.path, ("x",), mask=mask(tmp_path / "m.png", (64, 64), (0, 0, 64, 64)))
    assert masks.weights(with_mask, view, (8, 8)).eq(1).all()
    mask(tmp_path / "m.png", (64, 64), (0, 0, 32, 64))
    assert masks.weights(with_mask, view, (8, 8)).sum() == 32


def test_the_middle_of_a_mask(tmp_path: Path) -> None:
    example = Example(Path("a.png"), ("x",), mask=mask(tmp_path / "m.png"))
    assert masks.middle(masks.levels(example)) == pytest.approx((30 / 80, 20 / 60))


def test_the_focus_is_the_pictures_own_then_the_settings_then_the_masks_middle(tmp_path: Path) -> None:
    example = picture(tmp_path, "a.png", (400, 100))
    masked = mask(tmp_path / "m.png", (400, 100), (80, 0, 380, 100))

    def left(own: tuple[float, float] | None, given: tuple[float, float] | None) -> int:
        one = Example(example.path, ("x",), "a.png", focus=own, mask=masked, facts=example.facts)
        framing = Framing(crop="focus", focus=given, buckets=False, min_kept=0)
        return plan([one], framing, (96,), 32)[0].views[0].crop[1]

    assert left(None, None) == round(0.575 * 384 - 48)
    assert left(None, (0.5, 0.5)) == 192 - 48
    assert left((0.25, 0.5), (0.5, 0.5)) == 96 - 48


def test_a_crop_to_a_focus_that_is_nowhere_is_said(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="--focus X Y") as caught:
        plan([picture(tmp_path, "a.png")], Framing(crop="focus"), (64,), 32)
    assert caught.value.details == ["a.png: no focus for a crop to keep in view"]


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_a_crop_that_shows_nothing_of_its_mask_is_refused_and_random_ones_are_left_out(
    tmp_path: Path, name: str
) -> None:
    example = picture(tmp_path, "a.png", (400, 100 + ord(name) % 4))
    masked = mask(tmp_path / "m.png", example_size(example), (380, 0, 400, 100))
    one = Example(example.path, ("x",), "a.png", mask=masked, facts=example.facts)
    with pytest.raises(Fault, match="--crop focus") as caught:
        plan([one], Framing(buckets=False, min_kept=0), (96,), 32)
    assert "nothing that its mask lets through" in caught.value.details[0]
    wide = Framing(buckets=False, min_kept=0, crop="random", crop_variants=6, flip=True)
    (item,) = plan([one], wide, (96,), 32)
    assert 2 <= len(item.views) < 12 and item.views[0].crop[1] > 260
    assert {view.mirror() if view.mirrored else view for view in item.views} == set(item.views[: len(item.views) // 2])
    assert all(masks.weights(one, view, (12, 12)).sum() > 0 for view in item.views)


def test_the_summary_says_what_is_masked(tmp_path: Path) -> None:
    shown = [picture(tmp_path, "a.png"), picture(tmp_path, "b.png")]
    masked = Example(shown[0].path, ("x",), "a.png", mask=mask(tmp_path / "m.png"), facts=shown[0].facts)
    lines = frames.describe(list(frames.frame([masked, shown[1]], Framing(), (64,), 32)))
    assert "1 masked; without a mask, trained whole: 1 (b.png)" in lines


def test_a_mask_that_went_bad_is_told_with_the_picture(tmp_path: Path) -> None:
    example = picture(tmp_path, "a.png")
    one = Example(example.path, ("x",), "a.png", mask=tmp_path / "gone.png", facts=example.facts)
    with pytest.raises(Fault) as caught:
        plan([one], Framing(), (64,), 32)
    assert caught.value.details == ["a.png: its mask gone.png: there is no such file"]
