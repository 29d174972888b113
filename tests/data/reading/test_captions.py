"""Trigger, template, shuffled and dropped tags; and what of a caption no text encoder sees (row 20)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from finetune import toybox
from finetune.data.reading import captions
from finetune.errors import Fault
from finetune.settings import Captions

TAG = st.text(st.characters(codec="utf-8", exclude_characters=",", exclude_categories=["C", "Z"]), min_size=1)
TAGS = st.lists(TAG, min_size=1, max_size=6, unique=True)


@pytest.mark.parametrize(
    ("own", "prompt", "trigger", "template", "made"),
    [
        ("a dog", None, None, None, "a dog"),
        (None, "a photo", None, None, "a photo"),
        (" ", "a photo", None, None, "a photo"),
        (None, None, None, None, ""),
        ("a dog", "a photo", "sks", None, "sks, a dog"),
        (None, None, "0:", None, "0:"),
        ("a SKS dog", None, "sks", None, "a SKS dog"),
        ("a sksy dog", None, "sks", None, "sks, a sksy dog"),
        (None, "a photo of sks dog", "sks", None, "a photo of sks dog"),
        (None, None, "sks", None, "sks"),
        ("a dog", None, "sks", "a photo of {trigger}: {caption}", "a photo of sks: a dog"),
        (None, None, "sks", "a photo of {trigger}: {caption}", "a photo of sks"),
        ("sks, a dog", None, "sks", "{trigger}, {caption}", "sks, a dog"),
        ("a dog", None, None, "oil painting, {caption}", "oil painting, a dog"),
        (None, None, "sks", "a photo of {trigger} dog", "a photo of sks dog"),
        ("a {dog}", None, "s+s", "{{{trigger}}} {caption}", "{s+s} a {dog}"),
    ],
)
def test_how_a_caption_is_made(
    own: str | None, prompt: str | None, trigger: str | None, template: str | None, made: str
) -> None:
    assert captions.made(own, prompt, trigger, template) == made


@pytest.mark.parametrize("template", ["{0}", "{}", "{caption!r}", "{caption:9}", "{caption.x}", "{trigger", "}"])
def test_a_template_knows_two_words(template: str) -> None:
    assert "{trigger} and {caption}" in (captions.check("sks", template) or "")
    with pytest.raises(Fault):
        captions.made("a dog", None, "sks", template)


@hypothesis(deadline=None)
@given(own=st.text(), trigger=TAG)
def test_a_caption_with_a_trigger_holds_it_once(own: str, trigger: str) -> None:
    made = captions.made(own, None, trigger, None)
    assert captions.holds(made, trigger) or not trigger[0].isalnum()
    assert captions.made(made, None, trigger, None) == made or not captions.holds(made, trigger)


def test_without_variation_captions_stay_as_they_are() -> None:
    assert captions.variants(["b, a", "c", "b, a"], Captions(), 0, "x") == ("b, a", "c")


@hypothesis(deadline=None)
@given(tags=TAGS, keep=st.integers(0, 4), dropout=st.floats(0, 1), seed=st.integers(), shuffle=st.booleans())
def test_variants_keep_the_first_tags_and_invent_none(
    tags: list[str], keep: int, dropout: float, seed: int, shuffle: bool
) -> None:
    settings = Captions(shuffle_tags=shuffle, tag_dropout=dropout, keep_tags=keep)
    text = ", ".join(tags)
    made = captions.variants([text], settings, seed, "digest")
    assert made == captions.variants([text], settings, seed, "digest")
    for one in made:
        found = captions.tags(one)
        assert found and set(found) <= set(tags) and found[:keep] == tags[: min(keep, len(found))]
        assert len(set(found)) == len(found) and len(found) >= min(keep, len(tags))
        if not dropout:
            assert sorted(found) == sorted(tags)
        if not shuffle:
            assert found == [tag for tag in tags if tag in found]


def test_variants_follow_from_the_picture_and_the_text() -> None:
    settings, text = Captions(shuffle_tags=True), "a, b, c, d, e, f"
    made = captions.variants([text], settings, 0, "one")
    assert len(set(made)) > 4
    assert made != captions.variants([text], settings, 0, "two")
    assert made != captions.variants([text], settings, 1, "one")
    assert captions.variants(["x", text], settings, 0, "one").count("x") == settings.caption_variants


def test_each_variant_has_the_share_that_dropout_gives_it() -> None:
    settings = Captions(tag_dropout=0.25, caption_variants=4000)
    counts = Counter(captions.variants(["a, b, c"], settings, 0, "x"))
    total = sum(counts.values())
    shares = {text: count / total for text, count in counts.items()}
    assert shares == pytest.approx({"a, b, c": 0.5625, "a, b": 0.1875, "a, c": 0.1875, "a": 0.0625}, abs=0.02)


def test_shares_are_told_in_as_few_texts_as_they_take() -> None:
    assert captions.variants(["a, b"], Captions(shuffle_tags=True), 0, "x") == ("a, b",)
    assert captions.variants(["a", "b"], Captions(shuffle_tags=True), 0, "x") == ("a", "b")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Captions(tag_dropout=1.5), "--tag-dropout 1.5: a share, from 0 to 1"),
        (Captions(caption_dropout=-0.1), "--caption-dropout -0.1"),
        (Captions(tag_dropout=float("nan")), "--tag-dropout nan"),
        (Captions(keep_tags=-1), "--keep-tags -1"),
        (Captions(caption_variants=0), "--caption-variants 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Captions, said: str) -> None:
    with pytest.raises(Fault, match=said):
        captions.variants(["a"], settings, 0, "x")


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(Path(toybox.__file__).parent / "weights" / "tokenizer")


def test_row_20_what_is_cut_off_is_what_the_encoder_does_not_see(tokenizer: CLIPTokenizer) -> None:
    assert captions.cut_off([tokenizer], "a red ball") is None
    text = "a " * 100
    assert len(tokenizer("a").input_ids) == 3
    assert captions.cut_off([tokenizer], text) == ("a " * 25).strip()
    text = "A red ball on Green grass, " * 12
    cut = captions.cut_off([tokenizer], text)
    assert cut and text.strip().endswith(cut)
    assert captions.cut_off([], text) is None


@hypothesis(deadline=None, max_examples=50)
@given(text=st.text(max_size=200))
def test_row_20_any_text_is_cut_where_the_tokens_end(tokenizer: CLIPTokenizer, text: str) -> None:
    cut = captions.cut_off([tokenizer], text)
    assert (cut is not None) == (len(tokenizer(text).input_ids) > 77) or not (cut or "").strip()
    assert cut is None or cut in text
