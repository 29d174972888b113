"""`finetune plan` and `finetune train --vram`, as they are typed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune import cli, engine, families
from finetune.families import Source
from finetune.planning import CONTEXT

MIB = 2**20


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "device", lambda: "cpu")


def plan(capsys: pytest.CaptureFixture[str], model: Path, *words: str) -> tuple[str, str]:
    cli.main(["plan", "--model", str(model), "--no-prior", "--resolution", "64", *words])
    told = capsys.readouterr()
    return told.out, told.err


def test_plan_chooses_what_makes_it_fit(tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Without weights: there are none in the folder."""
    bound = f"{CONTEXT / MIB + 1.5}MB"
    words = "--vram", bound, "--tflops", "2", "--steps", "300", "--json"
    facts = json.loads(plan(capsys, tiny_models["sd"], *words)[0])
    assert facts["fits"] and facts["flags"] == "--gradient-checkpointing --checkpoint-share 0.5"
    assert [rung["used"] for rung in facts["rungs"]] == [True, True]
    assert facts["rungs"][0]["peak"] > facts["bound"] >= facts["peak"] > facts["context"] == CONTEXT
    assert facts["size"] == [64, 64] and facts["flops"] > 0 and facts["measured"] is None
    assert facts["flops"] == sum(n for kind, n in facts["work"].items() if kind != "the rest")
    assert facts["time"]["seconds"] == pytest.approx(facts["flops"] / 2e12) and facts["time"]["by"] == "--tflops 2"
    assert facts["time"]["total"] == 300 * facts["time"]["seconds"]


def test_plan_reads_no_weights_and_says_what_does_not_fit(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder without any file of weights."""
    for file in tiny_models["sd"].rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            target = tmp_path / file.relative_to(tiny_models["sd"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    with pytest.raises(SystemExit) as stop:
        fixed = "--gradient-checkpointing", "--precision", "bf16", "--quantize", "nf4"
        plan(capsys, tmp_path, "--vram", "0.1MB", "--cpu", *fixed)
    told = capsys.readouterr()
    assert stop.value.code == 2 and "does not fit" in told.err
    assert "--optimizer adamw8bit" in told.out and "as it is asked for" in told.out
    assert "for 500 steps, by what this machine does" in told.out and "GB/s" in told.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vram", "much"], "an amount of memory"),
        (["--tflops", "0"], "--tflops 0: more than 0"),
        (["--recipe", "dreambooth", "--quantize", "nf4"], "have no gradient"),
        (["--model", "no-such-folder.safetensors"], "there is no such checkpoint file"),
    ],
)
def test_what_no_plan_is_made_of_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--no-prior", *words])
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_train_applies_the_plan(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photos" / "0.png")
    words = ["train", "lora", "--model", str(tiny_models["sd"]), "--data", str(tmp_path / "photos"), "--no-prior"]
    words += ["--prompt", "a photo of sks dog", "--resolution", "64", "--steps", "1", "--tracker", "none"]
    cli.main([*words, "--output", str(tmp_path / "run"), "--vram", "1.6MB"])
    settings = tomllib.loads((tmp_path / "run" / "settings.toml").read_text())
    assert settings["train"]["gradient_checkpointing"] and settings["train"]["precision"] == "fp32"
    told = capsys.readouterr().out
    assert "--gradient-checkpointing" in told and "for 1 steps, by what this machine does" in told
    assert (tmp_path / "run" / "adapter.safetensors").is_file()


def test_what_is_in_the_cpus_memory_is_not_in_a_gpus(
    tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of its blocks are 0.9 of the UNet, of which two blocks are there at a time; those that make keys and
    values are there in no phase, and what they make of the caption in steps."""
    words = "--gradient-checkpointing", "--json"
    flags: tuple[tuple[str, ...], ...] = ((), ("--offload-blocks",), ("--cache-kv",))
    plans = [json.loads(plan(capsys, tiny_models["sd"], *words, *own)[0]) for own in flags]
    assert plans[0]["time"] is None  # of a GPU that is not here nothing is known
    plain, blocks, own = (one["phases"] for one in plans)
    assert blocks["encode"] < plain["encode"] - 250_000 and blocks["train"] < plain["train"] - 300_000
    layers = families.keys_values(families.load(Source(str(tiny_models["sd"]))))
    weights, caption = sum(each.weight.nbytes for each in layers), sum(77 * 4 * each.out_features for each in layers)
    assert own["encode"] == plain["encode"] - weights > 0
    assert own["train"] == pytest.approx(plain["train"] - weights + caption, rel=0.01)


@pytest.mark.slow
def test_measuring_corrects_the_prediction(tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(plan(capsys, tiny_models["sd"], "--vram", "8GB", "--measure", "--json")[0])
    assert facts["fits"] and facts["flags"] == "" and facts["context"] == 0
    assert facts["peak"] == pytest.approx(max(facts["measured"]["peaks"].values()))
    assert facts["corrected"] == pytest.approx(1, abs=0.1) and facts["measured"]["seconds"] > 0
    assert facts["time"]["seconds"] == pytest.approx(facts["measured"]["seconds"])
