"""Files say what they may and nothing local."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from finetune import config, provenance, settings


def test_groups_are_opened_and_only_what_is_allowed_is_told() -> None:
    told = provenance.public(
        {
            "model": {"model": "toybox", "revision": None, "model_config": "/home/mary/sd"},
            "data": {"data": "/home/mary/dogs", "prompt": "a photo of sks dog", "skip": ["mary.jpg"]},
            "output": {"output": "/home/mary/run"},
            "adapter": {"rank": 8, "alpha": None},
            "password": "hunter2",
        }
    )
    assert told == {"model": "toybox", "prompt": "a photo of sks dog", "rank": 8}


@pytest.mark.parametrize("name", ["toybox", "stabilityai/stable-diffusion-xl-base-1.0", "user_1/a.b-c"])
def test_hub_names_are_told(name: str) -> None:
    assert provenance.public_model(name) == name


@pytest.mark.parametrize(
    "name", ["/home/mary/sd", "../sd", "./sd", "~/sd", "runs/a/model", "sd.safetensors", "C:\\sd", "", "a b"]
)
def test_local_models_are_not_named(name: str) -> None:
    assert provenance.public_model(name) == provenance.LOCAL


def test_a_folder_that_looks_like_a_hub_name_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mary" / "sd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert provenance.public_model("mary/sd") == provenance.public_model("mary") == provenance.LOCAL


def test_every_setting_of_a_run_is_either_told_or_not() -> None:
    groups = [value for value in vars(settings).values() if dataclasses.is_dataclass(value)]
    known = {field.name for group in groups for field in dataclasses.fields(group)}
    told, untold = set(provenance.TRAINING), set(provenance.UNTOLD)
    assert told | untold == known | {"recipe"}
    assert not told & untold
    assert {"data", "class_data", "output", "model_config", "skip", "masks", "cache", "sample_prompts"} <= untold


def test_shared_groups_are_told_as_they_are_set() -> None:
    told = provenance.public(config.asdict(settings.Optim(lr=2e-4, text_encoder_lr=1e-5)))
    assert (told["lr"], told["text_encoder_lr"], told["optimizer"]) == (2e-4, 1e-5, "auto")
