"""Several processes on the decoder and the noise predictor, when the command is started by `torchrun`.

On a busy machine two processes with one thread each are faster than one with two: they meet once a step, not at every
convolution. Gradients are averaged, so the training is the same up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed


def start() -> None:
    """Join the other processes that `torchrun` started, if it did."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=timedelta(hours=12))


def stop() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def mine() -> slice:
    """This process's part of a batch."""
    return slice(rank(), None, distributed.get_world_size() if distributed.is_initialized() else 1)


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes alone; the others follow and find its work done."""
    if rank() > 0:
        distributed.barrier()
    yield
    if rank() == 0 and distributed.is_initialized():
        distributed.barrier()


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """The mean over processes, in place."""
    if not distributed.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
