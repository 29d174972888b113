"""The adapter as files: in each format by which some program reads all of it rightly, loaded back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from finetune import export
from finetune.export import clients, formats, named
from finetune.export.clients import Verdict
from finetune.export.content import Adapter, File
from finetune.families import Family

DIFFUSERS = "pytorch_lora_weights.safetensors"
"""What diffusers looks for where only the repository is named (`load_lora_weights`)."""
NAMES = {"kohya": "{}.safetensors", "diffusers": DIFFUSERS, "peft": "{}-peft.safetensors"}
"""What the file of each format is called"""
OWN = {"peft": ("PEFT", "finetune")}
"""Who reads whatever the format holds"""


@dataclass(frozen=True)
class Files:
    kind: str
    """What the adapter is: LoRA, DoRA, ..."""
    readers: dict[str, tuple[str, ...]]
    """By file: the programs that read all of it, and rightly"""
    strangers: dict[str, str]
    """The other programs of which is known what they make of this family's adapters, and why they read none of these"""
    left: dict[str, str]
    """The files that LoRA is published in and that are not here, and why"""

    @property
    def shown(self) -> str:
        """The file that pictures are drawn with."""
        return DIFFUSERS if DIFFUSERS in self.readers else next(iter(self.readers))


def write(folder: Path, name: str, adapter: Adapter, family: Family, dtype: torch.dtype, live: str) -> Files:
    """Each is put on the model and compared; the one that pictures are drawn with stays there, called `live`.

    What no program reads is not written. Raises Fault where no format has a place for the adapter.
    """
    kind = type(family)
    formats.first(adapter, kind)  # raises where there is none
    readers: dict[str, tuple[str, ...]] = {}
    why: dict[str, str] = {}
    left: dict[str, str] = {}
    for form, pattern in NAMES.items():
        file = folder / pattern.format(name)
        if reason := formats.refused(adapter, form, kind):
            left |= {file.name: reason.message} if form not in OWN else {}
            continue
        export.convert(adapter, file, form, metadata=adapter.metadata, dtype=dtype, family=kind)
        verdicts = _judged(file, kind)
        why = {one.client: one.findings[0].reason for one in verdicts if not one.whole} | why
        if programs := (*(one.client for one in verdicts if one.whole), *OWN.get(form, ())):
            readers[file.name] = programs
        else:
            file.unlink()
            left[file.name] = "no program reads it rightly. " + ". ".join(
                f"{one.client}: {one.findings[0].reason}" for one in verdicts
            )
    served = {program for programs in readers.values() for program in programs}
    strangers = {program: reason for program, reason in why.items() if program not in served}
    files = Files(" and ".join(sorted({layer.said for layer in adapter})), readers, strangers, left)
    for file_name in [*(one for one in readers if one != files.shown), files.shown]:
        export.attach(family, folder / file_name, live)
        if file_name != files.shown:
            export.detach(family, live)
    return files


def _judged(file: Path, family: type[Family]) -> list[Verdict]:
    content = File(file)
    return clients.judge(named.Content(named.modules(content), family, content.metadata))
