"""One concept or several, what is held out of them, and their faults, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from PIL import Image

from finetune import data
from finetune.data import Example, Facts
from finetune.data.reading import concepts
from finetune.errors import Fault
from finetune.settings import Captions, Concept, Data


def folder(path: Path, *names: str, size: int = 8) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (size, size), (20 * number, 40, 90)).save(path / name, "PNG")
    return path


def test_two_concepts_with_their_own_settings(tmp_path: Path) -> None:
    dogs, vases = folder(tmp_path / "dogs", "a.png", "b.png"), folder(tmp_path / "vases", "a.png")
    masks = folder(tmp_path / "masks")
    Image.new("L", (8, 8), 255).save(masks / "a.png")
    (dogs / "a.txt").write_text("on grass")
    settings = Data(
        trigger="sks", prompt="a photo", template="{trigger}: {caption}", validation=0.5, masks=None,
        concepts=(
            Concept(str(dogs), repeats=2, weight=0.5, class_prompt=("a dog",)),
            Concept(str(vases), trigger="vzs", template="a {trigger} vase, {caption}", masks=masks, validation=0.0),
        ),
    )  # fmt: skip
    train, validation = data.read(settings)
    assert {(one.concept, one.name): one.captions for one in [*train, *validation]} == {
        (0, "a.png"): ("sks: on grass",),
        (0, "b.png"): ("sks: a photo",),
        (1, "a.png"): ("a vzs vase, a photo",),
    }
    assert [(one.concept, one.repeats, one.weight) for one in train] == [(0, 2, 0.5), (1, 1, 1.0)]
    assert train[1].mask == masks / "a.png" and train[0].mask is None
    assert [one.concept for one in validation] == [0]
    first, second = concepts.parts(settings)
    assert (first.class_prompt, first.data.trigger, second.data.trigger) == (("a dog",), "sks", "vzs")


def test_the_faults_of_all_concepts_come_at_once(tmp_path: Path) -> None:
    dogs, vases = folder(tmp_path / "dogs", "a.png"), folder(tmp_path / "vases", "a.png")
    (dogs / "b.jpg").write_bytes(b"")
    (vases / "a.txt").write_bytes(b"caf\xe9")
    settings = Data(
        prompt="x",
        concepts=(
            Concept(str(dogs), repeats=0, weight=-1),
            Concept(str(vases), validation=1.0, template="{trigger}"),
            Concept(str(tmp_path / "none")),
        ),
    )
    with pytest.raises(Fault) as caught:
        data.read(settings)
    assert caught.value.message.startswith("the 3 concepts: 7 problems; nothing there was changed. Repair or replace")
    said = [line.partition("): ")[0] + ") " + line.partition("): ")[2][:34] for line in caught.value.details]
    assert said == [
        f"concept 1 ({dogs}) repeats = 0: a whole number, 1 or ",
        f"concept 1 ({dogs}) weight = -1: a number, 0 or more",
        f"concept 1 ({dogs}) b.jpg: the file is empty (0 bytes)",
        f"concept 2 ({vases}) validation = 1: a share, 0 or more",
        f'concept 2 ({vases}) --template "{{trigger}}" has a place',
        f"concept 2 ({vases}) a.txt: not UTF-8 (byte 0xe9 at off",
        f"concept 3 ({tmp_path / 'none'}) {str(tmp_path / 'none')[:34]}",
    ]


def test_settings_say_what_to_learn_once(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"give --data FOLDER .* or \[\[concepts\]\]"):
        data.read(Data())
    with pytest.raises(Fault, match=r"--data and \[\[concepts\]\] are both given"):
        data.read(Data("dogs", concepts=(Concept("cats"),)))


def test_settings_of_captions_are_looked_at_with_the_pictures(tmp_path: Path) -> None:
    folder(tmp_path / "dogs", "a.png")
    (tmp_path / "dogs" / "b.jpg").write_bytes(b"")
    with pytest.raises(Fault) as caught:
        data.read(Data(str(tmp_path / "dogs"), prompt="x"), Captions(tag_dropout=2, caption_variants=0))
    assert [line.partition(" ")[0] for line in caught.value.details] == [
        "--tag-dropout",
        "--caption-variants",
        "b.jpg:",
    ]


def example(digest: str, concept: int = 0, name: str = "a") -> Example:
    return Example(Path(name), ("x",), name, concept=concept, facts=Facts(8, 8, False, False, digest=digest))


@hypothesis(deadline=None)
@given(digests=st.lists(st.integers(0, 30), min_size=2), share=st.floats(0.01, 0.99), seed=st.integers())
def test_what_is_held_out_follows_from_what_pictures_show(digests: list[int], share: float, seed: int) -> None:
    examples = [example(str(digest), name=str(number)) for number, digest in enumerate(digests)]
    settings, distinct = Data("x", validation=share), len(set(digests))
    if distinct < 2:
        with pytest.raises(Fault, match="of one picture nothing can be held out"):
            data.held_out(examples, settings, seed)
        return
    train, validation = data.held_out(examples, settings, seed)
    assert train and validation and sorted([*train, *validation], key=lambda one: int(one.name)) == examples
    out = {one.facts.digest for one in validation if one.facts}
    assert not out & {one.facts.digest for one in train if one.facts}, "copies stay together"
    assert len(out) == min(max(1, round(share * distinct)), distinct - 1)
    renamed = [example(str(digest), name=f"other {number}") for number, digest in enumerate(digests)]
    again = data.held_out(renamed, settings, seed)[1]
    assert {one.facts.digest for one in again if one.facts} == out
    more = [*examples, example("new")]
    changed = {one.facts.digest for one in data.held_out(more, settings, seed)[1] if one.facts}
    assert len(out - changed) <= 1


def test_nothing_is_held_out_unless_it_is_asked_for() -> None:
    examples = [example("a"), example("b")]
    assert data.held_out(examples, Data("x"), 0) == (examples, [])


def test_each_concept_holds_out_its_own_share() -> None:
    examples = [example(f"{number}", concept) for concept in range(2) for number in range(10)]
    settings = Data(validation=0.2, concepts=(Concept("a"), Concept("b", validation=0.5)))
    _, validation = data.held_out(examples, settings, 0)
    assert [sum(one.concept == number for one in validation) for number in range(2)] == [2, 5]


@pytest.mark.parametrize("given", [{"background": "blakc"}, {"trigger": " "}, {"template": "{x}"}])
def test_survey_never_stops_at_the_first_thing(tmp_path: Path, given: dict[str, Any]) -> None:
    folder(tmp_path / "dogs", "a.png")
    (tmp_path / "dogs" / "b.jpg").write_bytes(b"")
    _, problems = data.survey(Data(str(tmp_path / "dogs"), prompt="x", **given))
    assert {one.code for one in problems} == {"setting", "picture"}
