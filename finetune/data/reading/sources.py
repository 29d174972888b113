"""From settings to examples: folders, tables, data sets, one concept or several. All faults are said at once.

`survey` tells what is wrong, `read` refuses it. No file of the user's is changed, passed over or replaced.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from finetune import keys, settings
from finetune.data.examples import Example
from finetune.data.framing import masks
from finetune.data.reading import captions, concepts, folder, library, memo, metadata, pictures
from finetune.data.reading.concepts import Part
from finetune.data.reading.found import Found, Picture, Problem, listed
from finetune.data.reading.partners import with_sources
from finetune.data.reading.pictures import BadPicture, Facts, printable
from finetune.errors import Fault
from finetune.settings import Data

STRICT = "--strict takes pictures with a caption of their own only: write the captions, or go without --strict."


def read(data: Data, texts: settings.Captions | None = None, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """The pictures to train, and those that are held out (none, unless `validation` asks for them).

    By concept, then by name. Every picture is decoded whole. Raises one Fault that lists all that is wrong.
    """
    examples, problems = survey(data, texts)
    refuse(problems, data)
    return held_out(examples, data, seed)


def survey(data: Data, texts: settings.Captions | None = None) -> tuple[list[Example], list[Problem]]:
    """The pictures that can be trained as they are, and all that keeps the training from starting.

    Raises Fault only where the settings do not say what to read.
    """
    texts = texts or settings.Captions()
    wrong = [Problem("setting", fault.rstrip(".")) for fault in captions.check_settings(texts)]
    try:
        pictures.colour(data.background)
    except Fault as fault:
        wrong.append(Problem("setting", fault.message))
        data = replace(data, background="white")
    examples: list[Example] = []
    for part in concepts.parts(data):
        found, problems = _part(part, texts)
        examples += found
        wrong += [replace(problem, concept=part.number) for problem in problems]
    return examples, wrong


def refuse(problems: Sequence[Problem], data: Data) -> None:
    """Raise one Fault for all problems, each kind with its remedy; nothing when there are none."""
    if not problems:
        return
    parts = concepts.parts(data)
    if len(parts) == 1 and len(problems) == 1 and problems[0].code in ("place", "setting"):
        raise Fault(problems[0].text)
    titles = [f"{printable(part.title)}: " if len(parts) > 1 else "" for part in parts]
    details = [titles[problem.concept] + problem.text for problem in problems]
    raise refusal(data, details, _remedies(problems, data.strict))


def refusal(data: Data, problems: Sequence[str], remedies: Iterable[str]) -> Fault:
    """What is said of data that cannot be trained on."""
    parts = concepts.parts(data)
    place = printable(parts[0].data.data or "") if len(parts) == 1 else f"the {len(parts)} concepts"
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    said = " ".join(dict.fromkeys(remedies))
    return Fault(f"{place}: {count}; nothing there was changed. {said}".rstrip(), problems)


def held_out(examples: Sequence[Example], data: Data, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples to train, and those to validate with: of each concept the share that it asks for.

    Chosen by what the pictures show, so that neither names nor copies matter: equal pictures stay together, and a
    picture that is added changes the choice by one. At least one is trained. Raises Fault where that cannot be.
    """
    out: set[str] = set()
    for part in concepts.parts(data):
        digests = {one.facts.digest for one in examples if one.concept == part.number and one.facts}
        share = part.data.validation
        if not share:
            continue
        if len(digests) < 2:
            where = f"{printable(part.title)}: " if part.title else ""
            raise Fault(f"{where}validation {share:g}: of one picture nothing can be held out. Add pictures, or set 0.")
        count = min(max(1, round(share * len(digests))), len(digests) - 1)
        chosen = sorted(digests, key=lambda digest: keys.key(seed, "validation", digest))[:count]
        out |= {f"{part.number} {digest}" for digest in chosen}

    def is_out(one: Example) -> bool:
        return one.facts is not None and f"{one.concept} {one.facts.digest}" in out

    return [one for one in examples if not is_out(one)], [one for one in examples if is_out(one)]


def read_plain(place: Path, caption: str, weight: float = 1.0) -> list[Example]:
    """A folder's pictures, all with the same caption and weight: class pictures. Looked at as closely as others."""
    listing = folder.look(place)
    if not listing.pictures:
        raise Fault(folder.none_found(listing))
    return read_files(listing.pictures, caption, weight)


def read_files(files: Sequence[Path], caption: str, weight: float = 1.0) -> list[Example]:
    """The same of files that are named one by one, in their order."""
    facts, problems = _decode([Picture(path, path.name) for path in files], "white")
    if problems:
        refuse(problems, Data(str(files[0].parent)))
    return [Example(path, (caption,), path.name, weight, facts=facts[path]) for path in files]


def find(data: Data, texts: settings.Captions) -> Found:
    """The pictures that the settings name, with their own captions. Raises Fault when there is nothing to find."""
    name, several = data.data or "", texts.several_captions
    if name.startswith(library.PREFIX):
        return library.find(data, several)
    listing = folder.look(Path(name))
    table = metadata.table_of(listing)
    if table is None:
        return folder.find(listing, data.skip, several)
    return metadata.find(listing, table, data.skip, several, data.caption_column)


def _part(part: Part, texts: settings.Captions) -> tuple[list[Example], list[Problem]]:
    """One concept's examples and problems."""
    problems = [Problem("setting", fault) for fault in concepts.check(part)]
    try:
        found = find(part.data, texts)
    except Fault as fault:
        return [], [*problems, *_of_fault(fault)]
    facts, unreadable = _decode(found.pictures, part.data.background)
    told = {file for problem in found.problems for file in problem.files if problem.code == "caption file"}
    problems += [*unreadable, *found.problems]
    examples: list[Example] = []
    if captions.check(part.data.trigger, part.data.template) is None:
        examples, missing = _captioned(part, found.pictures, facts, told, texts)
        problems += missing
    try:
        examples, faults = masks.attach(examples, part.data.masks, part.data.alpha_masks)
    except Fault as fault:
        return examples, [*problems, *(replace(one, code="mask") for one in _of_fault(fault))]
    problems += [Problem("mask", fault) for fault in faults]
    try:
        examples, faults = with_sources(examples, part.data.sources, part.data.background)
    except Fault as fault:
        return examples, [*problems, *(replace(one, code="source") for one in _of_fault(fault))]
    return examples, problems + [Problem("source", fault) for fault in faults]


def _captioned(
    part: Part, found: Sequence[Picture], facts: dict[Path, Facts], told: set[str], texts: settings.Captions
) -> tuple[list[Example], list[Problem]]:
    """The readable pictures that have a caption, as examples; and those that lack one, or whose is lost."""
    examples, missing = list[Example](), list[Problem]()
    for one in found:
        own = tuple(dict.fromkeys(_made(part, text) for text in one.captions))
        given = own or tuple(text for text in [_made(part, None)] if text)
        if not own and (part.data.strict or not given) and one.name not in told:
            missing.append(Problem("no caption", f"{printable(one.name)}: {one.lack}", (one.name,)))
        if given and one.path in facts:
            examples.append(
                Example(
                    one.path,
                    given,
                    one.name,
                    one.weight * part.weight,
                    part.number,
                    one.repeats * part.repeats,
                    one.focus,
                    one.mask,
                    own_caption=bool(own),
                    facts=facts[one.path],
                )
            )  # fmt: skip
    return examples, missing + _lost(part, found, examples, texts)


def _made(part: Part, own: str | None) -> str:
    return captions.made(own, part.data.prompt, part.data.trigger, part.data.template)


def _lost(part: Part, found: Sequence[Picture], examples: Sequence[Example], texts: settings.Captions) -> list[Problem]:
    """Captions that the template leaves out, triggers that tag dropout would."""
    problems = []
    with_caption = [one.name for one in found if one.captions]
    if captions.drops(part.data.template) and (with_caption or part.data.prompt):
        whose = f"the captions of {listed(with_caption)}" if with_caption else "the prompt"
        text = f'--template "{part.data.template}" leaves out {whose}: put {{caption}} where they belong'
        problems.append(Problem("setting", text, tuple(with_caption)))
    places = {
        one.name: place
        for one in examples
        for text in one.captions
        if (place := captions.loses(text, part.data.trigger, texts))
    }
    if places:
        text = f"the trigger {part.data.trigger} may be dropped with other tags from {listed(list(places))}"
        hint = f"put it first, or keep the first tags: --keep-tags {max(places.values())}"
        problems.append(Problem("setting", f"--tag-dropout {texts.tag_dropout:g}: {text}: {hint}", tuple(places)))
    return problems


def _decode(found: Sequence[Picture], background: str) -> tuple[dict[Path, Facts], list[Problem]]:
    """Decode all that was not decoded before: what was found in each, and those that cannot be used."""
    facts: dict[Path, Facts] = {}
    bad: list[Problem] = []
    for one, seen in zip(found, memo.facts_of([one.path for one in found], background), strict=True):
        if isinstance(seen, BadPicture):
            bad.append(Problem("picture", f"{printable(one.name)}: {seen.reason}", (one.name,)))
        else:
            facts[one.path] = seen
    return facts, bad


def _of_fault(fault: Fault) -> list[Problem]:
    return [Problem("place", text) for text in (fault.message, *fault.details)]


def _remedies(problems: Sequence[Problem], strict: bool) -> list[str]:
    """What to do about each kind."""
    remedies = []
    if unreadable := [name for problem in problems if problem.code == "picture" for name in problem.files]:
        names = " ".join(shlex.quote(printable(name)) for name in dict.fromkeys(unreadable))
        remedies.append(f"Repair or replace the pictures, or leave them out by name: --skip {names}")
    if any(problem.code == "no caption" for problem in problems):
        remedies.append(
            STRICT
            if strict
            else 'Give a caption for all that have none, e.g. --prompt "a photo of sks dog", or write the files.'
        )
    return remedies
