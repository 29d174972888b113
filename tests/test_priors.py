"""What is trained beside the subject: drawn class pictures, the user's own, or the base's own prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import measured
import pytest
import torch
from accelerate import Accelerator
from PIL import Image as Images

from finetune import adapters, families, loop, priors
from finetune.data import Example, read_plain
from finetune.errors import Fault
from finetune.families import Family, Source
from finetune.settings import Adapter, Concept, Data, Loss, Prior

DOG = Prior(class_prompt=("a photo of a dog",), class_images=3, class_steps=2, class_guidance=4.0, prior_weight=0.5)
DATA = Data(data="photos", trigger="sks")


@pytest.fixture
def source(tiny_models: dict[str, Path]) -> Source:
    return Source(str(tiny_models["sd"]))


@pytest.fixture
def family(source: Source) -> Family:
    return families.load(source)


@pytest.fixture
def subjects(tmp_path: Path) -> list[Example]:
    (tmp_path / "photos").mkdir()
    for name in ("b.png", "a.jpg"):
        Images.new("RGB", (80, 70), "brown").save(tmp_path / "photos" / name)
    found = read_plain(tmp_path / "photos", "a photo of sks dog")
    return [replace(found[0], captions=("a photo of sks dog on a sofa", "a photo of sks")), found[1]]


def track(items: Sequence[list[int]], what: str, total: int) -> Iterator[list[int]]:
    yield from items


def beside(
    family: Family, source: Source, settings: Prior, subjects: Sequence[Example], data: Data = DATA
) -> list[Example]:
    return priors.examples(family, source, settings, data, subjects, 0, 64, track)


def test_drawn_ones_are_exactly_those_asked_for(family: Family, source: Source, subjects: list[Example]) -> None:
    beside(family, source, replace(DOG, class_images=5), subjects)
    found = beside(family, source, DOG, subjects)
    assert [example.path.name for example in found] == ["00000.png", "00001.png", "00002.png"]
    assert {(example.captions, example.weight) for example in found} == {(("a photo of a dog",), 0.5)}
    assert beside(family, source, replace(DOG, prior=False), subjects) == []


def test_the_users_own_folder_is_used_as_it_is(family: Family, source: Source, subjects: list[Example]) -> None:
    mine = subjects[0].path.parent
    found = beside(family, source, replace(DOG, class_data=mine), subjects)
    assert [example.path for example in found] == [mine / "a.jpg", mine / "b.png"]
    assert {(example.captions, example.weight) for example in found} == {(("a photo of a dog",), 0.5)}
    assert sorted(path.name for path in mine.iterdir()) == ["a.jpg", "b.png"]


@pytest.mark.parametrize(
    ("caption", "word", "expected"),
    [
        ("a photo of sks dog", "dog", "a photo of dog"),
        ("a photo of sks", "dog", "a photo of dog"),
        ("sks, on a sofa", "", "on a sofa"),
        ("a sofa, sks, red", "", "a sofa, red"),
        ("a photo of sksy dog", "dog", "a photo of sksy dog"),
        ("a photo of sks dogs", "dog", "a photo of dog dogs"),
    ],
)
def test_class_prompts_follow_from_the_captions(caption: str, word: str, expected: str) -> None:
    assert priors.class_prompt(caption, "sks", word) == expected


def test_class_pictures_are_drawn_with_the_prompts_made_from_the_captions(
    family: Family, source: Source, subjects: list[Example]
) -> None:
    found = beside(family, source, replace(DOG, class_prompt=(), class_word="dog"), subjects)
    made = ["a photo of dog on a sofa", "a photo of dog"]
    assert [example.captions for example in found] == [(made[0],), (made[1],), (made[0],)]


def test_the_base_itself_is_the_teacher(family: Family, source: Source, subjects: list[Example]) -> None:
    found = beside(family, source, replace(DOG, prior_from="base"), subjects)
    assert [(one.path, one.captions, one.weight) for one in found] == [
        (one.path, ("a photo of a dog",), 0.5) for one in subjects
    ]
    assert all(one.taught and one.mask is None for one in found)
    derived = beside(family, source, replace(DOG, prior_from="base", class_prompt=(), class_word="dog"), subjects)
    assert derived[0].captions == ("a photo of dog on a sofa", "a photo of dog")
    assert derived[1].captions == ("a photo of dog",)


def test_concepts_have_class_prompts_of_their_own(family: Family, source: Source, subjects: list[Example]) -> None:
    data = Data(concepts=(Concept("dogs", class_prompt=("a photo of a dog",), weight=2), Concept("cats")))
    both = [subjects[0], replace(subjects[1], concept=1)]
    found = beside(family, source, replace(DOG, class_prompt=("a photo of a cat",)), both, data)
    assert [(one.concept, one.captions[0], one.weight) for one in found] == [
        *[(0, "a photo of a dog", 1.0)] * 3,
        *[(1, "a photo of a cat", 0.5)] * 3,
    ]


def test_with_the_adapter_off_the_base_predicts(family: Family, source: Source, subjects: list[Example]) -> None:
    """What is taught has no loss before the training, and one as soon as the adapter says something else."""
    adapters.adapt(family, Adapter(rank=4), 1e-2, 1e-2, 0)
    taught = beside(family, source, replace(DOG, prior_from="base"), subjects)
    data = measured.encoded(family, taught)
    assert data.texts is None
    assert measured.loss(family, data) == pytest.approx(0, abs=1e-12)
    before = {name: p.requires_grad for name, p in family.pipeline.unet.named_parameters()}
    for name, parameter in family.pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.1)
    assert measured.loss(family, data) > 1e-4
    assert {name: p.requires_grad for name, p in family.pipeline.unet.named_parameters()} == before


def test_lessons_are_what_the_base_predicted(family: Family, source: Source, subjects: list[Example]) -> None:
    """A full fine-tune asks beforehand, at fixed draws: no loss before the training, whatever the step."""
    adapters.full(family, 1e-3, None)
    taught = priors.lessons(beside(family, source, replace(DOG, prior_from="base"), subjects), 5)
    assert [(one.lesson, one.path) for one in taught] == [(n, subjects[n % 2].path) for n in range(5)]
    asked = loop.ask(family, measured.encoded(family, subjects, taught), Loss(), 99, Accelerator(cpu=True))
    assert sorted(asked.lessons) == [0, 1, 2, 3, 4]
    data = replace(asked, subjects=asked.companions, companions=())
    assert measured.loss(family, data, count=5) == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        next(family.pipeline.unet.conv_out.parameters()).add_(0.1)
    assert measured.loss(family, data, count=5) > 1e-4


def test_what_needs_the_base_is_refused_where_all_weights_train() -> None:
    loop.require_no_base(Loss())
    with pytest.raises(Fault, match="--unmasked-prior"):
        loop.require_no_base(Loss(unmasked_prior=1.0))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Prior(), "needs --class-prompt"),
        (replace(DOG, class_images=0), "--class-images 0"),
        (replace(DOG, class_steps=0), "--class-steps 0"),
        (replace(DOG, prior_weight=-1.0), "--prior-weight -1"),
        (replace(DOG, class_data=Path("no-such-folder")), "no-such-folder"),
        (replace(DOG, class_prompt=(), class_word="animal"), 'the caption "a photo of a dog" does not hold'),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(settings: Prior, expected: str) -> None:
    subject = Example(Path("x.png"), ("a photo of a dog",))
    with pytest.raises(Fault, match=expected):
        priors.check(settings, DATA, [subject])
    priors.check(Prior(prior=False), DATA, [subject])
    priors.check(DOG, DATA, [subject])


def test_a_word_without_a_trigger_is_refused() -> None:
    with pytest.raises(Fault, match="--trigger"):
        priors.check(Prior(class_word="dog"), Data(data="x"), [Example(Path("x.png"), ("a photo of sks",))])
