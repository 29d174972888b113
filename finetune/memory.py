"""Out of memory: said with what to change, of what the command's own settings leave open. No batch is skipped."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from traceback import clear_frames
from types import TracebackType
from typing import Any

from finetune import ledger
from finetune.errors import Failure

SAYINGS = (
    "out of memory",  # CUDA, MPS
    "can't allocate memory",  # PyTorch's CPU allocator
    "cannot allocate memory",  # the system
    "alloc_failed",  # cuBLAS, cuDNN
    "bad_alloc",  # C++
    *("could not create a primitive", "could not create a memory"),  # oneDNN, which says no more
)
PHASES = {
    "finetune.generate": "drawing",
    "finetune.commands.grid": "drawing",
    "finetune.commands.animate": "drawing",
    "finetune.commands.explain": "drawing",
    "finetune.previews": "sampling",
    "finetune.evaluation": "measuring",
    "finetune.class_pictures": "drawing class pictures",
    "finetune.data.encoding": "encoding pictures and captions",
    "finetune.export": "exporting",
    "finetune.checkpoints": "keeping the state",
    "finetune.loop": "training",
    "finetune.families": "loading the model",
    "finetune.adapters": "loading the model",
}
"""What a module is doing when the memory ends: the outermost of those that were at work tells."""
LEAST_STATE = ("adamw8bit", "pagedadamw8bit", "lion8bit", "adafactor", "came")


@dataclass(frozen=True)
class Remedy:
    text: str
    resumes: bool = False
    """Whether a run that has a checkpoint goes on with it: what is trained stays the same."""


@contextmanager
def told(config: Any) -> Iterator[None]:
    """Inside, a lack of memory becomes a Failure that says where it was and what to change; a run's state is failed."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_short(error):
            raise
        doing, folder = phase(error.__traceback__), _get(config, "output", "output", None)
        clear_frames(error.__traceback__)  # what filled the memory hangs on them
        if folder is not None:
            _mark_failed(folder)
        raise _failure(error, config, folder, doing) from error


def is_short(error: BaseException) -> bool:
    """Whether an error is a lack of memory, of the GPU or of the machine."""
    said = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(saying in said for saying in SAYINGS)
    )


def phase(trace: TracebackType | None) -> str:
    """What was being done: `training`, say."""
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__"))
        for known, doing in PHASES.items():
            if module == known or module.startswith(f"{known}."):
                return doing
        trace = trace.tb_next
    return "working"


def remedies(config: Any, doing: str) -> list[Remedy]:
    """What is left to change under these settings: what pays most and costs least comes first."""
    found = {
        "drawing": _drawing,
        "sampling": _sampling,
        "drawing class pictures": _class_pictures,
        "training": _training,
        "keeping the state": _training,
    }
    return [*found.get(doing, lambda config: [])(config), *_anywhere(config, doing)]


def _drawing(config: Any) -> list[Remedy]:
    batch = getattr(config, "batch", 1)
    return [Remedy("--batch 1: one picture at a time")] * (batch > 1) + [Remedy("a smaller --size")]


def _sampling(config: Any) -> list[Remedy]:
    several = len(_get(config, "samples", "sample_prompts", ())) != 1
    one = [Remedy("one --sample-prompts: samples are drawn together, up to four", True)] if several else []
    return [*one, Remedy("--sample-every 0: no samples on the way; `finetune generate` draws them afterwards", True)]


def _class_pictures(config: Any) -> list[Remedy]:
    return [Remedy("--prior-from base, which needs no class pictures, or your own: --class-data FOLDER")]


def _training(config: Any) -> list[Remedy]:
    batch, accumulation = _get(config, "train", "batch_size", 1), _get(config, "train", "accumulation", 1)
    optimizer = _get(config, "optim", "optimizer", "auto")
    found = []
    if not _get(config, "train", "gradient_checkpointing", False):
        found.append(Remedy("--gradient-checkpointing: the same training, about a third more time a step", True))
    if batch > 1:
        found.append(Remedy(f"--batch-size 1 --accumulation {batch * accumulation}: the same steps, in passes", True))
    if not _get(config, "full", "optimizer_in_backward", True) and not _get(config, "optim", "max_grad_norm", 1.0):
        found.append(Remedy("--optimizer-in-backward: the same training, without all gradients at once", True))
    if _get(config, "full", "weights", "bf16") == "fp32":
        found.append(Remedy("--weights bf16 --precision bf16: half of what trains, rounded by chance"))
    if optimizer not in LEAST_STATE:
        found.append(Remedy("--optimizer adamw8bit: a quarter of AdamW's state"))
    if _get(config, "optim", "text_encoder_lr", None) is not None:
        found.append(Remedy("no --text-encoder-lr: the text encoders leave the memory"))
    return found


def _anywhere(config: Any, doing: str) -> list[Remedy]:
    """What makes all of it smaller."""
    found, precision = [], _get(config, "train", "precision", getattr(config, "precision", None))
    if precision in ("fp32", "auto"):
        found.append(Remedy("--precision bf16: half of what does not train"))
    if doing != "loading the model" and hasattr(config, "framing"):
        sides = config.framing.resolution
        found.append(Remedy(f"a smaller --resolution than {max(sides)}" if sides else "a smaller --resolution"))
    if doing in ("training", "keeping the state", "loading the model") and hasattr(config, "train"):
        rank = _get(config, "adapter", "rank", None)
        if rank is not None and _get(config, "model", "quantize", "nf4") is None:
            found.append(Remedy("--quantize nf4 (or int8): the frozen layers in a quarter (half) of bf16's room"))
        if rank is None:
            found.append(Remedy("the recipe lora: hardly any gradients and optimizer state"))
        elif rank > 4:
            found.append(Remedy(f"a smaller --rank than {rank}"))
    return [*found, Remedy("less beside it: other programs that use the same memory", True)]


def _failure(error: BaseException, config: Any, folder: Path | None, doing: str) -> Failure:
    why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    kept = folder is not None and any((folder / "checkpoints").glob("step-*"))
    begun = folder is not None and (folder / ledger.FILE).is_file()
    lines = [
        remedy.text + ("" if remedy.resumes or not kept else " (in a new run)") for remedy in remedies(config, doing)
    ]
    again = f"Go on with `finetune train --output {folder} --resume`" if begun else "Try again"
    after = "No picture was left out, and the last checkpoint is kept. " if kept else ""
    return Failure(f"Out of memory while {doing} ({why}). {after}{again} and the first of these that suffices:", lines)


def _mark_failed(folder: Path) -> None:
    entry = ledger.read(folder)
    if entry is not None and entry.state == "running":
        with suppress(OSError):
            ledger.write(folder, entry, state="failed")


def _get(config: Any, group: str, name: str, default: Any) -> Any:
    """A setting of a group, where the command has it."""
    return getattr(getattr(config, group, None), name, default)
