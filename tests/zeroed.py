"""python zeroed.py STEP WORDS ...: as stopping.py (STEP 0: it is not stopped), where DeepSpeed is possible on a CPU.

Accelerate leaves DeepSpeed out there. Here its state is told, before anything is prepared, what it tells itself on
GPUs (accelerate/state.py); all that follows is the code that runs there, with gloo between the processes. DeepSpeed's
C++ for inference on CPUs, which training never calls, is not compiled (minutes). Where NAN is set, a gradient of the
last process is not finite once, see poisoned.py.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import poisoned
from accelerate.state import AcceleratorState, DistributedType, PartialState
from stopping import at

from finetune import cli, loop

make = AcceleratorState.__init__


def believing(self: AcceleratorState, *given: Any, **named: Any) -> None:
    make(self, *given, **named)
    plugin = named.get("deepspeed_plugin")
    if plugin is not None and self.distributed_type in (DistributedType.MULTI_CPU, DistributedType.NO):
        plugin.set_mixed_precision(named.get("mixed_precision") or "no")
        plugin.select(_from_accelerator_state=True)
        self.deepspeed_plugins, self._mixed_precision = plugin, "no"
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED


if __name__ == "__main__":
    os.environ |= {"DS_ACCELERATOR": "cpu"}
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    AcceleratorState.__init__ = believing  # type: ignore[method-assign]
    loop.Training._step = at(int(sys.argv[1]))  # type: ignore[method-assign]
    if "NAN" in os.environ:
        loop._accumulate = poisoned.gradient(averaged=False)
    cli.main(sys.argv[2:])
