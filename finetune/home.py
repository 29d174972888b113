"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache(*parts: str) -> Path:
    """A folder below $FINETUNE_CACHE, else below ~/.cache/finetune. Not made."""
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache" / "finetune").joinpath(*parts)
