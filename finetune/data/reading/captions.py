"""What a picture's captions become before they are trained: trigger and template, shuffled and dropped tags.

Every draw is keyed by what the picture shows and what its caption says, never by a file's name: a renamed picture keeps
its captions, and with them its place in the cache.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from string import Formatter
from typing import Any

from finetune import keys
from finetune.errors import Fault
from finetune.settings import Captions

TEMPLATE = "{trigger}, {caption}"
"""How a caption is made where there is a trigger and no template is given."""
FIELDS = ("trigger", "caption")
LOOSE = " \t,;:"
"""What is cut off at the ends of a template that was filled with nothing."""
HERE = "\0"
"""Stands for the trigger while that is done: what it ends with belongs to it."""


def made(own: str | None, prompt: str | None, trigger: str | None, template: str | None) -> str:
    """One caption: the picture's own or else the prompt, in the template. "" when there is nothing to say.

    A text that holds the trigger already stays as it is: captions are often written with it. Raises Fault when the
    template is not one, see `check`.
    """
    text, word = _one_line(own) or _one_line(prompt), _one_line(trigger)
    form = template if template is not None else TEMPLATE if word else "{caption}"
    parts = _parse(form)
    if word and holds(text, word) and any(field == "trigger" for _, field in parts):
        return text
    if not text and not word and any(field for _, field in parts):
        return ""
    values = {"trigger": HERE, "caption": text, "": ""}
    filled = _one_line("".join(literal + values[field] for literal, field in parts))
    return (filled if text else filled.strip(LOOSE)).replace(HERE, word)


def holds(text: str, trigger: str) -> bool:
    """Whether the trigger stands in the text as a word of its own; text encoders take capitals for small letters."""
    return re.search(rf"(?<!\w){re.escape(trigger.casefold())}(?!\w)", text.casefold()) is not None


def check(trigger: str | None, template: str | None) -> str | None:
    """What is wrong with a trigger and a template, whatever the captions; None when nothing is."""
    if trigger is not None and not trigger.strip():
        return "--trigger is empty. Give the word that stands for the subject or style, e.g. --trigger sks."
    if template is None:
        return None
    try:
        fields = {field for _, field in _parse(template)}
    except Fault as fault:
        return fault.message
    if "trigger" in fields and not trigger:
        return f'--template "{template}" has a place for the trigger: name it, e.g. --trigger sks.'
    if trigger and "trigger" not in fields and not holds(template, trigger):
        return f'--template "{template}" leaves out the trigger {trigger}: put {{trigger}} where it belongs.'
    return None


def drops(template: str | None) -> bool:
    """Whether a template, one that `check` finds nothing wrong with, has no place for the caption."""
    return template is not None and all(field != "caption" for _, field in _parse(template))


def check_settings(settings: Captions) -> list[str]:
    """What is wrong with the settings, whatever the captions."""
    shares = {"--tag-dropout": settings.tag_dropout, "--caption-dropout": settings.caption_dropout}
    faults = [f"{flag} {share:g}: a share, from 0 to 1." for flag, share in shares.items() if not 0 <= share <= 1]
    if settings.keep_tags < 0:
        faults.append(f"--keep-tags {settings.keep_tags}: a number of tags, 0 or more.")
    if settings.caption_variants < 1:
        faults.append(f"--caption-variants {settings.caption_variants}: at least 1.")
    return faults


def variants(texts: Sequence[str], settings: Captions, seed: int, digest: str) -> tuple[str, ...]:
    """What a picture is trained with, one or more texts of which each is as likely: its captions with tags shuffled
    and dropped, `caption_variants` of each.

    `digest` is the picture's. A text stands in it more than once where that is its share: two of three draws, say.
    Raises Fault for settings that are out of range.
    """
    if faults := check_settings(settings):
        raise Fault(faults[0], faults[1:])
    own = tuple(dict.fromkeys(texts))
    if not (settings.shuffle_tags or settings.tag_dropout):
        return own
    drawn = [
        _varied(text, settings, keys.rng(seed, "caption", digest, text, number))
        for text in own
        for number in range(settings.caption_variants)
    ]
    counts = Counter(drawn)
    often = math.gcd(*counts.values())  # the same shares, in as few texts as they take
    return tuple(text for text, count in counts.items() for _ in range(count // often))


def tags(text: str) -> list[str]:
    """The parts of a text that commas part."""
    return [tag for part in text.split(",") if (tag := part.strip())]


def loses(text: str, trigger: str | None, settings: Captions) -> int | None:
    """The number of tags to keep so that the trigger is never dropped from this text; None when it cannot be."""
    if not trigger or not settings.tag_dropout:
        return None
    places = [number for number, tag in enumerate(tags(text), 1) if holds(tag, trigger)]
    return places[0] if places and places[0] > settings.keep_tags else None


def cut_off(tokenizers: Iterable[Any], text: str, chunks: int = 1) -> str | None:
    """What of a text lies beyond a text encoder's window (77 tokens for CLIP), and is never seen; None when all fits.

    Of several tokenizers (transformers' own), the narrowest counts. `chunks`: how often the window is filled.
    """
    return max((cut for one in tokenizers if (cut := _cut(one, text, chunks))), key=len, default=None)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _parse(template: str) -> list[tuple[str, str]]:
    """(what stands before it, field) for each field of a template; the field of what stands at the end is empty."""
    known = "It knows {trigger} and {caption}, nothing else; a brace itself is written twice, {{ and }}."
    try:
        parts = list(Formatter().parse(template))
    except ValueError:
        raise Fault(f'--template "{template}": a brace without its other half. {known}') from None
    for _, field, spec, conversion in parts:
        if field is not None and (field not in FIELDS or spec or conversion):
            shown = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise Fault(f'--template "{template}": {{{shown}}} is not known. {known}')
    return [(literal, field or "") for literal, field, _, _ in parts]


def _varied(text: str, settings: Captions, rng: Any) -> str:
    """The text with its tags shuffled and dropped; one tag is left at least, as the empty caption is another matter."""
    parts = tags(text)
    if len(parts) < 2:
        return text
    kept, loose = parts[: settings.keep_tags], parts[settings.keep_tags :]
    if settings.shuffle_tags:
        loose = [loose[i] for i in rng.permutation(len(loose))]
    stays = rng.random(len(loose)) >= settings.tag_dropout
    left = [tag for tag, stay in zip(loose, stays, strict=True) if stay]
    return ", ".join(kept + left or loose[:1])


def _cut(tokenizer: Any, text: str, chunks: int) -> str | None:
    window = tokenizer.model_max_length
    if window > 1_000_000:  # transformers' way to say that it knows of no limit
        return None
    window = chunks * (window - tokenizer.num_special_tokens_to_add())
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    beyond = found["input_ids"][window:]
    if not beyond:
        return None
    if not tokenizer.is_fast:
        return str(tokenizer.decode(beyond)).strip()
    return text[found["offset_mapping"][window][0] :].strip()
