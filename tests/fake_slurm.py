"""The commands that docs/clusters/train.sbatch asks of SLURM, on this machine. Called as `srun` and as `scontrol`.

srun starts SLURM_NTASKS tasks, each with its number, and ends with their highest status. Where LIMIT names a run's log,
the tasks get SIGUSR1 as soon as a step is in it, as SLURM sends it before a job's limit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def srun(words: list[str]) -> int:
    command = words[[word.startswith("--") for word in words].index(False) :]
    tasks = [
        subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(int(os.environ["SLURM_NTASKS"]))
    ]
    log = os.environ.get("LIMIT")
    while log and tasks[0].poll() is None:
        if Path(log).is_file() and Path(log).read_text():
            for task in tasks:
                task.send_signal(signal.SIGUSR1)
            break
        time.sleep(0.05)
    return max(task.wait() if task.wait() >= 0 else 128 - task.wait() for task in tasks)


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("localhost")
    elif words[0] == "requeue":
        queue = Path(os.environ["QUEUE"])
        queue.write_text((queue.read_text() if queue.is_file() else "") + f"{words[1]}\n")
    else:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol}[Path(sys.argv[0]).name](sys.argv[1:]))
