"""What a card and sidecars are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune.evaluation.tables import State


@dataclass(frozen=True)
class Drawn:
    """A sample picture."""

    file: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Release:
    repo: str
    """user/name on the hub"""
    title: str
    kind: str | None
    """Of adapter: LoRA, DoRA, ..., or of new words; None: a whole model is published."""
    base: str | None
    """The base's hub name, where it has one"""
    revision: str | None
    family: str
    """What people call the kind of model"""
    tag: str
    site: str
    """Civitai's name of the base"""
    webui: str
    """AUTOMATIC1111's"""
    words: Sequence[str]
    """Triggers, or the prompts that stand for them"""
    license: Mapping[str, str]
    """`license`, `license_name` and `license_link`, as the hub has them; empty where it is not known"""
    files: Mapping[str, Sequence[str]]
    """Who reads each file, or what it is for"""
    drawn: Sequence[Drawn]
    drawing: Mapping[str, str]
    """How the pictures were drawn"""
    taught: Sequence[str] = ()
    """New words, each with a file that is called by it"""
    encoders: Mapping[str, str] = field(default_factory=dict)
    """What such a file calls its tensor for each text encoder ("" is the word) -> the encoder"""
    strangers: Mapping[str, str] = field(default_factory=dict)
    """Programs that read none of them, and why"""
    left: Mapping[str, str] = field(default_factory=dict)
    """Files that others of the kind have and that are left out, and why"""
    strength: str | None = None
    """The picture of strengths"""
    training: Mapping[str, str] = field(default_factory=dict)
    held_out: Mapping[int, float] = field(default_factory=dict)
    measured: tuple[State, State] | None = None
    """The base and what is published, with their figures"""
    description: str | None = None
    author: str | None = None
    tags: Sequence[str] = ()
    usage: str | None = None
    """What must be known to use it, where a trigger is not enough"""
    embedded: bool = False
    """Whether the base is `toybox`"""
    from_noise: bool = False
    """Whether it must be drawn from pure noise (--zero-terminal-snr)"""
    inpaints: bool = False
    """Whether it draws a part of a picture anew"""
    clip_skip: int | None = None
    """Which layer of CLIP it was trained with, as clients count"""
    skipped: int = 0
    """How many layers that leaves out, as diffusers counts"""

    @property
    def adapts(self) -> bool:
        return self.kind is not None

    @property
    def main(self) -> str:
        """The adapter for the programs with windows, which stands beside its sidecars."""
        return f"{self.name}.safetensors"

    def read_by(self, *programs: str) -> str | None:
        """The first file that one of these reads."""
        return next((file for file, readers in self.files.items() if set(programs) & set(readers)), None)

    @property
    def embeddings(self) -> Sequence[str]:
        """The files of the new words."""
        return [f"{word}.safetensors" for word in self.taught]

    @property
    def name(self) -> str:
        """What its files are called."""
        return self.repo.partition("/")[2]
