"""Processes that train together, started by torchrun or accelerate: one that ends ends all, and what is said, is said
once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from finetune import signals
from finetune.errors import FAILED, Fault, Stopped

PATIENCE = timedelta(seconds=5)
"""For the launcher's store"""
GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Application timeout caused pair closure",
)
"""What gloo says of a process that is no more; NCCL's errors have a type of their own."""


def several() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def leads() -> bool:
    """Whether this is the first process, or the only one."""
    return int(os.environ.get("RANK") or 0) == 0


@contextmanager
def lost() -> Iterator[None]:
    """Inside, a process that waits for one which has ended stops too, instead of with the library's traceback."""
    try:
        yield
    except RuntimeError as error:
        if not (several() and _is_gone(error)):
            raise
        if name := signals.received():
            raise Stopped(f"Stopped by {name}; what is kept is good. {signals.advice()}") from error
        raise PeerLost(
            "Another process of this training has ended, so this one ends too; if it said nothing, it was killed (out "
            f"of memory?). What is kept is good. {signals.advice()}"
        ) from error


class PeerLost(Fault):
    """Another process has ended. How its run ended is not for this one to say."""

    status = FAILED


def first_to_say(message: str, echo: bool) -> bool:
    """Whether nobody of us has said this yet; of an `echo` of what happened elsewhere, whether nobody has said a thing.

    They ask the launcher's store. Where it does not answer, all speak.
    """
    if not several():
        return True
    import torch.distributed

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    said, this = (f"finetune/{attempt}/{what}" for what in ("", hashlib.sha256(message.encode()).hexdigest()))
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(*place, is_master=False, timeout=PATIENCE, wait_for_workers=False)
        before, same = store.add(said, 1) - 1, store.add(this, 1) - 1
        return not (before if echo else same)
    except (KeyError, ValueError, RuntimeError):
        return True


def _is_gone(error: RuntimeError) -> bool:
    import torch.distributed

    return isinstance(error, torch.distributed.DistError) or any(text in str(error) for text in GONE)
