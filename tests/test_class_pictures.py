"""Class pictures are drawn once by the frozen base, recorded, kept, and topped up exactly."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import live
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image as Images

from finetune import class_pictures, families
from finetune.families import Family, Source
from finetune.pictures import read_settings
from finetune.settings import Prior

PROMPTS = ("a photo of a dog",)
DOG = Prior(class_images=3, class_steps=2, class_guidance=4.0, prior_weight=0.5)


@pytest.fixture(scope="module")
def source(tiny_models: dict[str, Path]) -> Source:
    return Source(str(tiny_models["sd"]))


@pytest.fixture(scope="module")
def family(source: Source) -> Family:
    return families.load(source)


class Draws:
    """Counts what is drawn, by the seeds asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seeds: list[int] = []
        sample = class_pictures.sample

        def counted(family: Family, prompts: list[str], seeds: list[int], **options: object) -> list[Images.Image]:
            self.seeds += seeds
            return sample(family, prompts, seeds, **options)

        monkeypatch.setattr(class_pictures, "sample", counted)

    def take(self) -> list[int]:
        seeds, self.seeds = self.seeds, []
        return seeds


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    return Draws(monkeypatch)


def track(items: Sequence[list[int]], what: str, total: int) -> Iterator[list[int]]:
    assert (what, total) == ("class pictures", len(items))
    yield from items


def made(
    family: Family,
    source: Source,
    settings: Prior = DOG,
    seed: int = 0,
    resolution: int = 64,
    prompts: Sequence[str] = PROMPTS,
) -> Path:
    found = class_pictures.draw(family, source, prompts, settings, seed, resolution, track)
    assert [path.name for path in found] == [f"{index:05d}.png" for index in range(settings.class_images)]
    return found[0].parent


def record(folder: Path) -> dict[str, dict[str, object]]:
    return {one["file"]: one for one in json.loads((folder / class_pictures.RECORD).read_text())["pictures"]}


def more(count: int) -> Prior:
    return dataclasses.replace(DOG, class_images=count)


def test_they_are_drawn_once_and_topped_up_exactly(family: Family, source: Source, draws: Draws) -> None:
    folder = made(family, source)
    first = draws.take()
    assert len(first) == len(set(first)) == 3
    assert [one["seed"] for one in record(folder).values()] == first
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert made(family, source) == folder and draws.take() == []
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    assert made(family, source, more(8)) == folder
    assert len(draws.take()) == 5
    assert [one["seed"] for one in list(record(folder).values())[:3]] == first
    assert all(path.stat().st_mtime_ns == before[path.name] for path in folder.glob("0000[012].png"))
    assert made(family, source, more(2)) == folder and draws.take() == []
    assert len(list(folder.glob("*.png"))) == 8


def test_the_recorded_seed_draws_the_picture_in_plain_diffusers(
    family: Family, source: Source, tiny_models: dict[str, Path]
) -> None:
    folder = made(family, source)
    pipeline = DiffusionPipeline.from_pretrained(tiny_models["sd"])
    for name, one in record(folder).items():
        told = read_settings(folder / name)
        assert (told["prompt"], told["seed"], told["steps"]) == ("a photo of a dog", one["seed"], 2)
        expected = pipeline(
            "a photo of a dog", num_inference_steps=2, guidance_scale=4.0,
            generator=torch.Generator("cpu").manual_seed(int(str(one["seed"]))),
        ).images[0]  # fmt: skip
        found = np.asarray(Images.open(folder / name)).astype(int)
        assert np.abs(found - np.asarray(expected).astype(int)).max() <= 1


def test_altered_and_removed_pictures_are_drawn_again_and_said(
    family: Family, source: Source, draws: Draws, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(family, source)
    seeds = draws.take()
    good = (folder / "00001.png").read_bytes()
    Images.new("RGB", (64, 64)).save(folder / "00001.png")
    (folder / "00002.png").unlink()
    with caplog.at_level(logging.WARNING):
        made(family, source)
    assert draws.take() == seeds[1:]
    assert "00001.png, 00002.png" in caplog.text and "00000.png" not in caplog.text
    again = np.asarray(Images.open(folder / "00001.png")).astype(int)
    (folder / "good.png").write_bytes(good)
    assert np.abs(again - np.asarray(Images.open(folder / "good.png")).astype(int)).max() <= 1


def test_an_unreadable_record_is_said_and_made_again(
    family: Family, source: Source, draws: Draws, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made(family, source)
    draws.take()
    (folder / class_pictures.RECORD).write_text("{")
    made(family, source)
    assert len(draws.take()) == 3 and "cannot be read" in caplog.text
    assert len(record(folder)) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": ["a photo of a cat"]},
        {"settings": dataclasses.replace(DOG, class_steps=3)},
        {"settings": dataclasses.replace(DOG, class_guidance=5.0)},
        {"seed": 1},
        {"resolution": 32},
    ],
)
def test_what_they_follow_from_decides_the_folder(family: Family, source: Source, change: dict) -> None:
    one, other = made(family, source, more(1)), made(family, source, **{"settings": more(1), **change})
    assert one != other and len(list(other.glob("*.png"))) > 0
    assert other.name.startswith("a-photo-of-a-" + ("cat" if "prompts" in change else "dog"))


def test_another_base_precision_or_scheduler_is_another_folder(
    family: Family, source: Source, tiny_models: dict[str, Path]
) -> None:
    half = families.load(source, torch.bfloat16)
    other = Source(str(tiny_models["sd-v"]))
    folders = {made(family, source, more(1)), made(half, source, more(1)), made(families.load(other), other, more(1))}
    assert len(folders) == 3


def test_an_interruption_keeps_what_was_drawn(
    family: Family, source: Source, draws: Draws, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(items: Sequence[list[int]], what: str, total: int) -> Iterator[list[int]]:
        yield items[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        class_pictures.draw(family, source, PROMPTS, more(9), 0, 64, stops)
    first = draws.take()
    assert len(first) == class_pictures.BATCH
    folder = made(family, source, more(9))
    rest = draws.take()
    assert len(rest) == 9 - class_pictures.BATCH and not set(first) & set(rest)
    assert sorted(path.name for path in folder.glob("*.png")) == [f"{index:05d}.png" for index in range(9)]


def test_several_prompts_take_turns(family: Family, source: Source) -> None:
    folder = made(family, source, more(5), prompts=["a photo of a dog", "a drawing of a dog"])
    told = [read_settings(folder / f"{index:05d}.png")["prompt"] for index in range(5)]
    assert told == [("a photo" if index % 2 == 0 else "a drawing") + " of a dog" for index in range(5)]


def test_a_model_that_trains_does_not_draw_them(tiny_models: dict[str, Path], source: Source) -> None:
    with pytest.raises(ValueError, match="before anything trains"):
        made(live.adapted(tiny_models["sd"]), source)
