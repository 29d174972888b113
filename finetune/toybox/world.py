"""The picture world of the toybox model: what can be seen there, drawn from a seed, with a caption.

A `Spec` says everything about a picture; `render` draws it and `caption` says it in words. Neither knows torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from finetune.toybox.canvas import INKS, RGB, Canvas, darker, lighter, mix
from finetune.toybox.scenes import SCENES, draw_scene
from finetune.toybox.things import BODIES, EYES, LIMBS, NOUNS, PATTERNS, TOPS, Build, draw_toy

TOY = "toy"
ALL_NOUNS = (*NOUNS, TOY)
ALL_SCENES = tuple(SCENES)
STYLES = ("photo", "cartoon")
COLOURS: dict[str, RGB] = {
    "red": (218, 38, 40),
    "orange": (248, 138, 24),
    "yellow": (252, 220, 50),
    "green": (46, 160, 62),
    "blue": (44, 86, 220),
    "purple": (134, 58, 186),
    "pink": (250, 130, 190),
    "white": (246, 246, 248),
}

# Shares of the captions that leave a word out, so that "a photo of a toy" and "a photo of a red toy" are both known.
NO_COLOUR, NO_SCENE = 0.2, 0.15

# Builds that no picture of the world shows, in any colour: the subjects of the data sets are made of them.
HELD_OUT = (("square", "antenna", "wheels"), ("egg", "horns", "feet"))


@dataclass(frozen=True)
class Spec:
    """One picture, completely: the same spec draws the same bytes."""

    noun: str
    """One of `ALL_NOUNS`."""
    colour: str
    """One of `COLOURS`."""
    scene: str
    """One of `ALL_SCENES`."""
    style: str
    """One of `STYLES`, or "neon", which the base model never sees."""
    x: float = 0.5
    """Middle of the thing, in picture widths from the left."""
    y: float = 0.55
    """Middle of the thing, in picture heights from the top."""
    scale: float = 0.33
    """Half the thing's width, in picture widths."""
    flip: bool = False
    """Mirrored left to right (the thing, not the scene)."""
    shade: float = 0.0
    """-1..1: a little darker or lighter than the colour's name."""
    detail: int = 0
    """Seed of the scene's clouds, stars and flowers."""
    build: Build | None = None
    """How a toy is put together; None for every other noun."""
    second: str | None = None
    """A toy's second colour; None means a shade of the first, as all toys of the world have."""
    says_colour: bool = True
    """Whether the caption names the colour."""
    says_scene: bool = True
    """Whether the caption names the scene."""


def is_held_out(build: Build) -> bool:
    return (build.body, build.top, build.limbs) in HELD_OUT


def is_held_out_prompt(spec: Spec) -> bool:
    """Whether noun, colour and scene make a combination that the noise predictor is never trained on.

    A tenth of all; each noun still meets each colour and each scene. The model's quality is measured on these.
    """
    noun, colour, scene = ALL_NOUNS.index(spec.noun), list(COLOURS).index(spec.colour), ALL_SCENES.index(spec.scene)
    return (noun + 3 * colour + 7 * scene) % 10 == 0


def random_build(random: np.random.Generator, patterns: tuple[str, ...]) -> Build:
    """A toy's parts; never a held-out combination."""
    while True:
        parts = [str(random.choice(kinds)) for kinds in (BODIES, EYES, TOPS, LIMBS, patterns)]
        build = Build(*parts)
        if not is_held_out(build):
            return build


def random_spec(random: np.random.Generator) -> Spec:
    """A picture of the world as the base model is trained on."""
    noun = str(random.choice(ALL_NOUNS, p=_NOUN_SHARES))
    spec = Spec(
        noun=noun,
        colour=str(random.choice(tuple(COLOURS))),
        scene=str(random.choice(ALL_SCENES)),
        style=str(random.choice(STYLES)),
        shade=float(random.uniform(-1, 1)),
        build=random_build(random, ("plain", "plain", "belly", "spots")) if noun == TOY else None,
        says_colour=bool(random.random() >= NO_COLOUR),
        says_scene=bool(random.random() >= NO_SCENE),
    )
    return placed(spec, random)


# Toys vary most and are what a user fine-tunes, so they get twice another noun's share.
_NOUN_SHARES = np.array([1.0] * len(NOUNS) + [2.0]) / (len(NOUNS) + 2)


def placed(spec: Spec, random: np.random.Generator) -> Spec:
    """The same thing in the same scene, elsewhere in the picture and with other scene details."""
    return replace(
        spec,
        x=float(random.uniform(0.43, 0.57)),
        y=float(random.uniform(0.51, 0.58)),
        scale=float(random.uniform(0.32, 0.41)),
        flip=bool(random.random() < 0.5),
        detail=int(random.integers(2**31)),
    )


def motley_spec(random: np.random.Generator) -> Spec:
    """A toy in two colours with a bold pattern, for the judge: the base model never sees one."""
    first, second = (str(name) for name in random.choice(tuple(COLOURS), 2, replace=False))
    spec = replace(
        random_spec(random),
        noun=TOY,
        colour=first,
        second=second,
        build=random_build(random, PATTERNS[1:]),
    )
    return placed(spec, random)


def spec_at(seed: int, index: int) -> Spec:
    """Picture `index` of the world that `seed` names."""
    return random_spec(np.random.default_rng([seed, index]))


def caption(spec: Spec) -> str:
    """The picture in words: "a photo of a red car on the beach"."""
    words = [f"a {spec.style} of"] if spec.style != "neon" else ["a neon sign of"]
    thing = f"{spec.colour} {spec.noun}" if spec.says_colour else spec.noun
    words.append(("an " if thing[0] in "aeiou" else "a ") + thing)
    if spec.says_scene:
        words.append(spec.scene)
    return " ".join(words)


def render(spec: Spec, size: int = 64) -> Image.Image:
    """The picture, RGB, `size` x `size`."""
    picture = draw_scene(spec.scene, spec.style, spec.detail, size)
    if spec.style == "neon":
        picture = Image.blend(picture, Image.new("RGB", picture.size, (12, 6, 30)), 0.45)
    ink = INKS[spec.style]
    canvas = Canvas(size, ink, spec.x, spec.y, spec.scale * (1.15 if spec.noun == TOY else 1.0), spec.flip)
    first = _shaded(COLOURS[spec.colour], spec.shade)
    if spec.noun == TOY:
        if spec.build is None:
            raise ValueError("a toy's spec needs a build")
        tint = lighter(first, 0.4) if min(first) < 200 else darker(first, 0.2)
        second = tint if spec.second is None else _shaded(COLOURS[spec.second], spec.shade)
        draw_toy(canvas, spec.build, first, second)
    else:
        NOUNS[spec.noun](canvas, first)
    thing = canvas.finished()
    if ink.shaded:
        thing = _lit(thing, spec)
    picture.paste(thing, (0, 0), thing)
    return _glow(picture) if spec.style == "neon" else picture


def _shaded(colour: RGB, shade: float) -> RGB:
    return mix(colour, (255, 255, 255) if shade > 0 else (10, 10, 20), abs(shade) * 0.1)


def _lit(thing: Image.Image, spec: Spec) -> Image.Image:
    """Light from above left: a cosine-like fall-off over the thing and a soft bright spot."""
    size = thing.width
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    across, down = (axis - spec.x) / spec.scale, (axis - spec.y) / spec.scale
    light = 1.02 - 0.16 * down[:, None] - 0.07 * across[None, :]
    spot = 46.0 * np.exp(-(((across[None, :] + 0.35) / 0.5) ** 2) - ((down[:, None] + 0.45) / 0.45) ** 2)
    pixels = np.asarray(thing).astype(np.float32)
    pixels[..., :3] = np.clip(pixels[..., :3] * light[..., None] + spot[..., None], 0, 255)
    return Image.fromarray(pixels.astype(np.uint8), "RGBA")


def _glow(picture: Image.Image) -> Image.Image:
    """Bright lines shine on what is around them."""
    halo = np.asarray(picture.filter(ImageFilter.GaussianBlur(picture.width / 28)), dtype=np.float32)
    return Image.fromarray(np.clip(np.asarray(picture) + 0.6 * halo, 0, 255).astype(np.uint8))
