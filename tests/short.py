"""python short.py WORDS ...: the command line, which from its first training step on gets no more memory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from finetune import cli, loop

take = loop.Training._step


def limited(self: loop.Training) -> loop.Report:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2**20, resource.RLIM_INFINITY))
    return take(self)


if __name__ == "__main__":
    loop.Training._step = limited  # type: ignore[method-assign]
    cli.main(sys.argv[1:])
