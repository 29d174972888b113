"""Shared by all tests: no network, one thread, tiny models."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import tiny
from hypothesis import HealthCheck, settings

# How long an example takes, or is looked for, says how much else runs on the machine.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
gc.freeze()  # each full collection looks through half a million objects of the libraries else


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Diffusers folders of the tiny pipelines, by kind. Read only."""
    root = tmp_path_factory.mktemp("tiny")
    return {kind: tiny.save(kind, root / kind) for kind in {**tiny.KINDS, **tiny.INPAINTING, **tiny.EDITING}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a test makes reaches the user's cache, and nothing there reaches a test, whatever it undoes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("finetune-cache")))
        yield
