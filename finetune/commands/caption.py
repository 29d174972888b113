"""finetune data caption FOLDER: write captions with a vision-language model, never over one that is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from finetune.errors import Fault


@dataclass(frozen=True)
class Config:
    """Write a caption for each picture that has none, with a vision-language model. Stop and go on as you like.

    Files `name.txt` beside the pictures. One that is there is never written over, unless with --overwrite.
    """

    folder: Positional[Path]
    """The pictures."""
    captioner: str = "HuggingFaceTB/SmolVLM-500M-Instruct"
    """The model: a folder, or a hub name, of any image-text-to-text model of transformers."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    instruction: str = "Describe this picture in one short sentence."
    """What the model is told. Models that only describe do not read it."""
    trigger: str | None = None
    """The word that stands for the subject or style, e.g. sks; it is put into each caption."""
    template: str | None = None
    """How a caption is made of both. Default: "{trigger}, {caption}"."""
    skip: tuple[str, ...] = ()
    """File names to leave out."""
    overwrite: bool = False
    """Write new captions over those that are there. If it is stopped, the next such run begins anew."""
    longest: int = 60
    """Tokens that the model writes at most. The text encoders of Stable Diffusion read 75."""
    background: str = "white"
    """Colour behind transparent pictures: a name or #rrggbb."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the model. `auto`: bf16 on a GPU, else fp32."""


def main(config: Config) -> None:
    from finetune.data import captioning
    from finetune.data.reading import captions

    # What can be refused is refused before a model is loaded.
    if config.longest < 1:
        raise Fault(f"--longest {config.longest}: at least 1.")
    if fault := captions.check(config.trigger, config.template):
        raise Fault(fault)
    todo = captioning.plan(config.folder, config.skip, config.overwrite, config.background)
    kept = f"{len(todo.kept)} caption files were there and stay as they are" if todo.kept else ""
    if not todo.jobs:
        print(f"Nothing to do: {kept}. --overwrite writes them anew.")
        return
    captioning.require_writable(config.folder)

    import torch
    from rich.console import Console
    from rich.progress import track

    from finetune import engine

    device = torch.device(engine.device())
    half = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    captioner = captioning.Captioner.load(
        config.captioner,
        config.revision,
        config.instruction,
        config.longest,
        device,
        torch.bfloat16 if half else torch.float32,
    )
    console = Console(stderr=True)
    written = captioning.write(
        todo,
        captioner,
        config.trigger,
        config.template,
        config.background,
        lambda jobs, what: track(jobs, what, console=console),
        config.overwrite,
    )
    print(f"{written} captions written to {config.folder}" + (f"; {kept}." if kept else "."))
    print("Read them before you train: a caption says what is not the subject.")
