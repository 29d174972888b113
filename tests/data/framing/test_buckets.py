"""The size that each picture is trained at: none lost, none enlarged too far, most of it kept."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune.data.examples import Example
from finetune.data.framing import buckets, frames, geometry
from finetune.data.framing.buckets import Unfit, bucket
from finetune.data.order import Order
from finetune.data.plan import items, plan
from finetune.data.reading.pictures import Facts
from finetune.errors import Fault
from finetune.settings import Captions, Framing

SHARES = {(512, 64): (0.85, 0.83), (768, 64): (0.90, 0.88), (1024, 64): (0.92, 0.91), (1024, 32): (0.96, 0.95),
          (64, 32): (0.57, 0.50)}  # fmt: skip
"""(resolution, multiple) -> the share kept of a picture up to 4:1 that is large enough, and of a smaller one."""
SIDE = st.integers(1, 6000)


@pytest.mark.parametrize(("resolution", "multiple"), SHARES)
def test_the_stated_shares_stand_in_the_docstring(resolution: int, multiple: int) -> None:
    text = " ".join((bucket.__doc__ or "").split())
    assert f"{resolution} ({multiple}" in text
    assert ", ".join(f"{share * 100:.0f}" for share in SHARES[resolution, multiple]) + " %" in text


@settings(deadline=None, max_examples=1000)
@given(case=st.sampled_from(list(SHARES)), area=st.floats(0.5, 30), aspect=st.floats(0.25, 4))
@example(case=(512, 64), area=2.0, aspect=math.sqrt(0.3077 * 0.4167))
@example(case=(64, 32), area=1.0, aspect=1 / math.sqrt(3))
@example(case=(64, 32), area=0.5, aspect=2.0)
def test_no_picture_is_lost_enlarged_too_far_or_cropped_beyond_the_stated_share(
    case: tuple[int, int], area: float, aspect: float
) -> None:
    """Acceptance 5, over any picture up to 4:1 that has half the side of the resolution when it is enlarged."""
    (resolution, multiple), framing = case, Framing(min_kept=0)
    side = resolution / 2 / framing.max_upscale * area
    original = math.ceil(side / math.sqrt(aspect)), math.ceil(side * math.sqrt(aspect))
    if math.prod(original) < (resolution / 4) ** 2 or min(original) < multiple / 2 or max(original) > 4 * min(original):
        return
    target = bucket(original, resolution, multiple, framing)
    placed = geometry.centre(original, target)
    assert all(side % multiple == 0 for side in target) and math.prod(target) <= resolution**2
    assert placed.scale <= framing.max_upscale * (1 + 1e-6)
    whole, smaller = SHARES[case]
    full_size = target in buckets.full(resolution, multiple)
    assert placed.kept >= (whole if full_size else smaller)


@pytest.mark.parametrize(("resolution", "multiple"), SHARES)
def test_between_two_buckets_the_stated_share_is_kept(resolution: int, multiple: int) -> None:
    """The exact worst case: the geometric mean of neighbouring aspect ratios keeps the root of their quotient."""
    aspects = sorted({wide / tall for tall, wide in buckets.full(resolution, multiple)})
    assert aspects[0] == 0.25 and aspects[-1] == 4
    worst = min(math.sqrt(one / other) for one, other in pairwise(aspects))
    stated = SHARES[resolution, multiple][0]
    assert stated <= worst < stated + 0.01


@settings(deadline=None, max_examples=300)
@given(height=SIDE, width=SIDE, case=st.sampled_from(list(SHARES)), most=st.floats(0.25, 4), square=st.booleans())
def test_any_picture_gets_a_size_or_a_true_reason(
    height: int, width: int, case: tuple[int, int], most: float, square: bool
) -> None:
    resolution, multiple = case
    framing = Framing(min_kept=0, max_upscale=most, buckets=not square)
    try:
        target = bucket((height, width), resolution, multiple, framing)
    except Unfit as fault:
        assert height * width * most**2 < (resolution / 2) ** 2 or min(height, width) * most < multiple
        told = float(fault.message.split("enlarged x")[1].split(",")[0])
        assert told > most * 0.999
        bucket((height, width), resolution, multiple, Framing(min_kept=0, max_upscale=told, buckets=not square))
    else:
        assert geometry.centre((height, width), target).scale <= most * (1 + 1e-6)
        assert not square or target[0] == target[1]
        if target not in buckets.full(resolution, multiple, square):  # smaller only where it must be
            best = max(buckets.full(resolution, multiple, square), key=lambda size: _share((height, width), size))
            assert geometry.centre((height, width), best).scale > most


def test_sdxl_gets_sizes_of_its_own_table() -> None:
    """Podell et al. 2023, appendix I; left out are those for whose height it has a wider one."""
    known = {(512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600),
             (640, 1536), (704, 1472), (704, 1408), (768, 1344), (768, 1280), (832, 1216), (896, 1152), (960, 1088),
             (1024, 1024)}  # fmt: skip
    assert {tuple(sorted(size)) for size in buckets.full(1024, 64)} == known


def test_the_buckets_of_the_toybox() -> None:
    assert buckets.full(64, 32) == ((32, 96), (32, 128), (64, 64), (96, 32), (128, 32))


@pytest.mark.parametrize(
    ("original", "target"),
    [((1440, 1440), (512, 512)), ((1080, 1920), (384, 640)), ((1200, 800), (640, 384)), ((300, 400), (448, 576)),
     ((300, 300), (512, 512)), ((200, 200), (384, 384)), ((128, 128), (256, 256))],
)  # fmt: skip
def test_examples(original: tuple[int, int], target: tuple[int, int]) -> None:
    assert bucket(original, 512, 64, Framing()) == target


def test_too_small_says_how_much_and_what_to_do() -> None:
    with pytest.raises(Unfit) as caught:
        bucket((127, 127), 512, 64, Framing())
    assert caught.value.message == (
        "127 x 127 pixels are too few for --resolution 512: even at the smallest size they would be enlarged x2.02, "
        "more than --max-upscale 2"
    )
    assert "--max-upscale" in caught.value.advice


def test_too_little_kept_says_the_share_and_what_to_do() -> None:
    with pytest.raises(Unfit, match=r"5120 x 512 pixels cut to 1024 x 256 keep 40% .* --min-kept 0\.5") as caught:
        bucket((512, 5120), 512, 64, Framing())
    assert "--min-kept" in caught.value.advice and "--buckets" not in caught.value.advice
    with pytest.raises(Unfit, match="cut to 512 x 512 keep 33%") as caught:
        bucket((512, 1536), 512, 64, Framing(buckets=False))
    assert "--buckets" in caught.value.advice


@pytest.mark.parametrize(("resolution", "near"), [(500, "448 or 512"), (32, "64"), (0, "64"), (-64, "64")])
def test_a_resolution_that_the_model_has_not_is_refused(resolution: int, near: str) -> None:
    with pytest.raises(Fault, match=rf"multiples of 64\. Nearest: {near}\."):
        bucket((512, 512), resolution, 64, Framing())


def test_an_epoch_of_1000_random_sizes_loses_none_and_each_item_has_one_shape() -> None:
    pictures = [_example(n, (97 * n % 1900 + 140, 61 * n % 1900 + 140)) for n in range(1000)]
    framed = list(frames.frame(pictures, Framing(min_kept=0, flip=True), (512,), 64))
    made = items(framed, Captions())
    assert [item.example.name for item in made] == [one.name for one in pictures]
    assert all(len({view.target for view in item.views}) == 1 for item in made)
    assert all(view.scale <= 2 * (1 + 1e-6) for item in made for view in item.views)
    assert sum(frames.table(framed).values()) == 1000
    order = Order(made, [], 4, 0)
    drawn = [draw.index for step in range(250) for draw in order.step(step)]
    assert sorted(drawn) == list(range(1000))


def test_each_picture_is_planned_at_each_resolution() -> None:
    made = plan([_example(0, (900, 600)), _example(1, (600, 600))], Framing(), (512, 1024), 64)
    assert [(item.example.name, item.size) for item in made] == [
        ("0.png", (640, 384)), ("0.png", (1216, 832)), ("1.png", (512, 512)), ("1.png", (1024, 1024)),
    ]  # fmt: skip


def test_a_picture_too_small_for_one_resolution_is_trained_at_the_other_and_that_is_said() -> None:
    framed = list(frames.frame([_example(0, (200, 200)), _example(1, (2000, 2000))], Framing(), (512, 1024), 64))
    assert [list(one.views) for one in framed] == [[512], [512, 1024]]
    assert "not trained at 1024: 1 (0.png)" in frames.describe(framed)


def test_all_faults_are_said_at_once() -> None:
    pictures = [_example(0, (60, 60)), _example(1, (600, 600)), _example(2, (9000, 600)), _example(3, (50, 50))]
    with pytest.raises(Fault) as caught:
        plan(pictures, Framing(), (512,), 64)
    assert caught.value.message.startswith("3 of 4 pictures cannot be trained as they are.")
    assert [line.split(":")[0] for line in caught.value.details] == ["0.png", "2.png", "3.png"]
    assert caught.value.message.count("--max-upscale") == 1 and "--skip" in caught.value.message


@pytest.mark.parametrize(
    ("framing", "said"),
    [(Framing(max_upscale=0), "--max-upscale 0"), (Framing(max_upscale=math.nan), "--max-upscale nan"),
     (Framing(min_kept=1.5), "--min-kept 1.5"), (Framing(crop_variants=0), "--crop-variants 0"),
     (Framing(crop="focus", focus=(0.5, 1.2)), "--focus 0.5 1.2"), (Framing(focus=(0.5, 0.5)), "--crop focus"),
     (Framing(resolution=(0,)), "--resolution 0")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(framing: Framing, said: str) -> None:
    with pytest.raises(Fault, match=said):
        frames.check(framing)


def test_all_settings_that_make_no_sense_are_said_at_once() -> None:
    with pytest.raises(Fault) as caught:
        frames.check(Framing(max_upscale=-1, min_kept=2))
    assert len(caught.value.details) == 2


def test_the_same_resolution_twice_is_refused() -> None:
    with pytest.raises(Fault, match="512 512"):
        plan([_example(0, (600, 600))], Framing(), (512, 512), 64)


def test_random_crops_follow_the_pixels_not_the_name() -> None:
    framing = Framing(crop="random")
    (one,), (renamed,) = (
        plan([Example(Path(name), ("x",), name, facts=Facts(600, 900, False, False, digest="d"))], framing, (512,), 64)
        for name in ("a.png", "b.png")
    )
    assert one.views == renamed.views and len(one.views) == 4
    assert plan([one.example], framing, (512,), 64, seed=1)[0].views != one.views


def _example(number: int, original: tuple[int, int]) -> Example:
    name = f"{number}.png"
    return Example(Path(name), ("x",), name, facts=Facts(*original, turned=False, transparent=False, digest=name))


def _share(original: tuple[int, int], size: tuple[int, int]) -> float:
    longer = original[1] / original[0] * size[0] / size[1]
    return min(longer, 1 / longer)
