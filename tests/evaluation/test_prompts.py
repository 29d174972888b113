"""What is asked of a run, from its settings and captions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from finetune.data import Example
from finetune.errors import Fault
from finetune.evaluation import prompts
from finetune.evaluation.prompts import Asked, Subject, subjects
from finetune.settings import Concept, Data, Prior


def examples(*captions: str, concept: int = 0) -> list[Example]:
    return [Example(Path(f"{number}.png"), (caption,), concept=concept) for number, caption in enumerate(captions)]


NOTHING = Asked()


def one(data: Data, prior: Prior, found: list[Example], asked: Asked = NOTHING, protocol: str = "short",
        model: str = "hub/model") -> Subject:  # fmt: skip
    [subject] = subjects(data, prior, found, asked, protocol, model)
    return subject


def test_the_protocol_has_25_prompts_of_each_kind() -> None:
    assert len(set(prompts.OBJECTS)) == len(set(prompts.LIVE)) == 25
    assert all(text.count("{}") == 1 for text in (*prompts.OBJECTS, *prompts.LIVE))


@pytest.mark.parametrize(
    ("noun", "texts"), [("backpack", prompts.OBJECTS), ("dog", prompts.LIVE), ("corgi dog", prompts.LIVE)]
)
def test_live_subjects_wear_hats(noun: str, texts: tuple[str, ...]) -> None:
    prior = Prior(class_prompt=(f"a photo of a {noun}",))
    found = one(Data("photos", prompt=f"a photo of sks {noun}"), prior, [], protocol="dreambooth")
    assert found.name == f"sks {noun}" and found.class_prompt == f"a photo of a {noun}"
    assert found.prompts == tuple(text.format(f"sks {noun}") for text in texts)
    assert found.plain == tuple(text.format(noun) for text in texts)


def test_words_from_captions() -> None:
    told = examples("a photo of sks toy in a room", "a photo of sks toy in a meadow", "a photo of sks toy on the beach")
    found = one(Data("photos"), Prior(class_prompt=("a photo of a toy",)), told, model="toybox")
    assert found.name == "sks toy"
    assert found.prompts[0] == "a photo of sks toy in the snow" and found.plain[0] == "a photo of a toy in the snow"


def test_words_from_the_trigger() -> None:
    found = one(Data("photos", trigger="sks"), Prior(class_word="dog"), examples("sks dog, sitting"))
    assert (found.name, found.class_prompt) == ("sks dog", "a photo of a dog")


def test_without_a_class_it_is_what_follows_the_rare_word() -> None:
    found = one(Data("photos", prompt="a photo of sks toy"), Prior(prior=False), [], model="toybox")
    assert (found.name, found.class_prompt) == ("sks toy", "a photo of a toy")
    assert found.plain[0] == "a photo of a toy in the snow"


def test_what_the_user_says_wins() -> None:
    asked = Asked(("sks dog on a sofa", "a painting of a sks dog"), "sks dog", "dog")
    found = one(Data("photos", prompt="a photo of xyz cat"), Prior(), [], asked)
    assert found.prompts == asked.prompt and found.plain == ("a dog on a sofa", "a painting of a dog")


def test_a_style_has_no_class() -> None:
    found = one(Data("p", trigger="in neon style"), Prior(prior=False), [], Asked(("a cat in neon style",)))
    assert (found.class_prompt, found.plain) == (None, ("a cat",))


@pytest.mark.parametrize(
    ("captions", "asked", "prompt", "name"),
    [
        (["a neon sign of a red car", "a neon sign of an owl"], NOTHING, "a neon sign of a cat", "a neon sign of"),
        (["neonart, a red car", "neonart, a house"], NOTHING, "neonart, a cat", "neonart"),
        (["a car in neon style", "two owls in neon style"], NOTHING, "a cat in neon style", "in neon style"),
        (
            ["a sign of a car in neon", "a sign of owls in neon"],
            NOTHING,
            "a sign of a cat in neon",
            "a sign of in neon",
        ),
        (["a car", "two owls"], Asked(subject="{} as neonart"), "a cat as neonart", "as neonart"),
        (["a car", "two owls"], Asked(subject="neonart"), "neonart a cat", "neonart"),
    ],
)
def test_a_style_is_asked_of_things(captions: list[str], asked: Asked, prompt: str, name: str) -> None:
    found = one(Data("p"), Prior(prior=False), examples(*captions), asked, "style")
    assert (found.name, found.prompts[0], found.plain, found.class_prompt) == (name, prompt, prompts.STYLED, None)
    assert found.style and len(found.prompts) == len(prompts.STYLED)
    own = replace(asked, prompt=(prompt.replace("a cat", "a hut"),))
    assert one(Data("p"), Prior(prior=False), examples(*captions), own, "style").plain == ("a hut",)


@pytest.mark.parametrize("captions", [["a car", "two owls"], ["neonart"], ["neonart, a car", "neonart,"]])
def test_a_style_whose_words_are_not_told_needs_them(captions: list[str]) -> None:
    with pytest.raises(Fault, match=r"--subject \"neonart, \{\}\""):
        one(Data("p"), Prior(prior=False), examples(*captions), protocol="style")


def test_captions_without_a_common_beginning_need_the_words() -> None:
    with pytest.raises(Fault, match=r'--subject "sks dog" --class-name dog'):
        one(Data("photos"), Prior(), examples("a dog", "some cat"))


def test_concepts_each_have_their_own() -> None:
    data = Data(concepts=(
        Concept("a", prompt="a photo of sks dog", class_prompt=("a photo of a dog",)),
        Concept("b", prompt="a photo of xyz cat", class_prompt=("a photo of a cat",)),
    ))  # fmt: skip
    found = subjects(data, Prior(), [], Asked(), "short", "hub/model")
    assert [(subject.name, subject.class_prompt) for subject in found] == [
        ("sks dog", "a photo of a dog"), ("xyz cat", "a photo of a cat"),
    ]  # fmt: skip
