"""Expected faults: what the user did or has is not as it must be. The command line prints them without a traceback."""

from __future__ import annotations

from collections.abc import Sequence

BAD_INPUT = 2
"""Exit status of an expected fault: nothing was trained."""
FAILED = 1
"""Exit status of a fault that appeared while working."""
STOPPED = 75
"""Exit status of a run that was stopped and can go on with --resume (EX_TEMPFAIL: try again)."""


class Fault(Exception):
    """An expected fault: says what was given, what was expected and what to do.

    `details` are listed below the message, one a line (every bad file of a folder, say).
    """

    status = BAD_INPUT

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__("\n".join([message, *(f"  - {line}" for line in details)]))
        self.message = message
        self.details = list(details)


class Finished(Fault):
    """What was asked for is done already."""

    status = 0


class Stopped(Fault):
    """A signal asked a run to stop; its state is kept."""

    status = STOPPED


class Failure(Fault):
    """Work that began and could not be finished as promised (an exported file that does not load back equal, say)."""

    status = FAILED
