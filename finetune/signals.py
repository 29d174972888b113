"""Signals that ask a command to stop: noted while it works, and heeded where nothing is lost by it."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from types import FrameType
from typing import ClassVar, Self

from finetune.errors import Stopped

ASKING = ("SIGTERM", "SIGINT", "SIGUSR1")
"""What schedulers send before a limit, what Ctrl-C sends, what SLURM is told to send."""
AGAIN = "Go on with the same command."
NOTED = b"\nStops as soon as what is done is kept; Ctrl-C again stops at once.\n"


class Watch(ExitStack):
    """Inside, the signals are noted in `received`; a second Ctrl-C stops at once, as KeyboardInterrupt.

    What has to be let go of, however the command ends, is put on it as on any ExitStack.
    """

    now: ClassVar[Watch | None] = None
    """The one that we are inside of"""

    def __init__(self) -> None:
        super().__init__()
        self.received: str | None = None
        self.advice = AGAIN
        """How to go on after a stop here"""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in ASKING if hasattr(signal, name)):
                self.callback(signal.signal, number, signal.signal(number, self._note))
        self.callback(setattr, Watch, "now", Watch.now)
        Watch.now = self
        return super().__enter__()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            os.write(2, NOTED)
        self.received = signal.Signals(number).name


def received() -> str | None:
    """The signal that has asked the command to stop."""
    return Watch.now.received if Watch.now else None


def advice() -> str:
    """How to go on with the command if it stops now."""
    return Watch.now.advice if Watch.now else AGAIN


def heed() -> None:
    """A place where nothing that was done is lost: raises Stopped when a signal has asked for it."""
    if name := received():
        raise stopped(name)


def stopped(name: str) -> Stopped:
    """What is said of a signal where no step was taken yet."""
    return Stopped(f"Stopped by {name}; what is done is kept. {advice()}")
