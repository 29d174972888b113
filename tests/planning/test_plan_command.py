"""`finetune plan` and `finetune train --vram`, as they are typed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune import cli, engine
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
    facts = json.loads(plan(capsys, tiny_models["sd"], "--vram", bound, "--json")[0])
    assert facts["fits"] and facts["flags"] == "--gradient-checkpointing --checkpoint-share 0.5"
    assert [rung["used"] for rung in facts["rungs"]] == [True, True]
    assert facts["rungs"][0]["peak"] > facts["bound"] >= facts["peak"] > facts["context"] == CONTEXT
    assert facts["size"] == [64, 64] and facts["flops"] > 0 and facts["measured"] is None


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
        plan(capsys, tmp_path, "--vram", "0.1MB", "--cpu", "--gradient-checkpointing", "--precision", "bf16")
    told = capsys.readouterr()
    assert stop.value.code == 2 and "does not fit" in told.err
    assert "--optimizer adamw8bit" in told.out and "as it is asked for" in told.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vram", "much"], "an amount of memory"),
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
    assert "--gradient-checkpointing" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter.safetensors").is_file()


def test_offloaded_blocks_are_not_in_a_gpus_memory(
    tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of its blocks are 0.9 of the UNet, of which two blocks are there at a time."""
    words = "--gradient-checkpointing", "--json"
    plain, own = (
        json.loads(plan(capsys, tiny_models["sd"], *words, *flags)[0])["phases"]
        for flags in ((), ("--offload-blocks",))
    )
    assert own["encode"] < plain["encode"] - 250_000 and own["train"] < plain["train"] - 300_000


@pytest.mark.slow
def test_measuring_corrects_the_prediction(tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(plan(capsys, tiny_models["sd"], "--vram", "8GB", "--measure", "--json")[0])
    assert facts["fits"] and facts["flags"] == "" and facts["context"] == 0
    assert facts["peak"] == pytest.approx(max(facts["measured"]["peaks"].values()))
    assert facts["corrected"] == pytest.approx(1, abs=0.1) and facts["measured"]["seconds"] > 0
