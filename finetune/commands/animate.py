"""finetune animate: from prompt to prompt and seed to seed, or along a path of zooming and panning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.commands import drawing
from finetune.commands.drawing import Drawing
from finetune.errors import Fault

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.families import Family


@dataclass(frozen=True)
class Config(Drawing):
    """Draw an animation. With --zoom, --pan or --init each frame is drawn from the last; else frames lie between the
    prompts and the seeds."""

    prompt: tuple[str, ...] = ()
    """What to draw; several prompts follow one another."""
    scale: tuple[float, ...] = (1.0,)
    """Strength of the adapters: one number for all, or one each."""
    seed: tuple[int, ...] = (0,)
    """Seeds to go through, from the first to the last; along a path, the first frame's."""
    frames: int = 24
    """Frames in all."""
    fps: float = 8.0
    """Frames in a second."""
    zoom: float | None = None
    """How much nearer each frame comes: 1.02 is 2 %; below 1 it goes back."""
    pan: tuple[float, ...] = ()
    """How far each frame moves to the right and down, in shares of the picture: 0.02 0."""
    strength: float | None = None
    """How much of the last frame is drawn anew in each. Default: .4"""
    steps: int = 30
    """Denoising steps."""
    guidance: float = 5.0
    """How strictly the prompt is followed."""
    output: Path = Path("animation.webp")
    """File to write: .webp, .gif, or .mp4, which takes ffmpeg."""
    overwrite: bool = False
    """Write over a file that is there."""

    @property
    def travels(self) -> bool:
        return self.zoom is not None or bool(self.pan) or self.init is not None


def main(config: Config) -> None:
    # What can be refused is refused before a model is loaded.
    _require_sense(config)
    from finetune import animation

    animation.require_writable(config.output)
    scales = config.scale * len(config.adapter) if len(config.scale) == 1 else config.scale
    drawing.told(config.adapter, scales)
    drawing.require_words(config, config.prompt)
    start = drawing.initial(config, config.strength if config.init else None)

    from rich.console import Console
    from rich.progress import track

    family = drawing.load(config)
    drawing.set_scales(family, scales)
    frames = _frames(config, family, start.picture if start else None)
    shown = track(frames, "draw", total=config.frames, console=Console(stderr=True))
    animation.write(list(shown), config.output, config.fps)
    print(config.output)


def _frames(config: Config, family: Family, first: Image | None) -> Iterator[Image]:
    from finetune import animation
    from finetune.initial import Initial

    alike = {"negative": config.negative, "steps": config.steps, "guidance": config.guidance, "size": config.size}
    if not config.travels:
        return animation.between(
            family,
            config.prompt,
            config.seed,
            config.frames,
            batch=config.batch,
            **alike,  # type: ignore[arg-type]
        )
    if first is not None:
        side = config.size or family.resolution()
        first = Initial(first, 0).fitted(side, family.pipeline.vae_scale_factor).picture
    path = animation.Path2D(config.zoom or 1.0, *config.pan)
    strength = 0.4 if config.strength is None else config.strength
    return animation.along(family, path, config.prompt, config.seed[0], config.frames, first, strength, **alike)


def _require_sense(config: Config) -> None:
    drawing.require_sense(config, config.prompt, config.scale)
    if config.mask is not None or config.extend:
        raise Fault("--mask and --extend: an animation draws whole pictures.")
    if config.output.exists() and not config.overwrite:
        raise Fault(f"{config.output}: it is there already. Name another --output, or give --overwrite.")
    for name, least in (("frames", 2), ("steps", 1)):
        if getattr(config, name) < least:
            raise Fault(f"--{name} {getattr(config, name)}: at least {least}.")
    if config.fps <= 0 or (config.zoom is not None and config.zoom <= 0):
        raise Fault("--fps and --zoom: numbers above 0.")
    if len(config.pan) not in (0, 2):
        raise Fault(f"--pan {' '.join(map(str, config.pan))}: two numbers, to the right and down, e.g. 0.02 0.")
    if not config.seed or min(config.seed) < 0:
        raise Fault("--seed: one or more, each 0 or more.")
    if config.travels and len(config.seed) > 1:
        raise Fault("--seed: along a path one seed begins, and each frame has the next. Give one.")
    if not config.travels and (config.strength is not None or len(config.prompt) == len(config.seed) == 1):
        raise Fault("nothing would move: give several prompts or seeds, or --zoom, --pan or --init.")
