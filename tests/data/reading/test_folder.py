"""Faults rows 1-3, 6, 14, 15, 18 and 19: a folder becomes examples, or everything that is wrong with it is listed."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune import data
from finetune.data import Example
from finetune.data.reading import sources
from finetune.data.reading.pictures import SUFFIXES
from finetune.errors import Fault
from finetune.settings import Captions, Data

PROMPT = "a photo of sks dog"


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (8, 6), colour)
    image.save(path, "PNG")  # the ending need not tell the truth
    return path


def text(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder: Path, prompt: str | None = PROMPT, **settings: object) -> list[Example]:
    return data.read(Data(str(folder), prompt=prompt, **settings))[0]  # type: ignore[arg-type]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fault(folder: Path, prompt: str | None = PROMPT, **settings: object) -> Fault:
    """What is refused; and nothing in the folder was changed."""
    before = contents(folder)
    with pytest.raises(Fault) as caught:
        read(folder, prompt, **settings)
    assert contents(folder) == before
    return caught.value


def pairs(examples: list[Example]) -> dict[str, str]:
    return {example.name: example.captions[0] for example in examples}


# --- which files are pictures --------------------------------------------------------------------------------------


def test_pictures_come_by_name_with_the_prompt(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "c.webp"):
        picture(tmp_path / name)
    assert pairs(read(tmp_path)) == {"a.jpg": PROMPT, "b.png": PROMPT, "c.webp": PROMPT}
    assert [one.path.name for one in read(tmp_path)] == ["a.jpg", "b.png", "c.webp"]
    assert all(one.weight == one.repeats == 1 and not one.own_caption for one in read(tmp_path))
    assert all(one.path == tmp_path / one.name and one.facts and one.facts.digest for one in read(tmp_path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_endings_count_in_upper_and_lower_case(tmp_path: Path, suffix: str) -> None:
    for name in (f"a{suffix}", f"b{suffix.upper()}", f"c{suffix.capitalize()}"):
        picture(tmp_path / name)
    assert len(read(tmp_path)) == 3


def test_what_systems_and_programs_leave_in_a_folder_is_no_picture(tmp_path: Path) -> None:
    picture(tmp_path / "IMG_1.JPG")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._IMG_1.JPG", ".hidden.jpg", "IMG_1.xmp", "IMG_1.AAE",
                 "IMG_1.json", "notes.md", "README.txt"):  # fmt: skip
        text(tmp_path / name, b"\0\1binary")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "folder.jpg").mkdir()
    assert pairs(read(tmp_path)) == {"IMG_1.JPG": PROMPT}


def test_a_folder_that_is_not_there_is_said_and_not_made(tmp_path: Path) -> None:
    (tmp_path / "my_dog").mkdir()
    with pytest.raises(Fault, match="there is no such folder; nothing was created") as caught:
        read(tmp_path / "my_dgo")
    assert f"Did you mean {tmp_path / 'my_dog'}?" in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["my_dog"]


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.jpg")
    with pytest.raises(Fault, match="a file, not a folder"):
        read(path)


def test_no_pictures_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for name in ("dog/a.jpg", "dog/b.PNG", "cat/c.jpg"):
        picture(folder / name)
    for name in ("a.mp4", "b.MP4", "notes.txt", "README"):
        text(folder / name, "x")
    message = fault(folder).message
    assert "no pictures to train on. Looked for .jpg, .jpeg," in message
    assert "Seen there: 2 .mp4, 1 .txt, 1 no ending, 2 sub-folders." in message
    assert f"{folder / 'cat'} (1), {folder / 'dog'} (2)" in message


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "Seen there: nothing." in fault(tmp_path).message


# --- all faults at once --------------------------------------------------------------------------------------------


def test_every_bad_file_is_listed_at_once_and_none_is_changed(tmp_path: Path) -> None:
    picture(tmp_path / "good.jpg")
    text(tmp_path / "empty.jpg", b"")
    text(tmp_path / "text.jpg", "not a picture")
    whole = picture(tmp_path / "cut.png").read_bytes()
    text(tmp_path / "cut.png", whole[:-30])
    picture(tmp_path / "named.jpg")
    text(tmp_path / "named.txt", "caf\xe9".encode("latin-1"))
    found = fault(tmp_path, skip=("goood.jpg",))
    assert found.message.startswith(
        f"{tmp_path}: 5 problems; nothing there was changed. Repair or replace the pictures"
    )
    assert found.message.endswith("--skip cut.png empty.jpg text.jpg")
    assert [line.split(":")[0] for line in found.details] == [
        "cut.png", "empty.jpg", "text.jpg", "named.txt", "--skip goood.jpg",
    ]  # fmt: skip
    assert found.details[-1].endswith("no such file there; nearest: good.jpg")
    assert all(line in str(found) for line in found.details)


def test_only_what_is_named_is_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "good.jpg")
    text(tmp_path / "bad one.jpg", b"")
    assert "--skip 'bad one.jpg'" in fault(tmp_path).message
    assert pairs(read(tmp_path, skip=("bad one.jpg",))) == {"good.jpg": PROMPT}
    assert "2 pictures, all named in --skip" in fault(tmp_path, skip=("bad one.jpg", "good.jpg")).message


def test_a_wrong_background_is_said_with_all_the_rest(tmp_path: Path) -> None:
    text(tmp_path / "bad.jpg", b"")
    found = fault(tmp_path, background="wite")
    assert "background 'wite' is not a colour" in found.details[0] and "bad.jpg: the file is empty" in found.details[1]


# --- captions ------------------------------------------------------------------------------------------------------


def test_captions_lie_beside_the_pictures(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "IMG_3.JPG"):
        picture(tmp_path / name)
    text(tmp_path / "a.txt", "  a dog\non grass \n")
    text(tmp_path / "IMG_3.TXT", "a dog on sand")
    examples = read(tmp_path)
    assert pairs(examples) == {"IMG_3.JPG": "a dog on sand", "a.jpg": "a dog on grass", "b.jpg": PROMPT}
    assert [one.own_caption for one in examples] == [True, True, False]


def test_a_byte_order_mark_is_no_part_of_the_caption(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    text(tmp_path / "a.txt", b"\xef\xbb\xbfa dog")
    assert pairs(read(tmp_path)) == {"a.jpg": "a dog"}


def test_a_caption_that_is_not_utf8_is_named_with_its_place_and_the_fix(tmp_path: Path) -> None:
    picture(tmp_path / "my cafe.jpg")
    text(tmp_path / "my cafe.txt", "un caf\xe9 noir".encode("latin-1"))
    assert fault(tmp_path).details == [
        "my cafe.txt: not UTF-8 (byte 0xe9 at offset 6). Save it as UTF-8, "
        "e.g. `iconv -f WINDOWS-1252 -t UTF-8 'my cafe.txt' > fixed.txt`"
    ]
    text(tmp_path / "my cafe.txt", "a dog".encode("utf-16"))
    assert "not UTF-8 (UTF-16). Save it as UTF-8, e.g. `iconv -f UTF-16" in fault(tmp_path).details[0]
    text(tmp_path / "my cafe.txt", b"a dog\0")
    assert "a zero byte at offset 5" in fault(tmp_path).details[0]


@pytest.mark.parametrize("prompt", [None, "", "  "])
def test_pictures_without_any_caption_are_listed(tmp_path: Path, prompt: str | None) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(tmp_path / name)
    text(tmp_path / "a.txt", "a dog")
    text(tmp_path / "c.txt", " \n")
    found = fault(tmp_path, prompt)
    assert found.details == ["b.jpg: no caption; b.txt would hold it", "c.jpg: its caption file is empty"]
    assert "--prompt" in found.message


def test_strict_takes_pictures_with_their_own_caption_only(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(tmp_path / name)
    text(tmp_path / "a.txt", "a dog")
    text(tmp_path / "c.txt", "")
    assert [line.split(":")[0] for line in fault(tmp_path, strict=True).details] == ["b.jpg", "c.jpg"]
    assert pairs(read(tmp_path)) == {"a.jpg": "a dog", "b.jpg": PROMPT, "c.jpg": PROMPT}
    text(tmp_path / "b.txt", "two dogs")
    text(tmp_path / "c.txt", "three dogs")
    assert len(read(tmp_path, strict=True)) == 3


def test_two_pictures_that_share_a_caption_file_are_both_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "a.png")
    assert len(read(tmp_path)) == 2  # without a caption file nothing is shared
    text(tmp_path / "a.txt", "a dog")
    assert fault(tmp_path).details == [
        "a.txt: whose caption is it? It could be that of a.jpg and a.png. Use a.jpg.txt and a.png.txt instead"
    ]
    (tmp_path / "a.txt").rename(tmp_path / "a.jpg.txt")
    text(tmp_path / "a.png.txt", "a drawn dog")
    assert pairs(read(tmp_path)) == {"a.jpg": "a dog", "a.png": "a drawn dog"}


def test_dots_in_names_share_nothing_silently(tmp_path: Path) -> None:
    picture(tmp_path / "a.b.jpg")
    picture(tmp_path / "a.c.jpg")
    text(tmp_path / "a.txt", "a dog")
    assert "that of a.b.jpg and a.c.jpg" in fault(tmp_path).details[0]
    (tmp_path / "a.txt").rename(tmp_path / "a.b.txt")
    assert pairs(read(tmp_path)) == {"a.b.jpg": "a dog", "a.c.jpg": PROMPT}


def test_a_picture_left_out_takes_its_caption_with_it(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    text(tmp_path / "a.png", b"")
    text(tmp_path / "a.txt", "a dog")
    assert pairs(read(tmp_path, skip=("a.png",))) == {"a.jpg": "a dog"}
    assert pairs(read(tmp_path, skip=("a.png", "a.txt"))) == {"a.jpg": PROMPT}


def test_two_caption_files_of_one_picture(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    text(tmp_path / "a.txt", "a dog")
    text(tmp_path / "a.TXT", "a cat")
    assert "whose caption is it? It could be that of a.jpg" in fault(tmp_path).details[0]


def test_accents_written_in_two_ways_and_other_case_meet(tmp_path: Path) -> None:
    picture(tmp_path / unicodedata.normalize("NFD", "café.jpg"))
    text(tmp_path / unicodedata.normalize("NFC", "café.txt"), "a café")
    picture(tmp_path / "DOG.JPG")
    text(tmp_path / "dog.txt", "a dog")
    assert sorted(pairs(read(tmp_path)).values()) == ["a café", "a dog"]


def test_the_same_spelling_is_preferred_to_the_same_letters(tmp_path: Path) -> None:
    for name in ("a", "A"):
        picture(tmp_path / f"{name}.jpg")
        text(tmp_path / f"{name}.txt", f"caption of {name}")
    if len(list(tmp_path.iterdir())) < 4:
        pytest.skip("this file system does not tell cases apart")
    assert pairs(read(tmp_path)) == {"A.jpg": "caption of A", "a.jpg": "caption of a"}


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda name: not name.startswith(".") and len(os.fsencode(name)) < 200
)
CAPTIONS = st.text(st.characters(exclude_characters="\0", codec="utf-8")).filter(str.strip)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(NAMES, min_size=1, max_size=4), captions=st.lists(CAPTIONS, min_size=4, max_size=4))
def test_any_names_and_captions_are_read_back(
    names: set[str], captions: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folded = [unicodedata.normalize("NFC", name).casefold() for name in names]
    assume(len(set(folded)) == len(names))
    assume(not any(a != b and (a + ".").startswith(b + ".") for a in folded for b in folded))
    folder = tmp_path_factory.mktemp("names")
    wanted = {}
    for name, caption in zip(sorted(names), captions, strict=False):
        picture(folder / f"{name}.png")
        text(folder / f"{name}.txt", caption)
        wanted[f"{name}.png"] = " ".join(caption.removeprefix("\ufeff").split())
    assume(all(wanted.values()))
    assert pairs(read(folder, prompt=None)) == wanted


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60))
def test_any_bytes_are_a_caption_or_a_fault(raw: bytes, tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    text(tmp_path / "a.txt", raw)
    try:
        caption = read(tmp_path)[0].captions[0]
    except Fault as found:
        assert len(found.details) == 1 and found.details[0].startswith("a.txt: ")
    else:
        assert caption == (" ".join(raw.decode("utf-8-sig").split()) or PROMPT)


def test_names_that_are_not_utf8_are_read_and_can_be_said(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    good = picture(tmp_path / "a.png")
    os.rename(good, folder + b"/caf\xe9.png")
    assert len(read(tmp_path)) == 1
    with open(folder + b"/l\xf6st.jpg", "wb"):
        pass
    message = str(fault(tmp_path))
    assert "l\\xf6st.jpg: the file is empty" in message
    message.encode("utf-8")


def test_each_line_may_be_a_caption_of_its_own(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    text(tmp_path / "a.txt", "a dog\n\n  on  grass\r\na dog\n")
    assert read(tmp_path)[0].captions == ("a dog on grass a dog",)
    several = data.read(Data(str(tmp_path), trigger="sks"), Captions(several_captions=True))[0]
    assert several[0].captions == ("sks, a dog", "sks, on grass")


def test_the_trigger_alone_is_caption_enough(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name)
    text(tmp_path / "a.txt", "a dog")
    assert pairs(read(tmp_path, None, trigger="sks")) == {"a.jpg": "sks, a dog", "b.jpg": "sks"}
    template = "a photo of {trigger}, {caption}"
    made = read(tmp_path, None, trigger="sks", template=template)
    assert pairs(made) == {"a.jpg": "a photo of sks, a dog", "b.jpg": "a photo of sks"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"template": "{trigger}, {captoin}", "trigger": "sks"}, "{captoin} is not known. It knows {trigger} and"),
        ({"template": "{trigger", "trigger": "sks"}, "a brace without its other half"),
        ({"template": "{trigger}, {caption}"}, "has a place for the trigger: name it"),
        ({"template": "a {caption}", "trigger": "sks"}, "leaves out the trigger sks"),
        ({"template": "a photo of {trigger}", "trigger": "sks"}, "leaves out the captions of a.jpg: put {caption}"),
        ({"trigger": " "}, "--trigger is empty"),
    ],
)
def test_a_template_that_loses_something_is_said(tmp_path: Path, given: dict[str, str], said: str) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg")
    text(tmp_path / "a.txt", "a dog")
    assert said in str(fault(tmp_path, None, **given))


def test_a_trigger_that_tags_could_be_dropped_with_is_said(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    text(tmp_path / "a.txt", "a dog, grass, sks")
    settings = Data(str(tmp_path), trigger="sks")
    with pytest.raises(Fault, match=r"sks may be dropped with other tags from a\.jpg.*--keep-tags 3"):
        data.read(settings, Captions(tag_dropout=0.1))
    assert data.read(settings, Captions(tag_dropout=0.1, keep_tags=3))[0]
    assert data.read(settings, Captions(shuffle_tags=True))[0]


def test_what_can_be_read_is_told_beside_what_cannot(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    text(tmp_path / "b.jpg", b"")
    text(tmp_path / "a.txt", "caf\xe9".encode("latin-1"))
    picture(tmp_path / "c.jpg")
    examples, problems = sources.survey(Data(str(tmp_path), prompt=PROMPT, skip=("d.jpg",)))
    assert [one.name for one in examples] == ["a.jpg", "c.jpg"]
    assert [(one.code, one.files) for one in problems] == [
        ("picture", ("b.jpg",)), ("caption file", ("a.txt", "a.jpg")), ("skip", ("d.jpg",)),
    ]  # fmt: skip


# --- class pictures ------------------------------------------------------------------------------------------------


def test_class_pictures_take_one_caption_and_weight(tmp_path: Path) -> None:
    picture(tmp_path / "0001.png")
    picture(tmp_path / "0002.png")
    text(tmp_path / "pictures.json", "{}")
    text(tmp_path / "0001.txt", "not used for class pictures")
    examples = data.read_plain(tmp_path, "a photo of a dog", 0.5)
    assert [(one.captions, one.weight) for one in examples] == [(("a photo of a dog",), 0.5)] * 2
    assert [one.name for one in data.read_files([tmp_path / "0002.png"], "a dog")] == ["0002.png"]
    text(tmp_path / "0003.png", b"")
    with pytest.raises(Fault, match=r"0003\.png: the file is empty"):
        data.read_plain(tmp_path, "a photo of a dog", 0.5)
    with pytest.raises(Fault, match="no such folder"):
        data.read_plain(tmp_path / "none", "a photo of a dog", 0.5)
