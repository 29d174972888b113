"""Frames: between prompts and seeds, and along a path of zooming and panning, each frame drawn from the last."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Images
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional

from finetune import families, prompting, sampling
from finetune.errors import Failure, Fault
from finetune.families import Family
from finetune.initial import Initial

WRITTEN = (".gif", ".webp", ".mp4")


@dataclass(frozen=True)
class Path2D:
    """How what is seen moves from frame to frame."""

    zoom: float = 1.0
    """Above 1 it comes nearer."""
    right: float = 0.0
    """Shares of the picture's sides by which the view moves"""
    down: float = 0.0

    def moved(self, picture: Image) -> Image:
        """What is seen next; what was outside is filled with the picture's mirror image."""
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
        view = torch.tensor([[[1 / self.zoom, 0, 2 * self.right], [0, 1 / self.zoom, 2 * self.down]]])
        grid = functional.affine_grid(view, list(pixels.shape), align_corners=False)
        seen = functional.grid_sample(pixels, grid, "bicubic", "reflection", align_corners=False)
        return Images.fromarray(seen[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy())


def between(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    frames: int,
    *,
    negative: str = "",
    steps: int,
    guidance: float,
    size: int | None = None,
    batch: int = 4,
) -> Iterator[Image]:
    """From the first prompt and seed over those between to the last, at equal distances.

    Embeddings go in straight lines, noise on great circles (slerp, Shoemake 1985), which keeps its size. Where a frame
    falls on a prompt and a seed it is their picture.
    """
    side = size or family.resolution()
    read = [prompting.read(family, prompt) for prompt in prompts]
    with sampling.drawing(family):
        keys = prompting.embeddings(family, read, prompting.read(family, negative))
        noises = torch.cat([_noise(family, seed, side) for seed in seeds])
    places = torch.linspace(0, 1, frames, dtype=torch.float64)
    for start in range(0, frames, batch):
        part = places[start : start + batch].tolist()
        words = {name: torch.cat([_on_line(value, place) for place in part]) for name, value in keys.items()}
        with sampling.drawing(family):
            yield from family.pipeline(
                **words,
                latents=torch.cat([_on_circle(noises, place) for place in part]),
                generator=[torch.Generator("cpu").manual_seed(seeds[0]) for _ in part],
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=side,
                width=side,
            ).images


def along(
    family: Family,
    path: Path2D,
    prompts: Sequence[str],
    seed: int,
    frames: int,
    first: Image | None,
    strength: float,
    **options: Any,
) -> Iterator[Image]:
    """Each frame from the last one, moved along the path; each with the seed after the last one's, as in Deforum.

    The same noise in each would burn its pattern in. The prompts follow one another in equal parts.
    """
    for frame in range(frames):
        prompt = prompts[frame * len(prompts) // frames]
        start = None if first is None else Initial(path.moved(first) if frame else first, strength)
        if frame or first is None:
            [first] = sampling.sample(family, [prompt], [seed + frame], initial=start, weighted=True, **options)
        yield first


def require_writable(file: Path) -> None:
    """Raises Fault for an animation of another kind, and for MP4 where ffmpeg is not."""
    if file.suffix.lower() not in WRITTEN:
        raise Fault(f"--output {file}: one of {', '.join(WRITTEN)} is written.")
    if file.suffix.lower() == ".mp4" and shutil.which("ffmpeg") is None:
        raise Fault(f"--output {file}: MP4 is written by ffmpeg, which is not on this machine. Take .webp or .gif.")


def write(frames: Sequence[Image], file: Path, per_second: float) -> None:
    """GIF and WebP repeat for ever. Raises Failure when ffmpeg ends badly."""
    beside = file.with_name(f".writing-{file.name}")
    try:
        if file.suffix.lower() == ".mp4":
            _encode(frames, beside, per_second)
        else:
            first, *others = frames
            options: dict[str, Any] = {"quality": 90} if file.suffix.lower() == ".webp" else {}
            duration = round(1000 / per_second)
            first.save(beside, save_all=True, append_images=others, duration=duration, loop=0, **options)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def _encode(frames: Sequence[Image], file: Path, per_second: float) -> None:
    width, height = frames[0].size
    command = ["ffmpeg", "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(per_second), "-i", "-", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p"]
    raw = b"".join(frame.tobytes() for frame in frames)
    done = subprocess.run([*command, "-movflags", "+faststart", str(file)], input=raw, capture_output=True, check=False)
    if done.returncode:
        raise Failure(f"{file.name}: ffmpeg could not write it: {done.stderr.decode(errors='replace').strip()}")


def _noise(family: Family, seed: int, side: int) -> Tensor:
    """What the pipeline would draw itself with this seed: (1, C, h, w)."""
    pipeline: Any = family.pipeline
    part = next(families.denoiser(family).parameters())
    length = side // pipeline.vae_scale_factor
    shape = (1, pipeline.vae.config.latent_channels, length, length)
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=part.dtype).to(part.device)


def _place(count: int, place: float) -> tuple[int, float]:
    """The key before a place in [0, 1], and how far it is from there to the next."""
    before = min(int(place * (count - 1)), max(count - 2, 0))
    return before, place * (count - 1) - before


def _on_line(keys: Tensor, place: float) -> Tensor:
    before, share = _place(len(keys), place)
    return keys[before : before + 1].lerp(keys[before + 1 : before + 2], share) if share else keys[before : before + 1]


def _on_circle(keys: Tensor, place: float) -> Tensor:
    before, share = _place(len(keys), place)
    one = keys[before : before + 1]
    if not share:
        return one
    other = keys[before + 1 : before + 2]
    angle = torch.acos(functional.cosine_similarity(one.flatten().double(), other.flatten().double(), 0).clamp(-1, 1))
    if angle < 1e-4:
        return one.lerp(other, share)
    parts = torch.sin((1 - share) * angle) * one.double() + torch.sin(share * angle) * other.double()
    return (parts / torch.sin(angle)).to(one.dtype)
