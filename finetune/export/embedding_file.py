"""New words as embedding files, each loaded back by diffusers' own `load_textual_inversion` before it is believed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune import adapters, families, words
from finetune.data.examples import Example
from finetune.errors import Failure
from finetune.export import metadata as headers
from finetune.export import stream
from finetune.export.compare import REPEATED, difference
from finetune.export.reading import DIFFUSERS_FAULTS, first_line
from finetune.export.stream import Entry
from finetune.families import Family, Source
from finetune.quiet import quiet
from finetune.sampling import inference
from finetune.weights import load_tensors
from finetune.words import Vectors

KIND = "textual-inversion"
"""ModelSpec's word for it"""


def embeddings(
    family: Family,
    source: Source,
    files: Mapping[str, Path],
    *,
    settings: Mapping[str, Any],
    examples: Sequence[Example] = (),
    learned: Mapping[str, Vectors] | None = None,
) -> None:
    """Write the words that the live text encoders know, each to its file, verified; the same bytes for the same words.

    One tensor by the word's name (diffusers, A1111 and ComfyUI read it so); for two text encoders clip_l and clip_g. In
    float32. `learned`: by default what the live encoders were taught. Raises Failure, and leaves what was at the files,
    where they do not load back equal.
    """
    told = headers.of_run(family, settings, KIND, examples)
    titled, title = settings.get("output", {}).get("title"), family.edition().title
    unverified = {word: path.with_name(f".unverified-{path.name}") for word, path in files.items()}
    try:
        for word, vectors in (learned or words.vectors(family, list(files))).items():
            tensors = {name or word: vectors[part] for name, part in names(family).items()}
            entries = {name: Entry((*one.shape,), one.dtype, _given(one)) for name, one in tensors.items()}
            own = {"modelspec.title": titled or f"{word} ({title})", "modelspec.trigger_phrase": word}
            stream.write(unverified[word], entries, {**told, **own})
        verify(family, source, unverified)
        for word, path in files.items():
            os.replace(unverified[word], path)
    finally:
        for path in unverified.values():
            path.unlink(missing_ok=True)


def _given(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def names(family: Family) -> dict[str, str]:
    """What a file calls each text encoder's tensor ("" is its word) -> the encoder."""
    return dict(zip(family.embedding_names, families.text_encoders(family), strict=True))


def verify(family: Family, source: Source, files: Mapping[str, Path]) -> None:
    """The base with the files says the same to prompts as the live encoders; adapters of these are left out.

    Raises Failure where it does not.
    """
    fresh = _base(family, source)
    for word, path in files.items():
        _load(fresh, word, path)
    prompts = [f"a photo of {word}, {word} on a beach" for word in files] + [" and ".join(files)]
    with torch.no_grad(), inference(family), adapters.unadapted(family):
        live, loaded = family.encode_prompts(prompts), fresh.encode_prompts(prompts)
    encoder: Any = next(iter(families.text_encoders(family).values()))
    gaps = {name: difference(value.float().cpu(), loaded[name].float().cpu()) for name, value in live.items()}
    allowed = REPEATED[encoder.dtype]
    if wrong := [f"{name}: by {gap:.1e} of its norm" for name, gap in gaps.items() if not gap <= allowed]:
        raise Failure("the embedding does not load back as it was written. The text encoding differs:", wrong)


def _base(family: Family, source: Source) -> Family:
    """Text encoders and tokenizers as they were before they were taught; all else is lent, as far as it is there."""
    encoders: dict[str, Any] = families.text_encoders(family)
    own = {name for part in encoders for name in (part, part.replace("text_encoder", "tokenizer"))}
    lent = {name: part for name, part in family.pipeline.components.items() if name not in own}
    reads: Any = family  # prompts in the same way
    fresh: Family = replace(reads, pipeline=source.load(next(iter(encoders.values())).dtype, lent))
    for name, encoder in families.text_encoders(fresh).items():
        encoder.requires_grad_(False).eval().to(encoders[name].device)
    return fresh


def _load(family: Family, word: str, path: Path) -> None:
    """As diffusers' documentation does it: a file of one tensor as it is, of several each to its text encoder."""
    pipeline: Any = family.pipeline
    try:
        with quiet():
            if family.embedding_names == ("",):
                pipeline.load_textual_inversion(str(path))
                return
            encoders, tensors = families.text_encoders(family), load_tensors(path)
            for (name, part), tokenizer in zip(names(family).items(), families.tokenizers(family), strict=True):
                parts = {"text_encoder": encoders[part], "tokenizer": tokenizer}
                pipeline.load_textual_inversion(tensors[name], token=word, **parts)
    except (OSError, *DIFFUSERS_FAULTS) as error:
        raise Failure(f"the embedding does not load back: {first_line(error)}") from error
