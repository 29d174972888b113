"""What is drawn to be judged: the prompts of the protocols, and what a run learned, in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from finetune.data import Example
from finetune.data.reading import concepts
from finetune.errors import Fault
from finetune.glance import EMBEDDED
from finetune.settings import Data, Prior

COMMON = (
    "a {} in the jungle", "a {} in the snow", "a {} on the beach", "a {} on a cobblestone street",
    "a {} on top of pink fabric", "a {} on top of a wooden floor", "a {} with a city in the background",
    "a {} with a mountain in the background", "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)  # fmt: skip
CHANGED = ("a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}")
OBJECTS = (
    *COMMON,
    "a {} with a wheat field in the background", "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background", "a {} floating on top of water",
    "a {} floating in an ocean of milk", "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror", "a {} on top of the sidewalk in a crowded street", "a {} on top of a dirt road",
    "a {} on top of a white rug",
    *CHANGED,
)  # fmt: skip
"""The 25 prompts for objects of Ruiz et al. 2022 (2208.12242): `{}` is the trigger and the class, "sks dog"."""
LIVE = (
    *COMMON,
    "a {} wearing a red hat", "a {} wearing a santa hat", "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle", "a {} in a chef outfit", "a {} in a firefighter outfit",
    "a {} in a police outfit", "a {} wearing pink glasses", "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit",
    *CHANGED,
)  # fmt: skip
"""Those for live subjects."""
LIVING = ("animal", "baby", "bird", "boy", "cat", "child", "dog", "girl", "horse", "kitten", "man", "person", "puppy",
          "woman")  # fmt: skip
"""Classes that are taken for live ones."""
SHORT = (*OBJECTS[:4], "a {} floating on top of water", "a red {}")
"""A quarter of the protocol, for one's own runs."""
SHORT_TOYBOX = (
    *(f"a photo of {{}} {scene}" for scene in ("in the snow", "at night", "under water", "on the beach")),
    "a cartoon of {} in a meadow",
)
"""In the words that toybox knows."""
UNRELATED = (
    "a photo of a bowl of fruit on a table", "an oil painting of a sailing ship in a storm",
    "a street in a city at night", "a mountain lake in autumn", "a steaming cup of coffee", "a portrait of an old man",
    "a pencil drawing of a bicycle", "a red car on a country road",
)  # fmt: skip
"""Nothing that a subject's pictures teach: what moves here was not meant to."""
UNRELATED_TOYBOX = (
    "a photo of a red car on the beach", "a photo of a white cat in a room", "a cartoon of a blue fish under water",
    "a photo of a yellow rocket at night", "a photo of a pink cup in the snow", "a cartoon of a green boat in a meadow",
)  # fmt: skip
STYLED = (
    "a cat", "a bowl of fruit on a table", "a street in a city in the rain", "a lighthouse on a cliff",
    "a portrait of an old woman", "a bicycle leaning on a wall", "a mountain lake", "a steaming cup of coffee",
)  # fmt: skip
"""What is asked of a style: things that people draw."""
STYLED_TOYBOX = (
    "a blue cat on the beach", "a yellow car in the snow", "a red house at night", "a green fish in a room",
    "a purple rocket in a meadow", "a white cup under water",
)  # fmt: skip
"""In the words that toybox knows; none of the pictures of `datasets/neon` shows one of these."""
BEGINNING = re.compile(r"^(?:(?:a|an|the)\s+)?(?:\w+\s+)?(?:photo|picture|painting|drawing|cartoon|image)\s+of\s+")
STYLE, THING = "style", "{}"
"""The protocol for styles, and what stands for a thing in a style's words"""
ARTICLE = re.compile(r"^(?:a|an|the)\s+")


@dataclass(frozen=True)
class Subject:
    """One thing that a run learned, and what is asked of it."""

    name: str
    """What tables call it: its words"""
    prompts: tuple[str, ...]
    plain: tuple[str, ...]
    """The same prompts with the class in the subject's place: what the base is asked, and fidelity measured against,
    as no metric model knows the trigger"""
    class_prompt: str | None
    """The bare class; None where a run does not tell any (a style)"""
    style: bool = False
    """A style: what must not take it on is no class, but every prompt without its words"""


@dataclass(frozen=True)
class Asked:
    """What the user says of the words; what is left out follows from the run's settings and captions."""

    prompt: tuple[str, ...] = ()
    subject: str | None = None
    """ "sks dog"; of a style, "neonart, {}" """
    class_name: str | None = None
    """ "dog" """


def subjects(
    data: Data, prior: Prior, examples: Sequence[Example], asked: Asked, protocol: str, model: str
) -> list[Subject]:
    """The run's concepts in their order. Raises Fault where a run does not tell its words and nobody said them."""
    found, parts = [], concepts.parts(data)
    if len(parts) > 1 and asked != Asked():
        raise Fault(
            "--prompt, --subject and --class-name are for a run of one concept. Of several, each one's trigger and "
            "class_prompt are taken from the run's settings."
        )
    for part in parts:
        own = [caption for one in examples if one.concept == part.number for caption in one.captions]
        if protocol == STYLE:
            found.append(_style(own, asked, model))
            continue
        bare = next(iter(part.class_prompt or prior.class_prompt), None)
        noun = asked.class_name or (_bare(bare) if bare else prior.class_word)
        words = asked.subject or _words(part.data, own, noun)
        noun = noun or _class_in(words, part.data)
        prompts = asked.prompt or tuple(text.format(words) for text in _texts(protocol, model, noun))
        if noun is not None and (bare is None or asked.class_name):
            bare = f"a photo of a {noun}"
        found.append(Subject(words, prompts, tuple(plain(one, words, noun) for one in prompts), bare))
    return found


def unrelated(model: str) -> tuple[str, ...]:
    """Prompts that a run should leave as the base draws them."""
    return UNRELATED_TOYBOX if model == EMBEDDED else UNRELATED


def plain(prompt: str, words: str, noun: str | None) -> str:
    """The prompt with the class for the subject's words: "a photo of sks dog" -> "a photo of a dog".

    Without a class the words go.
    """
    said = re.sub(rf"\b{re.escape(words)}\b", lambda _: noun or "", prompt)
    if noun:
        said = re.sub(rf"(^|\bof\s+)(?={re.escape(noun)}\b)", r"\1a ", said)
    return " ".join(said.split())


def _style(captions: Sequence[str], asked: Asked, model: str) -> Subject:
    """The style's words around things, and for the base the things alone."""
    around = asked.subject or _around([caption.split() for caption in captions])
    around = around if THING in around else f"{around} {THING}"
    words = " ".join(around.replace(THING, " ").split()).strip(" ,")
    things = STYLED_TOYBOX if model == EMBEDDED else STYLED
    prompts = asked.prompt or tuple(around.replace(THING, thing) for thing in things)
    before, after = (side.strip(" ,") for side in around.split(THING, 1))
    bare = tuple(plain(plain(one, before, None), after, None).strip(" ,") for one in prompts)
    return Subject(words, prompts, bare, None, style=True)


def _around(captions: Sequence[Sequence[str]]) -> str:
    """ "a neon sign of {}": what all captions begin and end with. Raises Fault where they tell no thing from it."""
    begin = _common(captions)
    end = _common([caption[len(begin) :][::-1] for caption in captions])[::-1]
    while begin and begin[-1] in ("a", "an", "the"):
        begin.pop()
    if not (begin or end) or any(len(caption) <= len(begin) + len(end) for caption in captions):
        raise Fault(
            "which words call the style? The captions do not all begin or end with them, beside what each picture "
            'shows: say it, with {} for what is to be shown, e.g. --subject "neonart, {}".'
        )
    return " ".join([*begin, THING, *end])


def _texts(protocol: str, model: str, noun: str | None) -> Sequence[str]:
    if protocol == "dreambooth":
        return LIVE if noun and noun.split()[-1] in LIVING else OBJECTS
    return SHORT_TOYBOX if model == EMBEDDED else SHORT


def _words(data: Data, captions: Sequence[str], noun: str | None) -> str:
    """ "sks dog": the trigger and the class, or what the captions all begin with, without "a photo of"."""
    if data.trigger:
        return " ".join(filter(None, (data.trigger, noun)))
    said = data.prompt or " ".join(_common([caption.split() for caption in captions]))
    words = _bare(said)
    if noun and (found := re.search(rf"\b{re.escape(noun)}\b", words)):
        words = words[: found.end()]
    if not words:
        raise Fault(
            "which words call what was learned? The captions do not all begin alike: say it, e.g. "
            '--subject "sks dog" --class-name dog.'
        )
    return words


def _class_in(words: str, data: Data) -> str | None:
    """Where a run tells no class, what follows the rare word: "sks dog" -> "dog". A trigger alone has none."""
    return words.partition(" ")[2] or None if data.trigger is None else None


def _common(captions: Sequence[Sequence[str]]) -> list[str]:
    """The words that all begin with."""
    return [words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*captions, strict=False))]


def _bare(text: str) -> str:
    """ "a photo of a dog" -> "dog"."""
    return ARTICLE.sub("", BEGINNING.sub("", text.strip()))
