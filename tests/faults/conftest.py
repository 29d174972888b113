"""The driver that the tests of this folder share, and the command line in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from driver import Place, pictures

from finetune import cli


@pytest.fixture
def place(tiny_models: dict[str, Path], tmp_path: Path) -> Place:
    """A training of four steps."""
    cache = Path(os.environ["FINETUNE_CACHE"])
    return Place(tmp_path / "run", cache, tiny_models["sd"], pictures(tmp_path / "data"), steps=4)


@pytest.fixture
def ended(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process: its status, and what it said on stderr."""

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            cli.main(words)
        except SystemExit as stop:
            return int(stop.code or 0), " ".join(capsys.readouterr().err.split())
        return 0, ""

    return run
