"""The picture world: the same spec draws the same bytes, and the caption says what is drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from finetune.toybox import world
from finetune.toybox.clutter import clutter
from finetune.toybox.judge_training import identity_spec
from finetune.toybox.things import Build


def test_a_seed_is_a_picture():
    specs = [world.spec_at(3, index) for index in range(20)]
    assert specs == [world.spec_at(3, index) for index in range(20)]
    assert len(set(specs)) == 20
    for spec in specs:
        assert world.render(spec).tobytes() == world.render(spec).tobytes()
        assert world.render(spec).size == (64, 64)


def test_captions_say_what_the_spec_says():
    for index in range(200):
        spec = world.spec_at(1, index)
        words = world.caption(spec)
        assert words.startswith(f"a {spec.style} of a") and spec.noun in words
        assert (spec.colour in words) == spec.says_colour
        assert (spec.scene in words) == spec.says_scene


def test_a_caption_reads_as_english():
    spec = world.Spec("car", "orange", "on the beach", "photo")
    assert world.caption(spec) == "a photo of an orange car on the beach"
    assert world.caption(replace(spec, says_colour=False, says_scene=False)) == "a photo of a car"


@pytest.mark.parametrize("noun", world.ALL_NOUNS)
def test_things_are_large_and_coloured(noun):
    build = Build("round", "two", "ears", "feet") if noun == "toy" else None
    red, blue = (
        np.asarray(world.render(world.Spec(noun, colour, "at night", "photo", build=build))).astype(int)
        for colour in ("red", "blue")
    )
    changed = np.abs(red - blue).max(2) > 40
    assert 0.06 < changed.mean() < 0.6


def test_no_picture_of_the_world_shows_a_held_out_build():
    random = np.random.default_rng(0)
    specs = [world.random_spec(random) for _ in range(3000)] + [world.motley_spec(random) for _ in range(500)]
    specs += [identity_spec(0, index) for index in range(0, 4000, 4)]
    assert not [spec for spec in specs if spec.build is not None and world.is_held_out(spec.build)]
    assert all(spec.second is None for spec in specs[:3000])


def test_a_tenth_of_the_prompts_is_held_out_and_no_pair_is():
    from itertools import product

    every = [world.Spec(*p, "photo") for p in product(world.ALL_NOUNS, world.COLOURS, world.ALL_SCENES)]
    kept = [spec for spec in every if not world.is_held_out_prompt(spec)]
    assert 0.05 < 1 - len(kept) / len(every) < 0.15
    for first, second in (("noun", "colour"), ("noun", "scene"), ("colour", "scene")):
        pairs = {(getattr(spec, first), getattr(spec, second)) for spec in every}
        assert pairs == {(getattr(spec, first), getattr(spec, second)) for spec in kept}


def test_clutter_is_its_seed():
    one, same, other = (np.asarray(clutter(np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()
