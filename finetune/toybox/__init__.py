"""The embedded base model: a whole Stable Diffusion pipeline at tiny width, and the world it was trained on."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The folder of the pipeline, in the layout of diffusers."""
    return Path(__file__).parent / "weights"
