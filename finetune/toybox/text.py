"""The toybox's words: a byte-level BPE tokenizer of its own and a small CLIP text encoder.

Both are the classes that Stable Diffusion uses (Radford et al. 2021, 2103.00020): 77 positions, every byte sequence can
be written, the two special tokens last in the vocabulary.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from finetune import keys
from finetune.toybox import world

LENGTH = 77
WIDTH = 64
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# Words of captions and of the prompts that people write; the rest is spelt out in bytes.
MORE_WORDS = "the with and by its wearing standing playing picture drawing painting sign neon style"


def words() -> Counter[str]:
    """How often each word is expected: the world's own captions, and a few more."""
    counts = Counter(MORE_WORDS.split())
    for index in range(2000):
        counts.update(world.caption(world.spec_at(0, index)).split())
    return counts


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merges(counts: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2015, 1508.07909) until every word of `counts` is one token."""
    spelt = {word: [*word[:-1], word[-1] + WORD_END] for word in sorted(counts)}
    found: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelt.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            return found
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        found.append(best)
        for word, parts in spelt.items():
            spelt[word] = _merged(parts, best)


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def new_tokenizer() -> CLIPTokenizer:
    """The tokenizer, made from the world's words; the same every time."""
    pairs = merges(words())
    letters = [byte_letters()[byte] for byte in range(256)]
    tokens = [*letters, *(letter + WORD_END for letter in letters), *(a + b for a, b in pairs), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=LENGTH)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """`tokenizer.json` and the two files of older clients, which transformers 5 no longer writes.

    A tokenizer remembers how it was last called, and would write that down.
    """
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")


def new_encoder(vocabulary: int, seed: int = 0) -> CLIPTextModel:
    """An untrained text encoder, about 0.2 M parameters: token ids (B, 77) -> hidden states (B, 77, 64)."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    with keys.seeded(seed, "toybox/text/weights"):
        return CLIPTextModel(config)


def save_encoder(encoder: CLIPTextModel, folder: Path) -> None:
    """Save under the names that every client expects.

    transformers 5 writes a model made from a config without the prefix `text_model.`; with it, it loads everywhere.
    """
    encoder.save_pretrained(folder)
    path = folder / "model.safetensors"
    prefix = "text_model."
    tensors = {prefix + name.removeprefix(prefix): value for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(B, 77) token ids, padded and cut."""
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
