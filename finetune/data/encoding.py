"""What the denoiser trains on, computed once and kept: latents of the pictures, conditions of the captions.

Nothing here is known by a name: latents are found by pixels, view and the VAE's weights, conditions by the caption and
the text encoders' weights. What has changed is computed again, and only that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from finetune import home, prompting
from finetune.data import cache
from finetune.data.cache import Store
from finetune.data.examples import Item, pixels
from finetune.data.framing.geometry import Geometry
from finetune.data.framing.holes import hole
from finetune.data.framing.masks import weights as mask_weights
from finetune.data.reading.pictures import reduction
from finetune.errors import Fault
from finetune.families import (
    Conditions,
    Family,
    aside,
    encode_sources,
    modules,
    release,
    takes_mask,
    takes_source,
    text_encoders,
    tokenizers,
)
from finetune.settings import Captions, Data


class Track(Protocol):
    """Goes through things and shows how far it is."""

    def __call__(self, items: Iterable[Any], what: str, total: int) -> Iterator[Any]: ...


WORKERS = 4
"""Threads that decode and scale pictures ahead of the VAE."""


@dataclass(frozen=True)
class Turn:
    """This process's share of work that several do: every `world`th piece, and how it waits for the others."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Encodings:
    """All that a run trains on."""

    subjects: Sequence[Item]
    companions: Sequence[Item]
    """Class pictures for prior preservation; may be empty."""
    pictures: Store
    texts: Store | None
    """None while a text encoder is being trained."""
    vae: str
    """Fingerprint of the VAE"""
    encoders: str
    """Fingerprint of the text encoders and tokenizers"""
    caption_dropout: float = 0.0
    """Share of the draws whose caption is the empty prompt"""
    held: Sequence[Item] = ()
    """Pictures that are held out of the training, to validate with"""
    lessons: Mapping[int, Tensor] = field(default_factory=dict)
    """What the frozen base predicted at the fixed draws of each lesson, each (C, H/f, W/f)"""
    holes: int = 0
    """Masks of each view that an inpainting checkpoint draws under; 0 for all others"""
    sourced: bool = False
    """Whether an instruct-pix2pix checkpoint is trained, which is told what each picture was made of"""
    source_dropout: float = 0.0
    """Share of the draws without the caption, of those without the source, and of those without both"""
    factor: int = 8
    """f: side of a picture over side of its latents"""
    built: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False)
    """By kind, the number of entries that had to be computed, and of all that are needed."""

    def said(self) -> str:
        """What had to be computed, and what was there from an earlier run."""
        return "computed: " + ", ".join(f"{new} of {all_} {what}" for what, (new, all_) in self.built.items() if all_)

    def latents(self, item: Item, view: Geometry) -> tuple[Tensor, Tensor]:
        """Mean and std of a view's latents, each (C, H/f, W/f) float32. A step's are mean + std * noise."""
        entry = self.pictures.get(_picture_key(item, view, self.vae))
        return entry["mean"], entry["std"]

    def mask(self, item: Item, view: Geometry) -> Tensor:
        """What of a view is trained: (1, H/f, W/f) in [0, 1]; ones where the picture has no mask."""
        size = _latent_size(view, self.factor)
        if item.example.mask is None:
            return torch.ones(1, *size)
        return self.pictures.get(_mask_key(item.example.mask, view, size))["mask"]

    def hole(self, item: Item, view: Geometry, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """What of a view is drawn anew, (1, H/f, W/f), and the latents of the rest of it, as `latents`."""
        entry = self.pictures.get(_hole_key(item, view, self.vae, number))
        return entry["mask"], entry["mean"], entry["std"]

    def source(self, item: Item, view: Geometry) -> Tensor:
        """What a picture was made of, in the same view, as `families.encode_sources` has it: (C, H/f, W/f)."""
        return self.pictures.get(_source_key(item, view, self.vae))["source"]

    def conditions(self, caption: str) -> Conditions:
        """The conditions of a caption, (1, ...)."""
        assert self.texts is not None
        return self.texts.get(_text_key(caption, self.encoders))


def encode(
    family: Family,
    subjects: Sequence[Item],
    companions: Sequence[Item],
    held: Sequence[Item],
    data: Data,
    captions: Captions,
    track: Track = lambda items, what, total: iter(items),
    turn: Turn | None = None,
) -> Encodings:
    """Encode what the cache does not hold, then drop what is not needed any more from memory: the VAE, and the text
    encoders unless they train. Meanwhile the denoiser is not in the GPU's memory.

    Raises Fault when a picture's latents are not finite (half-precision VAEs overflow).
    """
    pictures, texts = stores(data)
    turn = turn if turn and data.use_cache else Turn()  # what is kept in memory, each process computes for itself
    items, factor = [*subjects, *companions, *held], family.latents()[1]
    _require_sources(family, items, data)
    with aside(family):
        vae, encoders = _vae_fingerprint(family), _encoders_fingerprint(family)
        sourced, built = takes_source(family), {}
        trained = any(p.requires_grad for encoder in text_encoders(family).values() for p in encoder.parameters())
        if not trained:
            said = dict.fromkeys(caption for item in items for caption in (*item.captions, *_leant_to(item)))
            said |= {"": None} if captions.caption_dropout or (sourced and data.source_dropout) else {}
            told = encode_texts(family, list(said), texts, track, turn)
            release(family, *text_encoders(family))  # before the VAE works
        built["pictures"] = _encode_pictures(family, items, pictures, vae, data.background, track, turn)
        built["masks"] = _encode_masks(items, pictures, factor, track, turn)
        holes = data.holes if takes_mask(family) else 0
        if takes_mask(family) and holes < 1:
            raise Fault(f"--holes {holes}: an inpainting checkpoint learns under masks; at least 1.")
        if holes:
            built["masked pictures"] = _encode_holes(family, items, pictures, vae, data, track, turn)
        if sourced:
            built["sources"] = _encode_sources(family, items, pictures, vae, data, track, turn)
        if not trained:
            built["captions"] = told
    release_frozen(family)
    known = None if trained else texts
    dropout = captions.caption_dropout
    return Encodings(
        subjects, companions, pictures, known, vae, encoders, dropout, held, holes=holes, sourced=sourced,
        source_dropout=data.source_dropout if sourced else 0.0, factor=factor, built=built,
    )  # fmt: skip


def stores(data: Data) -> tuple[Store, Store]:
    """Where pictures and texts are kept: on disk, or in memory without the cache."""
    if not data.use_cache:
        return cache.Memory(), cache.Memory()
    folder = data.cache or home.cache("encodings")
    return cache.Shards(folder / "pictures"), cache.Shards(folder / "texts")


def encode_texts(family: Family, captions: Sequence[str], store: Store, track: Track, turn: Turn) -> tuple[int, int]:
    """Each caption's conditions, one at a time: equal whatever stands beside it. The number that had to be computed."""
    encoders = _encoders_fingerprint(family)

    def conditions(caption: str) -> Conditions:
        with torch.no_grad():
            return {name: value.cpu() for name, value in prompting.conditions(family, [caption]).items()}

    wanted = [(_text_key(caption, encoders), caption) for caption in captions]
    return _build(store, wanted, lambda caption: caption, conditions, "encode captions", track, turn)


def release_frozen(family: Family) -> None:
    """Drop from memory every part of the pipeline that neither trains nor predicts. Where a text encoder trains all of
    them stay: captions are encoded in each step."""
    parts, texts = modules(family), text_encoders(family)
    training = {name for name, part in parts.items() if any(p.requires_grad for p in part.parameters())}
    needed = training | {family.denoiser_name} | (texts.keys() if training & texts.keys() else set())
    release(family, *(parts.keys() - needed))


def _encode_pictures(
    family: Family, items: Sequence[Item], store: Store, vae: str, background: str, track: Track, turn: Turn
) -> tuple[int, int]:
    wanted = {_picture_key(item, view, vae): (item, view) for item in items for view in item.views}

    def load(job: tuple[Item, Geometry]) -> tuple[Item, Tensor]:
        item, view = job
        return item, pixels(item.example, view, background)

    def latents(loaded: tuple[Item, Tensor]) -> dict[str, Tensor]:
        return _latents(family, *loaded)

    return _build(store, list(wanted.items()), load, latents, "encode pictures", track, turn)


def _latents(family: Family, item: Item, picture: Tensor) -> dict[str, Tensor]:
    mean, std = (value[0].cpu() for value in family.encode_pictures(picture[None]))
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise Fault(
            f"{item.example.path}: its latents are not finite: the VAE overflows in this precision. "
            "Use a VAE made for half precision, or --precision fp32."
        )
    return {"mean": mean, "std": std}


def _encode_holes(
    family: Family, items: Sequence[Item], store: Store, vae: str, data: Data, track: Track, turn: Turn
) -> tuple[int, int]:
    """Each view with each of its holes grey, as diffusers' inpainting pipelines have it, and the holes."""
    factor = family.latents()[1]
    wanted = {
        _hole_key(item, view, vae, number): (item, view, number)
        for item in items for view in item.views for number in range(data.holes)
    }  # fmt: skip

    def load(job: tuple[Item, Geometry, int]) -> tuple[Item, Tensor, Tensor]:
        item, view, number = job
        assert item.example.facts is not None
        mask = hole(_latent_size(view, factor), item.example.facts.digest, number)
        return item, pixels(item.example, view, data.background), mask

    def latents(loaded: tuple[Item, Tensor, Tensor]) -> dict[str, Tensor]:
        item, picture, mask = loaded
        kept = 1 - mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        return {"mask": mask, **_latents(family, item, picture * kept)}

    return _build(store, list(wanted.items()), load, latents, "encode masked pictures", track, turn)


def _require_sources(family: Family, items: Sequence[Item], data: Data) -> None:
    """Raises Fault where a model that changes pictures is not told what they were, and where another one is."""
    without = [item.example.name or item.example.path.name for item in items if item.example.source is None]
    if takes_source(family) and without:
        raise Fault(
            f"the model is an instruct-pix2pix checkpoint, which learns to change a picture into another: of "
            f"{len(without)} of {len(items)} pictures it is not told what they were made of. Name the folder of these, "
            "each called as its picture: --sources FOLDER.",
            without[:6],
        )
    if not takes_source(family) and len(without) < len(items):
        raise Fault("--sources: only instruct-pix2pix checkpoints are told a picture to change; this is another model.")
    if not 0 <= data.source_dropout <= 1 / 3:
        raise Fault(
            f"--source-dropout {data.source_dropout:g}: from 0 to 1/3, as it is a share of three kinds of draws."
        )


def _encode_sources(
    family: Family, items: Sequence[Item], store: Store, vae: str, data: Data, track: Track, turn: Turn
) -> tuple[int, int]:
    """What each view was made of, scaled, cropped and mirrored alike."""
    wanted = {_source_key(item, view, vae): (item, view) for item in items for view in item.views}

    def load(job: tuple[Item, Geometry]) -> Tensor:
        item, view = job
        assert item.example.source is not None
        return pixels(item.example.source, view, data.background)

    def latents(picture: Tensor) -> dict[str, Tensor]:
        return {"source": encode_sources(family, picture[None])[0].cpu()}

    return _build(store, list(wanted.items()), load, latents, "encode sources", track, turn)


def _encode_masks(items: Sequence[Item], store: Store, factor: int, track: Track, turn: Turn) -> tuple[int, int]:
    masked = [(item, view) for item in items if item.example.mask for view in item.views]
    wanted: dict[str, tuple[Item, Geometry]] = {}
    for item, view in masked:
        assert item.example.mask is not None
        wanted[_mask_key(item.example.mask, view, _latent_size(view, factor))] = item, view

    def weights(job: tuple[Item, Geometry]) -> dict[str, Tensor]:
        item, view = job
        return {"mask": mask_weights(item.example, view, _latent_size(view, factor))}

    return _build(store, list(wanted.items()), weights, lambda made: made, "measure masks", track, turn)


def _build(
    store: Store,
    wanted: Sequence[tuple[str, Any]],
    load: Callable[[Any], Any],
    encode: Callable[[Any], dict[str, Tensor]],
    what: str,
    track: Track,
    turn: Turn,
) -> tuple[int, int]:
    """Compute what is missing of this process's share, and wait for the others. What was missing, and all there is."""
    missing = sum(key not in store for key, _ in wanted)
    turn.wait()  # before anyone adds to what the others are counting
    mine = wanted[turn.rank :: turn.world]
    try:
        if missing:
            cache.build(store, mine, load, encode, WORKERS, lambda done: track(done, what, len(mine)))
    finally:
        store.flush()  # however it ended: what was computed is kept
    turn.wait()
    store.refresh()
    return missing, len(wanted)


def _leant_to(item: Item) -> list[str]:
    return [prompt for prompt, _ in item.example.leaning]


def _source_key(item: Item, view: Geometry, vae: str) -> str:
    assert item.example.source is not None
    return cache.key("source", _picture_key(replace(item, example=item.example.source), view, vae))


def _picture_key(item: Item, view: Geometry, vae: str) -> str:
    facts = item.example.facts
    assert facts is not None, "examples are made by `data.read`, which looks at each picture"
    reduced = reduction(facts, view.scaled)
    return cache.key("latents", facts.digest, reduced, view.scaled, view.crop, view.target, view.mirrored, vae)


def _hole_key(item: Item, view: Geometry, vae: str, number: int) -> str:
    return cache.key("hole", _picture_key(item, view, vae), number)


def _mask_key(mask: Path, view: Geometry, size: tuple[int, int]) -> str:
    return cache.key("mask", _content(mask, mask.stat().st_mtime_ns), view.crop, view.target, view.mirrored, size)


@lru_cache(maxsize=4096)
def _content(file: Path, changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _latent_size(view: Geometry, factor: int) -> tuple[int, int]:
    height, width = view.target
    return height // factor, width // factor


def _text_key(caption: str, encoders: str) -> str:
    return cache.key("text", caption, encoders)


def _vae_fingerprint(family: Family) -> str:
    vae = family.pipeline.vae
    return cache.fingerprint(vae, vae.config.get("scaling_factor"), vae.config.get("shift_factor"))


def _encoders_fingerprint(family: Family) -> str:
    """A tokenizer also tells how it was last called (padding, truncation), which is no part of what it is."""
    told = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in tokenizers(family)]
    words = [{name: part for name, part in one.items() if name not in ("padding", "truncation")} for one in told]
    how = [family.clip_skip, family.chunks] if prompting.is_read_otherwise(family) else []  # type: ignore[attr-defined]
    zeros = ["zeros"] if family.pipeline.config.get("force_zeros_for_empty_prompt") else []
    said = [template for one in tokenizers(family) if (template := getattr(one, "chat_template", None))]
    return cache.key(
        [cache.fingerprint(encoder) for encoder in text_encoders(family).values()], words, *said, *how, *zeros
    )
