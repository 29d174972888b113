"""python stopping.py STEP WORDS ...: the command line, the last of its processes being asked to stop within a step."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from finetune import cli, loop

take = loop.Training._step


def at(step: int) -> Callable[[loop.Training], loop.Report]:
    """Take steps, and send the signal in this one."""

    def watched(self: loop.Training) -> loop.Report:
        accelerator = self.accelerator
        if self.done == step - 1 and accelerator.process_index == accelerator.num_processes - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self)

    return watched


if __name__ == "__main__":
    loop.Training._step = at(int(sys.argv[1]))  # type: ignore[method-assign]
    cli.main(sys.argv[2:])
