"""ray job submit --working-dir . -- python docs/clusters/ray_job.py lora --config lora-sdxl-subject --output ... ...

A task on one GPU of a Ray cluster. When its worker or its machine is gone, or a signal has stopped it, Ray begins it
again somewhere else with the same command, which goes on. Paths are those of a file system that all machines share.
"""

from __future__ import annotations

import sys

import ray

from finetune import cli
from finetune.errors import STOPPED


class Moved(Exception):
    """Stopped by a signal, the state is kept: to be begun again."""


# Retries are of workers and machines that went, and of what was stopped; other failures end the job with their status.
@ray.remote(num_gpus=1, max_retries=20, retry_exceptions=[Moved])
def train(words: list[str]) -> int:
    """Within the worker: what kills the worker kills the training, and none is left to hold the run's folder."""
    try:
        cli.main(["train", *words, "--resume-or-begin", "--processes", "1"])
    except SystemExit as end:
        if end.code == STOPPED:
            raise Moved from None
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(ray.get(train.remote(sys.argv[1:])))
