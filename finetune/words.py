"""New words for text encoders (textual inversion, Gal et al. 2022, 2208.01618): vectors that train, and nothing else.

The tokenizers know a word as diffusers' `load_textual_inversion` would teach it (`word`, `word_1`, ...: a token for
each vector), so that its pipelines put them in wherever the word stands. The vectors are a parameter of their own below
the encoder's embedding, which stays the frozen tensor that it is: none of its rows moves, and no gradient of its size
is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune import config, engine, families, keys
from finetune.data.examples import Example
from finetune.errors import Fault
from finetune.families import Family, Source
from finetune.glance import glance
from finetune.settings import Model, Optim, Words

MOST = 75
"""Vectors that a prompt has room for"""
NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
NUMBERED = re.compile(r".*_\d+")
"""What the vectors of a word after its first are called"""
ROWS = "rows"
"""The last part of their parameters' names"""
Vectors = Mapping[str, Tensor]
"""Of a word, by text encoder: (vectors, width)"""
names = config.new_words


class Taught(nn.Embedding):
    """An embedding with the vectors of new words below its own, which are the same tensor as before."""

    def __init__(self, own: nn.Embedding, rows: Tensor) -> None:
        """`rows`: (vectors, width), float32; token ids from `own.num_embeddings` on"""
        count, width = own.weight.shape
        super().__init__(count, width, own.padding_idx, _weight=own.weight.detach(), _freeze=True)
        self.rows = nn.Parameter(rows)
        self.began = rows.clone()
        self.off = False
        """Whether the words are what they began as"""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., width), in the precision of the frozen embedding."""
        new = ids >= self.num_embeddings
        rows = self.began.to(self.rows.device) if self.off else self.rows
        taught = nn.functional.embedding((ids - self.num_embeddings).clamp(min=0), rows)
        own = super().forward(ids.masked_fill(new, 0))
        return torch.where(new[..., None], taught.to(own.dtype), own)


def check(
    words: Sequence[str], settings: Words, examples: Sequence[Example], model: Model, accelerator: Accelerator
) -> None:
    """Refuse, before a model is loaded, what cannot be taught, as far as it is known without."""
    if not 1 <= settings.vectors <= MOST:
        raise Fault(
            f"--vectors {settings.vectors}: from 1 to {MOST}, as many as a prompt has room for; 1 to 8 are usual."
        )
    if not words:
        raise Fault("which word is new? Say it as the captions have it: --word NAME (or --trigger NAME).")
    for word in words:
        if not NAME.fullmatch(word) or NUMBERED.fullmatch(word):
            raise Fault(
                f"--word {word}: small letters, digits, - and _, beginning with a letter and not ending in _ and a "
                "number (text encoders know small letters only, and programs call an embedding by its file): my-toy."
            )
        if part := next((other for other in words if other != word and other in word), None):
            raise Fault(f"--word {word}: holds the word {part}, which would be found inside it. Take another one.")
    _require_said(words, [(one.name, caption) for one in examples for caption in one.captions])
    if engine.is_sharding(accelerator):
        raise Fault(
            f"--engine {engine.running(accelerator)}: the few vectors of a word need no sharing out, and it was not "
            "tested with them. Take one process, or the engine ddp."
        )
    _require_taught(families.known(Source(**vars(model)).pipeline_class()))
    seen = glance(model)
    for tokenizer in seen.tokenizers if seen else ():
        _require_new(tokenizer, words, settings.vectors)
        initial(tokenizer, settings)


def require_alone(optim: Optim) -> None:
    """Refuse a rate for the text encoders' own weights, where their words alone train."""
    if optim.text_encoder_lr is not None:
        raise Fault(
            f"--text-encoder-lr {optim.text_encoder_lr:g}: here vectors of new words train, at --lr, and no weights "
            "of the text encoders. Leave it out, or train the recipe pivotal."
        )


def teach(
    family: Family, words: Sequence[str], settings: Words, seed: int, captions: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Teach the text encoders the words: the vectors that train, (words * vectors, width) float32, by encoder.

    They begin as `settings.init_words`, or else as random ones like the encoder's own. Raises Fault for a family whose
    text encoders are taught none, words that are known, and `captions` that have no room for them.
    """
    _require_taught(type(family))
    taught = {}
    parts: list[tuple[str, Any]] = list(families.text_encoders(family).items())
    for (name, encoder), tokenizer in zip(parts, families.tokenizers(family), strict=True):
        _require_new(tokenizer, words, settings.vectors)
        own: nn.Embedding = encoder.get_input_embeddings()
        rows = torch.cat([_begin(own, tokenizer, settings, seed, name, word) for word in words])
        layer = Taught(own, rows.to(own.weight.device))
        if len(tokenizer) != own.num_embeddings:
            raise Fault(f"the tokenizer of {name} knows {len(tokenizer)} tokens, the encoder {own.num_embeddings}.")
        tokenizer.add_tokens([token for word in words for token in tokens(word, settings.vectors)])
        encoder.set_input_embeddings(layer)
        taught[name] = layer.rows
        _require_room(family, tokenizer, words, settings.vectors, captions)
    return taught


def tokens(word: str, vectors: int) -> list[str]:
    """What diffusers calls the vectors of a word."""
    return [word, *(f"{word}_{number}" for number in range(1, vectors))]


def taught(family: Family) -> dict[str, Taught]:
    """The embeddings with new words, by text encoder."""
    parts: dict[str, Any] = families.text_encoders(family)
    held = {name: encoder.get_input_embeddings() for name, encoder in parts.items()}
    return {name: layer for name, layer in held.items() if isinstance(layer, Taught)}


def vectors(family: Family, words: Sequence[str]) -> dict[str, Vectors]:
    """What each word has become, in float32 on the CPU."""
    learned = {name: layer.rows.detach().float().cpu().chunk(len(words)) for name, layer in taught(family).items()}
    return {word: {name: each[i].clone() for name, each in learned.items()} for i, word in enumerate(words)}


def settle(family: Family) -> None:
    """The words become rows of the encoders' own embeddings, as diffusers puts them in: what saves a model finds it
    so."""
    encoders: dict[str, Any] = families.text_encoders(family)
    for name, layer in taught(family).items():
        weight = torch.cat([layer.weight, layer.rows.detach().to(layer.weight.dtype)])
        encoders[name].set_input_embeddings(nn.Embedding.from_pretrained(weight))
        encoders[name].config.vocab_size = len(weight)


@contextmanager
def off(family: Family) -> Iterator[None]:
    """Inside, the words are what they began as: the base knows no others."""
    layers = list(taught(family).values())
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False


def initial(tokenizer: Any, settings: Words) -> list[int]:
    """The tokens that a word begins as, one for each vector; none where it begins at random.

    Fewer words than vectors share them out in their order. Raises Fault for what is no single token.
    """
    if settings.init_words is None:
        return []
    found = []
    for word in settings.init_words.split():
        ids = tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise Fault(
                f"--init-words {settings.init_words}: {word} is no word of this model's text encoder, which spells it "
                f"in {len(ids)} pieces that mean nothing alone. Take commoner words."
            )
        found += ids
    if not 1 <= len(found) <= settings.vectors:
        raise Fault(
            f"--init-words {settings.init_words!r}: {len(found)} words for {settings.vectors} vectors. Give 1 to "
            f"{settings.vectors}, or more --vectors."
        )
    return [found[number * len(found) // settings.vectors] for number in range(settings.vectors)]


def _require_taught(family: type[Family]) -> None:
    if not family.embedding_names:
        raise Fault(
            f"{family.title}: it is taught no new words. It attends to sentences that other text encoders than "
            "CLIP's read, or diffusers loads no embedding files for it. They are for Stable Diffusion 1.x, 2.x and XL; "
            "here train the recipe lora."
        )


def _begin(own: nn.Embedding, tokenizer: Any, settings: Words, seed: int, part: str, word: str) -> Tensor:
    """(vectors, width)"""
    weight = own.weight.detach().float()
    if ids := initial(tokenizer, settings):
        return weight[ids].clone()
    noise = keys.normal((settings.vectors, weight.shape[1]), seed, "words", part, word).to(weight.device)
    return weight.mean(0) + weight.std(0) * noise


def _require_new(tokenizer: Any, words: Sequence[str], count: int) -> None:
    known: Mapping[str, int] = tokenizer.get_vocab()
    for word in words:
        if there := [token for token in tokens(word, count) if token in known or f"{token}</w>" in known]:
            raise Fault(
                f"--word {word}: {there[0]} is a word of this model's text encoder already, and keeps its meaning. "
                f"Take a word that it does not know, e.g. my-{word}."
            )


def _require_said(words: Sequence[str], captions: Sequence[tuple[str, str]]) -> None:
    """Each word stands in some caption, as a word of its own and in small letters wherever it stands."""
    for word in words:
        alone = re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])")
        if not any(alone.search(caption) for _, caption in captions):
            raise Fault(
                f"--word {word}: no caption has it, so nothing would be learned. One of them: {captions[0][1]!r}. "
                f'Say --prompt "a photo of {word}", or --trigger {word}, which puts it before each caption.'
            )
        loose = re.compile(re.escape(word), re.IGNORECASE)
        if ill := [told for told in captions if len(loose.findall(told[1])) != len(alone.findall(told[1]))]:
            raise Fault(
                f"--word {word}: found inside other words, or in capitals, where text encoders would find it too. Take "
                "another word, or mend these captions:",
                [f"{name}: {caption!r}" for name, caption in ill[:10]],
            )


def _require_room(family: Family, tokenizer: Any, words: Sequence[str], count: int, captions: Sequence[str]) -> None:
    special = tokenizer.num_special_tokens_to_add()
    room = families.chunks(family) * (tokenizer.model_max_length - special)
    for caption in captions:
        told: Any = family.pipeline
        written = told.maybe_convert_prompt(caption, tokenizer)
        ids = tokenizer(written, truncation=True, max_length=room + special).input_ids
        for word in words:
            wanted = tokenizer.convert_tokens_to_ids(tokens(word, count))
            if word in written and not set(wanted) <= set(ids):
                raise Fault(
                    f"--vectors {count}: the caption {caption!r} has no room for the {count} vectors of {word}: a "
                    f"prompt has {room} in all. Take fewer, or shorter captions."
                )
