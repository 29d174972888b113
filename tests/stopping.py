"""python stopping.py STEP WORDS ...: the command line, the last of its processes being asked to stop within a step."""

from __future__ import annotations

import os
import signal
import sys

from finetune import cli, loop

take = loop.Training._step


def watched(self: loop.Training) -> loop.Report:
    accelerator = self.accelerator
    if self.done == int(sys.argv[1]) - 1 and accelerator.process_index == accelerator.num_processes - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return take(self)


if __name__ == "__main__":
    loop.Training._step = watched  # type: ignore[method-assign]
    cli.main(sys.argv[2:])
