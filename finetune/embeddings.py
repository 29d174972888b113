"""Textual-inversion embeddings (Gal et al. 2022, 2208.01618): words of one or several vectors for text encoders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune import families, weights
from finetune.errors import Fault
from finetune.families import Family
from finetune.quiet import quiet

UNNAMED = ("emb_params", "clip_l", "clip_g")
"""Tensors that clients name by their file: of SD 1.x and 2.x, and of SDXL's two text encoders."""


@dataclass(frozen=True)
class Embedding:
    path: Path
    word: str
    """What prompts call it"""
    vectors: tuple[Tensor, ...]
    """Of each text encoder, in the pipeline's order: (vectors, width)"""


def read(path: Path) -> Embedding:
    """Raises Fault for a file that cannot be read or is no embedding."""
    tensors = weights.load_tensors(path)
    named = [name for name in tensors if name not in UNNAMED]
    found = [tensors[name] for name in (*UNNAMED, *named) if name in tensors]
    if len(named) > 1 or (named and len(tensors) > 1) or not all(vector.ndim in (1, 2) for vector in found):
        raise Fault(
            f"{path}: no textual-inversion embedding: expected the tensor emb_params, clip_l and clip_g, or one whose "
            f"name is its word, and found {', '.join(sorted(tensors)[:4])}. An adapter goes with --adapter."
        )
    vectors = tuple(vector.reshape(-1, vector.shape[-1]) for vector in found)
    return Embedding(path, named[0] if named else path.stem, vectors)


def require_used(embeddings: Sequence[Embedding], prompts: Sequence[str]) -> None:
    """Raises Fault for an embedding that no prompt names: it would change nothing."""
    for one in embeddings:
        if not any(re.search(rf"(?<!\w){re.escape(one.word)}(?!\w)", prompt, re.IGNORECASE) for prompt in prompts):
            raise Fault(f"{one.path}: no prompt says its word, so it changes nothing. Its word is {one.word}")


def put_on(family: Family, embedding: Embedding) -> None:
    """Teach the text encoders the word. Raises Fault when it is for other encoders, or the word is one already."""
    encoders: dict[str, Any] = families.text_encoders(family)
    widths = [encoder.config.hidden_size for encoder in encoders.values()]
    own = [vector.shape[-1] for vector in embedding.vectors]
    if own != widths:
        raise Fault(
            f"{embedding.path}: its vectors are {' and '.join(map(str, own))} wide, this {family.title} model's are "
            f"{' and '.join(map(str, widths))}: it is for another kind of model."
        )
    parts = zip(families.tokenizers(family), encoders.values(), embedding.vectors, strict=True)
    for tokenizer, encoder, vectors in parts:
        try:
            # In small letters, as the tokenizers find it: diffusers would take one vector only of a word with capitals.
            with quiet():
                family.pipeline.load_textual_inversion(
                    vectors, token=embedding.word.lower(), tokenizer=tokenizer, text_encoder=encoder
                )
        except ValueError as error:
            raise Fault(f"{embedding.path}: {error} Rename the file.") from error
