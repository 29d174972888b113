"""Which rungs are climbed, and in which order: on what a table says that each takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune import config, planning, shelf
from finetune.errors import Fault
from finetune.planning import ladder
from finetune.planning.phases import Taken


def settings(recipe: str, *words: str) -> Any:
    return config.parse(shelf.load(recipe).Config, ["--output", "run", *words], "train")


def taken(config: Any) -> Taken:
    """As if a picture's activations were 100 of 1000 px, and checkpointing kept half of them."""
    pixels = max(config.framing.resolution, default=1024) / 1024
    activations = (
        100
        * config.train.batch_size
        * pixels**2
        / (1 + config.train.gradient_checkpointing * config.train.checkpoint_share)
    )
    weights = 60 if config.train.precision == "fp32" else 30
    return Taken({"encode": 50, "train": int(activations + weights + 40)})


def test_what_fits_is_left_as_it_is() -> None:
    asked = settings("lora", "--batch-size", "2")
    for bound in (None, 300.0):
        plan = ladder.find(asked, 1024, taken, bound)
        assert plan.fits and plan.config == asked and plan.flags == "" and len(plan.rows) == 1


def test_cheap_rungs_come_first_and_those_that_save_nothing_are_left_out() -> None:
    asked = settings("lora", "--batch-size", "4", "--accumulation", "2", "--optimizer", "adamw")
    plan = ladder.find(asked, 1024, taken, 150)
    assert plan.fits and plan.flags == "--gradient-checkpointing --checkpoint-share 1 --batch-size 1 --accumulation 8"
    assert [row.saves for row in plan.rows] == [0, 134, 66, 150]
    plan = ladder.find(asked, 1024, taken, 101)
    assert plan.fits and plan.flags.endswith("--accumulation 8 --precision bf16 --resolution 768")
    unused = ["--optimizer adamw8bit", "--cache-kv", "--offload-blocks", "--quantize int8", "--quantize nf4"]
    assert [(row.flags, row.saves) for row in plan.rows if not row.used] == [(flags, 0) for flags in unused]
    assert plan.config.train.batch_size == 1 and plan.config.framing.resolution == (768,)
    assert plan.config.optim == asked.optim


def test_the_last_of_several_resolutions_is_told_and_what_never_fits_is_said() -> None:
    plan = ladder.find(settings("lora"), 1024, taken, 79)
    assert plan.fits and plan.flags.count("--resolution") == 1 and plan.flags.endswith("--resolution 384")
    plan = ladder.find(settings("lora"), 1024, taken, 10)
    assert not plan.fits and plan.taken.peak > 10
    with pytest.raises(Fault, match="does not fit"):
        planning.Plan(plan, (256, 256), 10, 0, None, 1.0).require()


def test_full_weights_have_rungs_of_their_own() -> None:
    flags = [rung.flags for rung in ladder.rungs(settings("dreambooth", "--ema", "0.9"), 512)]
    assert flags == [
        "--gradient-checkpointing --checkpoint-share 0.5",
        "--gradient-checkpointing",
        "--ema-on-cpu",
        "--precision bf16",
        "--optimizer-in-backward --max-grad-norm 0",
        "--optimizer adamw8bit",
        "--weights bf16 --precision bf16",
        "--resolution 384",
    ]


def test_a_base_is_quantised_where_the_method_works_on_it_and_it_is_not_yet() -> None:
    def offered(*words: str) -> list[str]:
        return [rung.flags for rung in ladder.rungs(settings("lora", *words), 256) if "quantize" in rung.flags]

    assert offered() == ["--quantize int8", "--quantize nf4"]
    assert offered("--quantize", "nf4") == [] == offered("--method", "boft")
    assert offered("--offload-blocks")[1] == "--quantize nf4 --no-offload-blocks"
    assert offered("--cache-kv")[1] == "--quantize nf4 --no-cache-kv"


def test_keys_and_values_are_kept_where_they_can_be(tiny_models: dict[str, Path]) -> None:
    """Before blocks are offloaded, which they are out of the memory by too."""

    def offered(recipe: str, *words: str) -> list[str]:
        found = [rung.flags for rung in ladder.rungs(settings(recipe, *words), 256)]
        return [flags for flags in found if flags.startswith(("--cache-kv", "--offload"))]

    assert offered("lora") == ["--cache-kv", "--offload-blocks"] == offered("slider")
    assert offered("lora", "--cache-kv") == ["--offload-blocks --no-cache-kv"]
    without = ["--method", "dora"], ["--text-encoder-lr", "1e-5"], ["--model", str(tiny_models["flux"])]
    assert all(offered("lora", *words) == ["--offload-blocks"] for words in without)
    assert offered("textual_inversion") == ["--offload-blocks"] and offered("dreambooth") == []


def test_what_an_earlier_rung_asked_for_is_not_told_where_a_later_one_takes_it_back() -> None:
    def nf4_saves(config: Any) -> Taken:
        return Taken({"train": 100 - 10 * config.model.offload_blocks - 50 * (config.model.quantize == "nf4")})

    plan = ladder.find(settings("lora", "--optimizer", "adafactor"), 256, nf4_saves, 60)
    assert plan.flags == "--quantize nf4" and [row.flags for row in plan.rows if row.used][1] == "--offload-blocks"
    plan = ladder.find(settings("lora", "--optimizer", "adafactor", "--offload-blocks"), 256, nf4_saves, 50)
    assert plan.flags == "--quantize nf4 --no-offload-blocks"


@pytest.mark.parametrize(("said", "bytes_"), [("8GB", 2**33), ("7.5 GiB", 7.5 * 2**30), ("600M", 600 * 2**20)])
def test_amounts_of_memory(said: str, bytes_: float) -> None:
    assert planning.amount(said) == bytes_


@pytest.mark.parametrize("said", ["much", "0GB", "8TB", "-1GB"])
def test_what_is_no_amount_is_refused(said: str) -> None:
    with pytest.raises(Fault, match="--vram"):
        planning.amount(said)
