"""Prior preservation (Ruiz et al. 2022, 2208.12242, section 3.3): what is trained beside the subject to keep its class.

Three ways to the same end: class pictures that the frozen base draws, the user's own, or none at all: the subject's own
pictures under the class prompt, held to what the frozen base predicts of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice

from finetune import class_pictures, data
from finetune.data import Example
from finetune.data.encoding import Track
from finetune.data.reading import concepts
from finetune.data.reading.concepts import Part
from finetune.errors import Fault
from finetune.families import Family, Source
from finetune.settings import Data, Prior


def check(settings: Prior, read: Data, subjects: Sequence[Example]) -> None:
    """Refuse, before a model is loaded, what prior preservation cannot work with."""
    if not settings.prior:
        return
    if settings.prior_weight < 0:
        raise Fault(f"--prior-weight {settings.prior_weight:g}: a weight is not negative; 1 is usual.")
    drawn = [concept for concept in _concepts(settings, read) if concept.class_data is None]
    if drawn and settings.prior_from == "pictures" and min(settings.class_images, settings.class_steps) < 1:
        raise Fault(
            f"--class-images {settings.class_images}, --class-steps {settings.class_steps}: at least one of each; "
            "--no-prior trains without class pictures."
        )
    for number, concept in enumerate(_concepts(settings, read)):
        own = [example for example in subjects if example.concept == number]
        prompts = _class_prompts(settings, concept, own)
        if concept.class_data is not None:
            data.read_plain(concept.class_data, prompts[0])


def examples(
    family: Family,
    source: Source,
    settings: Prior,
    read: Data,
    subjects: Sequence[Example],
    seed: int,
    resolution: int,
    track: Track,
) -> list[Example]:
    """What goes beside the subjects, concept by concept, with the class prompts and the prior's weight."""
    if not settings.prior:
        return []
    found: list[Example] = []
    for number, concept in enumerate(_concepts(settings, read)):
        own = [example for example in subjects if example.concept == number]
        prompts = _class_prompts(settings, concept, own)
        if settings.prior_from == "base":
            beside = _taught(settings, concept, own)
        elif concept.class_data is not None:
            beside = data.read_plain(concept.class_data, prompts[0])
        else:
            drawn = class_pictures.draw(family, source, prompts, settings, seed, resolution, track)
            beside = data.read_files(drawn, prompts[0])
        if settings.prior_from == "pictures":
            beside = [replace(one, captions=(prompt,)) for one, prompt in zip(beside, cycle(prompts), strict=False)]
        found += [replace(one, concept=number, weight=settings.prior_weight * concept.weight) for one in beside]
    return found


def lessons(companions: Sequence[Example], count: int) -> list[Example]:
    """For a model that has no adapter to switch off: the base is asked beforehand, at `count` fixed draws in all."""
    taught = [example for example in companions if example.taught]
    asked = [replace(example, lesson=number) for number, example in enumerate(islice(cycle(taught), count))]
    return [example for example in companions if not example.taught] + asked


def class_prompt(caption: str, trigger: str, word: str) -> str:
    """The caption with the class for its trigger: "a photo of sks dog" and "a photo of sks" -> "a photo of dog"."""
    known = rf"\b{re.escape(trigger)}\b" + (rf"(?:\s+{re.escape(word)}\b)?" if word else "")
    said = re.sub(known, word.replace("\\", r"\\"), caption)
    return re.sub(r"(^|,)\s*,", r"\1", " ".join(said.split())).strip(" ,")


def _concepts(settings: Prior, read: Data) -> list[Part]:
    """The run's concepts; the class that one does not name is the run's own."""
    return [
        replace(
            part,
            class_prompt=part.class_prompt or settings.class_prompt,
            class_data=part.class_data or settings.class_data,
        )
        for part in concepts.parts(read)
    ]


def _class_prompts(settings: Prior, concept: Part, own: Sequence[Example]) -> tuple[str, ...]:
    """The class prompts of a concept, one or more, as they are given or as they follow from the captions."""
    if concept.class_prompt:
        return concept.class_prompt
    if settings.class_word is None:
        raise Fault(
            "prior preservation needs --class-prompt, what the subject is one of "
            '(e.g. "a photo of a dog"): the caption of the class pictures. With --trigger sks --class-word dog it is '
            "made from the captions. --no-prior trains without."
        )
    return tuple(dict.fromkeys(_derived(settings, concept, caption) for one in own for caption in one.captions))


def _derived(settings: Prior, concept: Part, caption: str) -> str:
    word, trigger = settings.class_word or "", concept.data.trigger
    if not trigger:
        raise Fault("--class-word: replaces the trigger in the captions: name it with --trigger, e.g. --trigger sks.")
    made = class_prompt(caption, trigger, word)
    if made == caption:
        raise Fault(
            f'--class-word {word}: the caption "{caption}" does not hold the trigger {trigger}, so no class '
            "prompt follows from it. Give --class-prompt, or put the trigger into the caption."
        )
    return made


def _taught(settings: Prior, concept: Part, own: Sequence[Example]) -> list[Example]:
    """The subject's pictures under the class prompts."""
    given = concept.class_prompt
    return [
        replace(
            example,
            captions=given or tuple(dict.fromkeys(_derived(settings, concept, text) for text in example.captions)),
            taught=True,
            mask=None,
            repeats=1,
        )
        for example in own
    ]
