"""python sharded.py STEP WORDS ...: as stopping.py (STEP 0: it is not stopped), where FSDP is possible on a CPU.

Accelerate leaves FSDP out there. Here its state is told, before anything is prepared, what it tells itself on GPUs
(accelerate/state.py); all that follows is the code that runs there, with gloo between the processes.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState
from stopping import at

from finetune import cli, loop

make = AcceleratorState.__init__


def believing(self: AcceleratorState, *given: Any, **named: Any) -> None:
    make(self, *given, **named)
    plugin = named.get("fsdp_plugin")
    if plugin is not None and self.distributed_type in (DistributedType.MULTI_CPU, DistributedType.NO):
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin, self.distributed_type = plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


if __name__ == "__main__":
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    AcceleratorState.__init__ = believing  # type: ignore[method-assign]
    loop.Training._step = at(int(sys.argv[1]))  # type: ignore[method-assign]
    cli.main(sys.argv[2:])
