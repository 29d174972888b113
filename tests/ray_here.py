"""python ray_here.py SIGNAL,SIGNAL WORDS ...: docs/clusters/ray_job.py on a Ray of this machine's own.

Its GPU is one that Ray is only told of. The worker gets the signals one after the other, two steps apart each, so that
there is a checkpoint to go on from.
"""

from __future__ import annotations

import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

JOB = Path(__file__).parents[1] / "docs" / "clusters" / "ray_job.py"


def steps(run: Path) -> int:
    log = run / "log.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def workers() -> list[psutil.Process]:
    """Those that have a task in hand."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.name().startswith("ray::train")]


def disturb(names: list[str], run: Path) -> None:
    for number, name in enumerate(names, start=1):
        while steps(run) < 2 * number or not workers():
            time.sleep(0.02)
        workers()[0].send_signal(signal.Signals[name])
        print(f"{name} in step {steps(run) + 1}", flush=True)


if __name__ == "__main__":
    import ray

    ray.init(num_cpus=1, num_gpus=1, object_store_memory=200_000_000, include_dashboard=False)
    names, sys.argv = sys.argv[1].split(","), [str(JOB), *sys.argv[2:]]
    run = Path(sys.argv[sys.argv.index("--output") + 1])
    threading.Thread(target=disturb, args=(names, run), daemon=True).start()
    runpy.run_path(str(JOB), run_name="__main__")
