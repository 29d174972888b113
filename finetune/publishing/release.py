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
    adapts: bool
    """Whether an adapter is published; else a whole model."""
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
    files: Mapping[str, str]
    """What each file is for"""
    drawn: Sequence[Drawn]
    drawing: Mapping[str, str]
    """How the pictures were drawn"""
    strength: str | None = None
    """The picture of strengths"""
    training: Mapping[str, str] = field(default_factory=dict)
    held_out: Mapping[int, float] = field(default_factory=dict)
    measured: tuple[State, State] | None = None
    """The base and what is published, with their figures"""
    description: str | None = None
    author: str | None = None
    tags: Sequence[str] = ()
    embedded: bool = False
    """Whether the base is `toybox`"""
    from_noise: bool = False
    """Whether it must be drawn from pure noise (--zero-terminal-snr)"""
    clip_skip: int | None = None
    """Which layer of CLIP it was trained with, as clients count"""
    skipped: int = 0
    """How many layers that leaves out, as diffusers counts"""

    @property
    def name(self) -> str:
        """What its files are called."""
        return self.repo.partition("/")[2]
