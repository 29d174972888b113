"""The weights that train, as they lie in several processes: the same in each, or shared out (FSDP2, torch's DTensor)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from finetune.errors import Failure


def require_equal(parameters: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """Every process must have trained the same weights, to the bit. Raises Failure, in all of them, where not."""
    hashed = hashlib.sha256()
    for parameter in parameters.values():
        hashed.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    mine = torch.frombuffer(bytearray(hashed.digest()), dtype=torch.int64).to(accelerator.device)[None]
    each = accelerator.gather(mine).cpu()  # (processes, 4)
    other = [str(rank) for rank, digest in enumerate(each) if not torch.equal(digest, each[0])]
    if other:
        raise Failure(
            f"the processes did not train the same weights: those of process {', '.join(other)} are not process 0's. "
            "Nothing was exported. Look for other hardware, drivers or versions on one of the machines."
        )
