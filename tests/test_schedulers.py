"""Every scheduler by its name, and the embeddings that prompts may name: through `finetune generate`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import get_args

import live
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image as Images

from finetune import export, families, sampling, schedulers
from finetune.cli import main
from finetune.families import Source
from finetune.pictures import read_settings


def test_every_name_is_one_of_diffusers(tiny_models: dict[str, Path]) -> None:
    """Each draws, from its own class, on the model's own noise schedule and prediction."""
    drawn = set()
    for name in get_args(schedulers.Name):
        family = families.load(Source(str(tiny_models["sd-v"])))
        own = family.pipeline.scheduler.config
        schedulers.choose(family, name)
        chosen = family.pipeline.scheduler.config
        assert type(family.pipeline.scheduler).__name__ == schedulers.CLASSES[name][0]
        assert all(chosen[key] == own[key] for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type"))
        [picture] = sampling.sample(family, ["a dog"], [0], steps=4, guidance=3.0)
        drawn.add(hashlib.sha256(picture.tobytes()).hexdigest())
    assert len(drawn) > 12, "they are different"


def test_generate_takes_a_scheduler_by_name(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    words = ["--model", str(tiny_models["sdxl"]), "--prompt", "a dog", "--steps", "4", "--output", str(tmp_path)]
    main(["generate", *words, "--scheduler", "dpmpp-2m-karras"])
    [file] = tmp_path.glob("*.png")
    pipeline = DiffusionPipeline.from_pretrained(tiny_models["sdxl"])
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    theirs = pipeline(
        "a dog", num_inference_steps=4, guidance_scale=5.0, generator=torch.Generator("cpu").manual_seed(0)
    ).images[0]
    assert np.abs(np.asarray(Images.open(file)).astype(int) - np.asarray(theirs).astype(int)).max() <= 1
    assert read_settings(file)["scheduler"] == "dpmpp-2m-karras"
    assert "Sampler: dpmpp-2m-karras" in Images.open(file).text["parameters"]


def test_one_that_cannot_begin_at_noise_is_refused_where_it_must(
    tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as PNDM with an adapter that was trained with --zero-terminal-snr; Euler can."""
    file = tmp_path / "adapter.safetensors"
    export.adapter(live.adapted(tiny_models["sd-v"]), file, settings={"zero_terminal_snr": True})
    words = ["--model", str(tiny_models["sd-v"]), "--prompt", "a dog", "--steps", "2", "--adapter", str(file)]
    with pytest.raises(SystemExit) as stop:
        main(["generate", *words, "--scheduler", "pndm", "--output", str(tmp_path / "out")])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert "--scheduler pndm cannot begin at pure noise" in " ".join(capsys.readouterr().err.split())
    main(["generate", *words, "--scheduler", "euler", "--output", str(tmp_path / "out")])
    [drawn] = (tmp_path / "out").glob("*.png")
    told = read_settings(drawn)
    assert told["zero_terminal_snr"] is True and told["scheduler"] == "euler"


def test_an_unknown_scheduler_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--prompt", "a dog", "--scheduler", "eulr", "--output", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert stop.value.code == 2 and "euler" in said.out + said.err
