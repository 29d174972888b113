"""Pictures that all trainers read alike: squares of the resolution, so that none of them scales any."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image, ImageOps

from finetune.errors import Fault

KINDS = {".png", ".jpg", ".jpeg", ".webp"}


def squares(source: Path, folder: Path, side: int) -> Path:
    """A folder of the pictures of another one, scaled and cropped around their middle."""
    files = sorted(file for file in source.glob("*") if file.suffix.lower() in KINDS)
    if not files:
        raise Fault(f"{source}: no pictures there ({', '.join(sorted(KINDS))}).")
    folder.mkdir(parents=True)
    for file in files:
        with Image.open(file) as picture:
            whole = ImageOps.exif_transpose(picture).convert("RGB")
            ImageOps.fit(whole, (side, side), Image.Resampling.LANCZOS).save(folder / f"{file.stem}.png")
    return folder


def first(source: Path, folder: Path) -> Path:
    """A folder of its first picture alone."""
    folder.mkdir(parents=True)
    shutil.copy2(sorted(source.iterdir())[0], folder)
    return folder
