"""The tiny model whose memory the tests of this folder tell in megabytes."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_models(tiny_models: dict[str, Path]) -> dict[str, Path]:
    return {**tiny_models, "sd": tiny_models["sd-whole"]}
