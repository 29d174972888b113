"""python measuring.py ENGINE WORDS ...: the command line, for which each checkpoint's measuring is paid for.

ENGINE is ddp, or fsdp, which is made possible on a CPU as tests/sharded.py says.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from finetune import cli
from finetune.evaluation import during

if __name__ == "__main__":
    during.affordable = lambda *given: True  # type: ignore[assignment]
    engine, words = sys.argv[1], sys.argv[2:]
    if engine == "fsdp":
        sys.argv = ["sharded.py", "0", *words]
        runpy.run_path(str(Path(__file__).with_name("sharded.py")), run_name="__main__")
    else:
        cli.main(words)
