"""From pictures to figures: each measure over what the judges see, with its interval over the prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from PIL.Image import Image

from finetune.evaluation import measures
from finetune.evaluation.judges import Panel
from finetune.evaluation.prompts import Subject
from finetune.evaluation.tables import Figure

COSINE = "mean cosine (-1 to 1)"
SHOWN = 8
"""Nearest pairs of sample and training picture that are told."""


@dataclass(frozen=True)
class Drawn:
    """The pictures of one state. Each prompt's follow one another, the same number for each."""

    subjects: Sequence[Sequence[Image]]
    """Of each concept's prompts"""
    classes: Sequence[Sequence[Image]]
    """Of each concept's class prompt; empty where it has none. Of a style the
    unrelated ones: nothing may take it on"""
    unrelated: Sequence[Image]
    files: Sequence[str]
    """Names of the subjects' pictures"""


@dataclass(frozen=True)
class Real:
    """The pictures that they are compared with."""

    references: Sequence[Sequence[Image]]
    """Of each concept"""
    training: Sequence[Image]
    names: Sequence[str]
    """Of the training pictures"""


def figures(
    panel: Panel, drawn: Drawn, base: Drawn | None, real: Real, subjects: Sequence[Subject], seed: int
) -> dict[str, Figure]:
    """All that can be measured of a state, by measure. `base`: what the base has drawn; None where this is the base."""
    units = _units(drawn, subjects)
    made = [
        *_likeness(panel, drawn, real, units, seed),
        _fidelity(panel, drawn, subjects, units, seed),
        *(_classes(panel, drawn, real, subjects, seed) if any(drawn.classes) else ()),
        _diversity(panel, drawn, subjects, seed),
        *([_drift(panel, drawn, base, seed)] if base is not None else ()),
        _copies(panel, drawn, real, units, seed),
    ]
    return {figure.measure: figure for figure in made}


def _likeness(panel: Panel, drawn: Drawn, real: Real, units: Sequence[int], seed: int) -> Iterator[Figure]:
    scale = f"{COSINE} of its pictures with the real ones; higher is more alike"
    for number, (title, judge) in enumerate(panel.likeness.items(), 1):
        name = "likeness" if number == 1 else f"likeness {number}"
        yield _figure(name, title, _like(judge, drawn.subjects, real), units, judge.name, scale, seed)


def _fidelity(panel: Panel, drawn: Drawn, subjects: Sequence[Subject], units: Sequence[int], seed: int) -> Figure:
    without = "without its style" if any(one.style for one in subjects) else "which has the class for the subject"
    scale = f"{COSINE} of each picture with its prompt, {without}; higher follows better"
    texts = _plain(subjects)
    said = panel.words.read([texts[unit] for unit in units])
    values = measures.fidelity(panel.words.see([*chain(*drawn.subjects)]), said).tolist()
    return _figure("fidelity", panel.words_title, values, units, panel.words.name, scale, seed)


def _classes(panel: Panel, drawn: Drawn, real: Real, subjects: Sequence[Subject], seed: int) -> Iterator[Figure]:
    """How like the subject the bare class is, and how varied; each picture is a unit, as there is one prompt.

    Of a style, how like it pictures are whose prompts do not ask for it.
    """
    title, judge = next(iter(panel.likeness.items()))
    values = _like(judge, drawn.classes, real)
    if any(subject.style for subject in subjects):
        scale = f"{COSINE} of pictures of other prompts with the style's; lower is better"
        yield _figure("class drift", "style leak", values, range(len(values)), judge.name, scale, seed)
        return
    scale = f"{COSINE} of pictures of the bare class with the subject's; lower is better"
    title = "PRES" if title == "DINO" else "class drift"
    yield _figure("class drift", title, values, range(len(values)), judge.name, scale, seed)
    scale = "mean distance of two pictures of the bare class; higher is more varied"
    values = [value for own in drawn.classes if own for value in measures.apart(panel.differ.distances(own)).tolist()]
    title = f"class {panel.differ_title}"
    yield _figure("class diversity", title, values, range(len(values)), panel.differ.name, scale, seed)


def _diversity(panel: Panel, drawn: Drawn, subjects: Sequence[Subject], seed: int) -> Figure:
    scale = "mean distance of two pictures of one prompt; higher is more varied"
    values = [measures.diversity(panel.differ.distances(group)) for group in _groups(drawn, subjects)]
    return _figure("diversity", panel.differ_title, values, range(len(values)), panel.differ.name, scale, seed)


def _drift(panel: Panel, drawn: Drawn, base: Drawn, seed: int) -> Figure:
    scale = "1 - cosine with the base's picture of the same unrelated prompt and seed; lower is better"
    values = measures.drift(panel.whole.see(drawn.unrelated), panel.whole.see(base.unrelated)).tolist()
    return _figure("drift", "drift", values, range(len(values)), panel.whole.name, scale, seed)


def _copies(panel: Panel, drawn: Drawn, real: Real, units: Sequence[int], seed: int) -> Figure:
    scale = "share of the samples nearer to a training picture than these are to each other; lower is better"
    near = sorted(neighbours(panel, drawn, real), key=lambda one: one.sample)
    return _figure("copies", "copies", [float(one.alarm) for one in near], units, panel.whole.name, scale, seed)


def neighbours(panel: Panel, drawn: Drawn, real: Real) -> list[measures.Neighbour]:
    """Of each sample of the subjects' prompts, the nearest training picture, the nearest pair first."""
    return measures.neighbours(panel.whole.see([*chain(*drawn.subjects)]), panel.whole.see(real.training))


def pairs(near: Sequence[measures.Neighbour], drawn: Drawn, real: Real) -> list[dict[str, Any]]:
    """The nearest of them, by file."""
    return [
        {
            "file": drawn.files[one.sample],
            "picture": real.names[one.picture],
            "similarity": one.similarity,
            "alarm": one.alarm,
        }
        for one in near[:SHOWN]
    ]


def of_each_other(panel: Panel, real: Real) -> float:
    """How alike the real pictures of one concept are, as the first likeness sees it; the mean over the concepts."""
    judge = next(iter(panel.likeness.values()))
    values = [measures.likeness_of_each_other(judge.see(own)) for own in real.references]
    return sum(values) / len(values)


def bleeding(panel: Panel, drawn: Drawn, real: Real) -> list[list[float]]:
    """Row a, column b: likeness of concept a's pictures to concept b's; empty for a single concept."""
    if len(real.references) < 2:
        return []
    judge = next(iter(panel.likeness.values()))
    return measures.bleed([judge.see(own) for own in drawn.subjects], [judge.see(own) for own in real.references])


def _like(judge: Any, drawn: Sequence[Sequence[Image]], real: Real) -> list[float]:
    """Of each picture, with its own concept's."""
    return [
        float(value)
        for own, references in zip(drawn, real.references, strict=True)
        if own
        for value in measures.likeness(judge.see(own), judge.see(references))
    ]


def _figure(
    measure: str, title: str, values: Sequence[float], units: Sequence[int], judge: str, scale: str, seed: int
) -> Figure:
    mean = measures.by_unit(values, units, lambda group: sum(group) / len(group))
    told = measures.bootstrap(mean, seed, measure)
    return Figure(measure, title, told.value, told.low, told.high, told.units, judge, scale, tuple(mean))


def _plain(subjects: Sequence[Subject]) -> list[str]:
    return [prompt for subject in subjects for prompt in subject.plain]


def _each(drawn: Drawn, subjects: Sequence[Subject]) -> int:
    """Pictures of each prompt."""
    return len(drawn.subjects[0]) // len(subjects[0].plain)


def _units(drawn: Drawn, subjects: Sequence[Subject]) -> list[int]:
    """The number of each picture's prompt."""
    each = _each(drawn, subjects)
    return [prompt for prompt in range(len(_plain(subjects))) for _ in range(each)]


def _groups(drawn: Drawn, subjects: Sequence[Subject]) -> list[list[Image]]:
    """The pictures of each prompt."""
    each, pictures = _each(drawn, subjects), [*chain(*drawn.subjects)]
    return [pictures[start : start + each] for start in range(0, len(pictures), each)]
