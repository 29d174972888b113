"""Processes that begin with the libraries imported: importing them takes longer than a tiny training.

`run` has them forked by a process that imports the libraries, computes nothing (what is forked has none of the other
threads), and serves all tests of this process. As a script this file is that process. Where it matters how processes
are started, a test starts them itself (`test_launchers.py`).
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

PATIENCE = 300
"""Seconds after which a command hangs."""


def run(
    words: Sequence[str], processes: int = 1, script: str | Path = "", environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """What `python -m finetune WORDS` ends with and says, or `python SCRIPT WORDS`; where there are to be several
    processes, by torchrun's launcher. On the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("out", "err")]
        asked = {
            "processes": processes, "script": str(script), "words": [str(word) for word in words],
            "environment": {**environment, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
            "said": [str(file) for file in said],
        }  # fmt: skip
        server = _server()
        print(json.dumps(asked), file=server.stdin, flush=True)  # type: ignore[arg-type]
        status = int(server.stdout.readline())  # type: ignore[union-attr]
        out, err = (file.read_text(encoding="utf-8", errors="replace") for file in said)
    return subprocess.CompletedProcess(list(words), status, out, err)


@cache
def _server() -> subprocess.Popen[str]:
    """It ends when its standard input does, with this process."""
    command = [sys.executable, "-X", "faulthandler", __file__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def imported() -> None:
    """Import what a training imports, and compute nothing: no thread is there when a process is forked."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import diffusers
    import peft  # noqa: F401
    import transformers

    from finetune import demo, export, families, loop, run, shelf  # noqa: F401

    shelf.load("lora")
    _ = diffusers.StableDiffusionPipeline, transformers.CLIPTextModel, transformers.CLIPTokenizer


def launched(processes: int, name: str, worker: Callable[..., None], *given: Any) -> None:
    """torchrun's own launcher, except that it forks its workers from this process."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(1, 1, processes, run_id=name, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          start_method="fork", max_restarts=0)  # fmt: skip
    elastic_launch(config, worker)(*given)


def undisturbed() -> None:
    """Take back the launcher's signal handlers, which a fork inherits."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def apart(said: Sequence[str | Path], work: Callable[[], None]) -> int:
    """Fork a process that leads a group of its own, writes to these files and works; its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        for number, file in zip((1, 2), said, strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _command(script: str, words: list[str]) -> None:
    undisturbed()
    if script:
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")
        return
    from finetune import cli

    cli.main(words)


def _serve() -> None:
    """Run the commands that standard input gives, a line each; a line with each one's status."""
    imported()
    with os.fdopen(os.dup(1), "w", buffering=1) as told:
        for line in sys.stdin:
            asked = json.loads(line)

            def work(asked: dict[str, Any] = asked) -> None:
                os.environ.clear()
                os.environ.update(asked["environment"])
                signal.alarm(PATIENCE)
                if asked["processes"] == 1:
                    _command(asked["script"], asked["words"])
                else:
                    launched(asked["processes"], "forked", _command, asked["script"], asked["words"])

            pid = apart(asked["said"], work)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # workers of a launcher that has lost its patience
            print(status, file=told)


if __name__ == "__main__":
    _serve()
