"""The toybox's judge: what a picture shows (a small CLIP) and whether it is the same thing (a small DINO).

One convolutional picture encoder with two heads. The *prompt* head shares a space with a bag-of-words text encoder, so
a picture can be compared with a prompt and read by comparing it with every caption of the world (Radford et al. 2021,
2103.00020). The *identity* head is the same for two pictures of one thing, whatever the scene, style, place and size
(supervised contrast, Khosla et al. 2020, 2004.11362). A word that the judge does not know ("sks") adds nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.toybox import path as weights_path
from finetune.toybox.world import ALL_NOUNS, ALL_SCENES, COLOURS, STYLES, Spec, caption

WIDTHS = (48, 64, 96)
DIMENSIONS = 64
SIZE = 64
# The world's styles, and the one that is kept from the base model but not from its judge.
KNOWN_STYLES = (*STYLES, "neon")


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity (He et al. 2015, 1512.03385)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class PictureEncoder(nn.Module):
    """(B, 3, 64, 64) in -1..1 -> prompt embeddings and identity embeddings, each (B, 64) of length 1."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.trunk = nn.Sequential(
            nn.Conv2d(3, first, 6, stride=4, padding=1), Residual(first), Residual(first),
            nn.Conv2d(first, second, 3, stride=2, padding=1), Residual(second),
            nn.Conv2d(second, third, 3, stride=2, padding=1), Residual(third),
            nn.GroupNorm(8, third), nn.SiLU(),
        )  # fmt: skip
        self.prompt, self.identity = nn.Linear(2 * third, DIMENSIONS), nn.Linear(2 * third, DIMENSIONS)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.trunk(pictures)
        pooled = torch.cat([seen.mean((2, 3)), seen.amax((2, 3))], 1)
        return F.normalize(self.prompt(pooled).float(), dim=1), F.normalize(self.identity(pooled).float(), dim=1)


class BagOfWords(nn.Module):
    """(B, words) of 0 and 1 -> (B, 64) of length 1."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = nn.Linear(words, 2 * DIMENSIONS)
        self.out = nn.Linear(2 * DIMENSIONS, DIMENSIONS)

    def forward(self, bags: Tensor) -> Tensor:
        return F.normalize(self.out(F.silu(self.words(bags))).float(), dim=1)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of the world's captions that means something."""
    phrases = [*ALL_NOUNS, *COLOURS, *ALL_SCENES, *KNOWN_STYLES]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()} - {"a", "the", "in", "on", "at"}))


def bags(captions: Sequence[str]) -> Tensor:
    """(B, words): which known words each caption has."""
    known = {word: i for i, word in enumerate(vocabulary())}
    result = torch.zeros(len(captions), len(known))
    for row, text in enumerate(captions):
        for word in re.findall(r"[a-z]+", text.lower()):
            if word in known:
                result[row, known[word]] = 1.0
    return result


class Network(nn.Module):
    """All weights of the judge."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures = PictureEncoder()
        self.texts = BagOfWords(len(vocabulary()))
        self.log_scale = nn.Parameter(torch.tensor([2.7, 2.7]))
        """Logarithms of the inverse temperatures: prompts, identities."""


class Judge:
    """Scores pictures. Everything is on the CPU and takes milliseconds."""

    name = "toybox judge"

    def __init__(self, network: Network) -> None:
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: Path | None = None) -> Judge:
        """The judge that is shipped with the base model, or another one."""
        folder = folder or weights_path() / "judge"
        config = json.loads((folder / "config.json").read_text())
        if tuple(config["words"]) != vocabulary():
            raise ValueError(f"{folder} was trained on other words than this version's world has")
        network = Network()
        network.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return cls(network)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        half = {name: value.half().contiguous() for name, value in self.network.state_dict().items()}
        save_file(half, folder / "model.safetensors")
        config = {"kind": "toybox judge", "size": SIZE, "dimensions": DIMENSIONS, "words": vocabulary()}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @torch.no_grad()
    def encode(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Prompt and identity embeddings, each (N, 64) of length 1."""
        parts = [self.network.pictures(batch) for batch in as_tensor(pictures).split(128)]
        return torch.cat([p for p, _ in parts]), torch.cat([i for _, i in parts])

    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Identity embeddings, (N, 64) of length 1: for likeness, diversity and copies."""
        return self.encode(pictures)[1]

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(N, 64) of length 1, in the space of the pictures' prompt embeddings."""
        return self.network.texts(bags(prompts))

    def likeness(self, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
        """Mean pairwise cosine of identity embeddings, -1..1."""
        return float((self.embed(pictures) @ self.embed(references).T).mean())

    def prompt(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> float:
        """Mean cosine of each picture and its own prompt, -1..1."""
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures but {len(prompts)} prompts: one prompt belongs to each picture")
        return float((self.encode(pictures)[0] * self.embed_prompts(prompts)).sum(1).mean())

    @torch.no_grad()
    def read(self, pictures: Sequence[Image.Image]) -> list[dict[str, str]]:
        """The most probable noun, colour, scene and style of each picture, each summed over all the others."""
        specs, captions = _everything()
        similarity = self.encode(pictures)[0] @ self.network.texts(bags(captions)).T
        shares = (similarity * self.network.log_scale[0].exp()).softmax(1)
        found: list[dict[str, str]] = [{} for _ in pictures]
        for field in ("noun", "colour", "scene", "style"):
            values = sorted({getattr(spec, field) for spec in specs})
            of_value = torch.tensor([[getattr(spec, field) == value for value in values] for spec in specs]).float()
            for row, best in enumerate((shares @ of_value).argmax(1).tolist()):
                found[row][field] = values[best]
        return found


@cache
def _everything() -> tuple[list[Spec], list[str]]:
    """Every noun, colour, scene and style, and its full caption."""
    specs = [Spec(*parts) for parts in product(ALL_NOUNS, COLOURS, ALL_SCENES, KNOWN_STYLES)]
    return specs, [caption(spec) for spec in specs]


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """(N, 3, 64, 64) in -1..1, whatever the pictures' size."""
    square = [
        p.convert("RGB") if p.size == (SIZE, SIZE) else p.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)
        for p in pictures
    ]
    array = np.stack([np.asarray(picture) for picture in square])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
