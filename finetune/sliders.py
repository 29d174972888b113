"""Concept sliders (Gandikota et al. 2023, 2311.12092): an adapter whose strength leads from one prompt to another.

A slider needs no pictures: the frozen base draws what it is trained on. At strength s of 1 or -1 the model is held to

    base(x_t, target) + s * eta * mean over p of (base(x_t, positive, p) - base(x_t, negative, p))

p being what is to be preserved (eq. 8; their sum there, so that eta means the same for any number of them here). That
is a sum of the base's answers, and so a lesson like those of prior preservation: nothing of the loop knows of sliders.
The paper trains strength 1 alone; both are trained here, so that both directions lead where they should. Predictions
of noise, velocity and flow are each linear in one another at given x_t and t, and so the formula is the same for all.
"""

from __future__ import annotations

from dataclasses import replace

from finetune import class_pictures, data, methods
from finetune.data import Example
from finetune.data.encoding import Track
from finetune.errors import Fault
from finetune.families import Family, Source
from finetune.settings import Adapter, Prior, Slider

TRAINED = (1.0, -1.0)
"""Strengths that it is trained at"""


def check(settings: Slider, adapter: Adapter) -> None:
    """Refuse, before a model is loaded, what is no direction, and a method that has no two of them."""
    said = {name: getattr(settings, name).strip() for name in ("target", "positive", "negative")}
    if missing := [f"--{name}" for name, prompt in said.items() if not prompt]:
        raise Fault(
            f'{", ".join(missing)}: missing. A slider has three prompts, e.g. --target "a photo of a person" '
            '--positive "a photo of a very old person" --negative "a photo of a very young person".'
        )
    if said["positive"].casefold() == said["negative"].casefold():
        raise Fault(f'--positive and --negative are both "{said["positive"]}": there is no direction between them.')
    if not all(kept.strip() for kept in settings.preserve):
        raise Fault("--preserve: an empty one says nothing.")
    if settings.eta <= 0:
        raise Fault(f"--eta {settings.eta:g}: more than 0. For the other direction let the two prompts change places.")
    for name in ("target_images", "target_steps"):
        if getattr(settings, name) < 1:
            raise Fault(f"--{name.replace('_', '-')} {getattr(settings, name)}: at least 1.")
    if not settings.strengths:
        raise Fault("--strengths: at least one, e.g. -2 -1 0 1 2.")
    methods.require_linear(adapter)


def examples(
    family: Family, source: Source, settings: Slider, seed: int, resolution: int, track: Track
) -> list[Example]:
    """Pictures of the target, drawn by the base or found where it drew them before, each for each strength.

    Call it before anything trains.
    """
    how = Prior(
        class_images=settings.target_images,
        class_steps=settings.target_steps,
        class_guidance=settings.target_guidance,
    )
    files = class_pictures.draw(family, source, [settings.target], how, seed, resolution, track)
    drawn = data.read_files(files, settings.target)
    leaning = direction(settings)
    return [replace(one, taught=True, leaning=leaning, strength=strength) for one in drawn for strength in TRAINED]


def direction(settings: Slider) -> tuple[tuple[str, float], ...]:
    """What is added to the base's answer for the target: prompts, and what the answer for each weighs."""
    ends, kept = ((settings.positive, 1), (settings.negative, -1)), settings.preserve
    step = settings.eta / max(len(kept), 1)
    return tuple((f"{end}, {one}" if one else end, sign * step) for one in kept or ("",) for end, sign in ends)
