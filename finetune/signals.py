"""Signals that ask a training to stop: the step is finished, the state kept, and then it stops."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

ASKING = ("SIGTERM", "SIGINT", "SIGUSR1")
"""What schedulers send before a limit, what Ctrl-C sends, what SLURM is told to send."""


class Signals:
    """Inside, the signals are noted in `received`; a second Ctrl-C stops at once, as KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            known = [getattr(signal, name) for name in ASKING if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._note) for number in known}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
