"""python apart.py FOLDER RANK WORDS ...: the command line. Before the weights are compared at the end, each process
writes its own to FOLDER; the process RANK, if there is one, then changes one number."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune import cli, run
from finetune.loop import Training

compare = run.Run._require_equal


def written(self: run.Run, training: Training) -> None:
    rank = self.accelerator.process_index
    own = {name: p.detach().contiguous() for name, p in training.parameters.items()}
    save_file(own, Path(sys.argv[1]) / f"rank-{rank}.safetensors")
    if rank == int(sys.argv[2]):
        with torch.no_grad():
            next(iter(training.parameters.values())).view(-1)[0].add_(1e-6)
    compare(self, training)


if __name__ == "__main__":
    run.Run._require_equal = written  # type: ignore[method-assign]
    cli.main(sys.argv[3:])
