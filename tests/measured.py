"""Training data in memory, and the loss of a model on it, always with the same draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from finetune import data
from finetune.batches import Batch, Batches
from finetune.data import Example
from finetune.data.encoding import Encodings, encode
from finetune.data.order import Order
from finetune.families import Family
from finetune.loop import PictureLoss
from finetune.settings import Captions, Data, Framing, Loss

SQUARES = Framing(buckets=False, max_upscale=99, min_kept=0)


def encoded(
    family: Family,
    subjects: Sequence[Example],
    companions: Sequence[Example] = (),
    held: Sequence[Example] = (),
    framing: Framing = SQUARES,
    captions: Captions | None = None,
    settings: Data | None = None,
) -> Encodings:
    """The examples at 64 x 64 pixels, computed anew in memory."""
    texts = captions or Captions()
    items = [data.plan(examples, framing, (64,), 8, texts) for examples in (subjects, companions, held)]
    return encode(family, *items, settings or Data(use_cache=False), texts)


def batches(encodings: Encodings, count: int, seed: int = 99) -> list[Batch]:
    """A step of `count` subjects, size by size."""
    order = Order(encodings.subjects, encodings.companions, count, seed)
    return Batches(encodings, order, 1000, torch.device("cpu")).make(0, 0, 1)


@torch.no_grad()
def loss(family: Family, encodings: Encodings, settings: Loss | None = None, count: int = 30) -> float:
    """The loss of a step that is long enough to tell two models apart."""
    measure = PictureLoss(family, encodings, settings or Loss())
    return float(sum((batch.shares * measure(batch)).sum() for batch in batches(encodings, count)))
