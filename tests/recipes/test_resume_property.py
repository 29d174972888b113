"""Stop anywhere, go on, and nothing tells it from a run that was never stopped: of settings drawn at random."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import forked
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from finetune import batches, cli

STEPS = 5
SIZES = [(64, 64), (128, 64), (70, 64), (64, 100), (64, 64)]
METHODS = [
    *("--precision bf16", "--method lora --rank 4 --init olora", "--method dora", "--method loha", "--method lokr"),
    *("--method oft --rank 4", "--method boft --rank 4", "--method ia3"),
]
SLIDER = ["slider", "--target", "a dog", "--positive", "a red dog", "--negative", "a blue dog", "--target-images", "3"]
SLIDER += ["--target-steps", "1", "--resolution", "64", "--steps", str(STEPS), "--lr", "1e-2", "--tracker", "none"]
WORDS = "--word sks --vectors 3"
PIVOTAL = f"pivotal {WORDS} --rank 4 --word-until 0.6 --adapter-from 0.4 --warmup 1"
RATES = {"adamw": "1e-2", "adamw8bit": "1e-2", "prodigy": "1", "schedulefree": "1e-2"}


@dataclass(frozen=True)
class Case:
    recipe: str
    """And its method"""
    optimizer: str
    pictures: int
    batch: int
    accumulation: int
    stops: list[tuple[int, int]]
    """Where the signals come: within which steps, 1 the first, and in which pass of each."""
    prior: bool
    seed: int
    checkpoint_every: int

    @property
    def words(self) -> list[str]:
        told = {
            "--optimizer": self.optimizer, "--lr": RATES[self.optimizer], "--batch-size": self.batch,
            "--accumulation": self.accumulation, "--seed": self.seed, "--checkpoint-every": self.checkpoint_every,
        }  # fmt: skip
        words = [str(word) for pair in told.items() for word in pair]
        words += ["--class-prompt", "a dog", "--class-images", "2", "--class-steps", "1"] if self.prior else []
        drops = self.recipe.startswith("lora") and "ia3" not in self.recipe
        words += ["--no-prior"] * (not self.prior and not self.recipe.startswith("textual_inversion"))
        words += ["--dropout", "0.3"] * drops
        return words + ["--schedule", "cosine"] * (self.optimizer != "schedulefree")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    accumulation = draw(st.integers(1, 3))
    steps = draw(st.lists(st.integers(1, STEPS - 1), min_size=1, max_size=2, unique=True).map(sorted))
    return Case(
        draw(st.sampled_from(["lora", "dreambooth"])),
        draw(st.sampled_from(sorted(RATES))),
        draw(st.integers(1, len(SIZES))),
        draw(st.integers(1, 2)),
        accumulation,
        [(step, draw(st.integers(0, accumulation - 1))) for step in steps],
        draw(st.integers(0, 3)) == 3,
        draw(st.integers(0, 9)),
        draw(st.sampled_from([0, 1, 2])),
    )


@contextmanager
def asked_to_stop(step: int, part: int) -> Iterator[None]:
    """SIGTERM to this process as it makes a pass of a step."""
    make = batches.Batches.make

    def watched(self: batches.Batches, now: int, number: int, parts: int) -> list[batches.Batch]:
        if (now, number) == (step - 1, part):
            os.kill(os.getpid(), signal.SIGTERM)
        return make(self, now, number, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches.Batches, "make", watched)
        yield


def draw_pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    for number, size in enumerate(SIZES[:count]):
        noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"sks dog, red, number {number}")


def given_words(model: Path, pictures: Path) -> list[str]:
    given = ["--model", str(model), "--data", str(pictures), "--tracker", "none", "--steps", str(STEPS)]
    return [*given, "--max-upscale", "4", "--flip", "--shuffle-tags", "--caption-dropout", "0.2"]


def told(run: Path) -> tuple[dict[str, bytes], list[tuple[int, float, float, float]]]:
    """What a run has made, byte by byte, and its log without the times."""
    files = [*sorted(run.glob("*.safetensors")), *sorted((run / "model").rglob("*.safetensors"))]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    log = [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]
    return {str(file.relative_to(run)): file.read_bytes() for file in files if file.is_file()}, log


def require_the_same(case: Case, model: Path, root: Path) -> None:
    draw_pictures(root / "pictures", case.pictures)
    words = [*case.recipe.split(), *given_words(model, root / "pictures"), *case.words]
    require_the_same_of(words, case.stops, root)


def require_the_same_of(words: list[str], stops: list[tuple[int, int]], root: Path) -> None:
    whole, stopped = root / "whole", root / "stopped"
    words = ["train", *words]
    cli.main([*words, "--output", str(whole)])
    words += ["--output", str(stopped)]
    for step, part in stops:
        with asked_to_stop(step, part), pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 75
        assert len(told(stopped)[1]) == step and not told(stopped)[0]
        words = ["train", "--output", str(stopped), "--resume"]
    cli.main(words)
    made, log = told(whole)
    assert made and len(log) == STEPS
    assert told(stopped) == (made, log)


def drawing(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # a smaller example of a failure is not worth its minutes
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@seed(2)
@drawing(4)
@given(case=cases())
def test_stopped_and_resumed_is_the_same_to_the_bit(
    case: Case, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    require_the_same(case, tiny_models["sd"], tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_stopped_and_resumed_is_the_same_to_the_bit(
    method: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    case = Case(f"lora {method}", "adamw", 2, 1, 1, [(2, 0)], False, 1, 2)
    require_the_same(case, tiny_models["sd"], tmp_path)


def test_a_slider_stopped_and_resumed_is_the_same_to_the_bit(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    require_the_same_of([*SLIDER, "--model", str(tiny_models["sd"]), "--dropout", "0.3"], [(3, 0)], tmp_path)


@pytest.mark.parametrize(
    ("recipe", "optimizer", "stops"),
    [
        (f"textual_inversion {WORDS}", "adamw", [(2, 0)]),
        (PIVOTAL, "adamw", [(2, 0), (3, 0)]),
        (f"{PIVOTAL} --ema 0.9 --text-encoder-lr 1e-2", "adamw8bit", [(1, 0), (4, 0)]),
        (PIVOTAL, "schedulefree", [(3, 0)]),
        (f"{PIVOTAL} --word-lr 1", "prodigy", [(3, 0)]),
    ],
)
def test_words_before_and_after_they_are_held(
    recipe: str, optimizer: str, stops: list[tuple[int, int]], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Of five steps the word trains in three, the adapter in the last three."""
    case = Case(recipe, optimizer, 2, 1, 1, stops, False, 1, 1)
    require_the_same(case, tiny_models["sd"], tmp_path)


@pytest.mark.slow
@seed(1)
@drawing(48)
@given(case=cases())
def test_of_many_more(case: Case, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    require_the_same(case, tiny_models["sd"], tmp_path_factory.mktemp("case"))


@pytest.mark.parametrize(
    ("recipe", "optimizer"),
    [
        ("lora", "adamw"),
        pytest.param("dreambooth", "prodigy", marks=pytest.mark.slow),
        pytest.param("slider", "adamw", marks=pytest.mark.slow),
        pytest.param(PIVOTAL, "adamw", marks=pytest.mark.slow),
    ],
)
def test_two_processes_stopped_and_resumed_are_the_same_to_the_bit(
    recipe: str, optimizer: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    case = Case(recipe, optimizer, 3, 1, 2, [], recipe == "dreambooth", 3, 2)
    draw_pictures(tmp_path / "pictures", case.pictures)
    words = [*recipe.split(), *given_words(tiny_models["sd"], tmp_path / "pictures"), *case.words]
    if recipe == "slider":
        words = [*SLIDER, "--model", str(tiny_models["sd"]), "--accumulation", "2"]
    words += ["--processes", "2"]
    done = forked.run([str(tmp_path), "3", *words], 2, Path(__file__).parents[1] / "in_turn.py")
    assert done.returncode == 0, done.stderr[-3000:]
    made, log = told(tmp_path / "whole")
    assert made and len(log) == STEPS
    assert told(tmp_path / "stopped") == (made, log)
