"""What model browsers read beside NAME.safetensors, an adapter or a new word: trigger words, base and hashes.

NAME.json is AUTOMATIC1111's and Forge's (extensions-builtin/Lora, ui_edit_user_metadata.py). NAME.civitai.info has the
fields of a model version of Civitai's interface (https://developer.civitai.com), without the numbers that the site
gives: extensions and managers of model files read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import disk
from finetune.export import hashes
from finetune.publishing.release import Release

ADAPTER, EMBEDDING = "LORA", "TextualInversion"
"""Civitai's names for what a file is"""


def write(release: Release, weights: Path, kind: str, words: Sequence[str]) -> None:
    """Both files, beside `weights`, which `words` call."""
    told = {".json": _webui(release, words), ".civitai.info": _site(release, weights, kind, words)}
    for ending, content in told.items():
        disk.write_text(weights.with_suffix(ending), json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _webui(release: Release, words: Sequence[str]) -> dict[str, Any]:
    return {
        "description": release.description or release.title,
        "sd version": release.webui,
        "activation text": ", ".join(words),
        "preferred weight": 1,
        "negative text": "",
        "notes": f"https://huggingface.co/{release.repo}",
    }


def _site(release: Release, weights: Path, kind: str, words: Sequence[str]) -> dict[str, Any]:
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest().upper()
    tensors = hashes.of_file(weights)["sshs_model_hash"].upper()
    return {
        "id": "",
        "modelId": "",
        "name": release.title,
        "trainedWords": list(words),
        "baseModel": release.site,
        "description": release.description or "",
        "model": {"name": release.title, "type": kind, "nsfw": False, "poi": False},
        "files": [
            {
                "name": weights.name,
                "sizeKB": weights.stat().st_size / 1024,
                "type": "Model",
                "metadata": {"format": "SafeTensor"},
                "hashes": {"SHA256": digest, "AutoV2": digest[:10], "AutoV3": tensors[:12]},
            }
        ],
        "images": [],
        "tags": list(release.tags),
    }
