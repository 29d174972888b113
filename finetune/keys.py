"""Random numbers from keys: every draw is a function of (seed, purpose, indices) and of nothing else.

A draw depends neither on what was drawn before it nor on the device, the batch size or the number of processes. So a
resumed run, a run on two processes and an uninterrupted run see the same noise, timesteps, order and crops.

The numbers come from Philox, a counter-based generator with a 128-bit key (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011); the key is a BLAKE2b hash of the tuple. They are drawn on the CPU, whose stream is the same
on every machine, and moved: a picture's latents are a few kilobytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import Generator, Philox

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Index = int | str


def key(seed: int, purpose: str, *indices: Index) -> int:
    """The 128-bit key of one draw. `purpose` names what is drawn, `indices` say which one (step, sample, ...)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, purpose, *indices))
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little")


def rng(seed: int, purpose: str, *indices: Index) -> Generator:
    """A numpy generator that belongs to this key alone."""
    return Generator(Philox(key=key(seed, purpose, *indices)))


def normal(shape: tuple[int, ...], seed: int, purpose: str, *indices: Index) -> Tensor:
    """Standard normal float32 numbers of the given shape, on the CPU."""
    import torch

    return torch.from_numpy(rng(seed, purpose, *indices).standard_normal(shape, dtype=np.float32))


def uniform(seed: int, purpose: str, *indices: Index) -> float:
    """One number in [0, 1)."""
    return float(rng(seed, purpose, *indices).random())


def integer(low: int, high: int, seed: int, purpose: str, *indices: Index) -> int:
    """One integer in [low, high)."""
    return int(rng(seed, purpose, *indices).integers(low, high))


def permutation(count: int, seed: int, purpose: str, *indices: Index) -> list[int]:
    """The numbers 0 .. count-1 in a keyed order."""
    return [int(i) for i in rng(seed, purpose, *indices).permutation(count)]


def generator(seed: int, purpose: str, *indices: Index, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator, for library calls that want one. (On the CPU, torch keeps 32 bits of its seed.)"""
    import torch

    return torch.Generator(device).manual_seed(key(seed, purpose, *indices) % 2**63)


@contextmanager
def seeded(seed: int, purpose: str, *indices: Index) -> Iterator[None]:
    """Inside, library code that draws from the global generators (weight initialisation, dropout) draws from this key.

    The global state is put back at the end: nothing outside can tell that numbers were drawn.
    """
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(key(seed, purpose, *indices) % 2**63)
        yield
