"""The doctor's judgement, below the command line: what training asks, what is recommended, nothing that breaks it."""

from __future__ import annotations

from pathlib import Path

import planted
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data.checking import doctor, findings
from finetune.data.examples import Example
from finetune.data.reading.found import Problem
from finetune.errors import Fault
from finetune.settings import Captions, Concept, Data, Framing, Model

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
ENDINGS = st.sampled_from([".png", ".JPG", ".txt", ".webp", ".gif", ".heic", "", ".jsonl"])
CONTENT = st.one_of(st.binary(max_size=64), st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace")))


def test_training_is_told_every_error_in_one_fault(tmp_path: Path) -> None:
    planted.good(tmp_path)
    planted.no_text(tmp_path)
    planted.small(tmp_path)
    with pytest.raises(Fault) as caught:
        doctor.require(Data(str(tmp_path), prompt="a thing"))
    assert [line.partition(":")[0] for line in caught.value.details] == ["empty.jpg", "words.jpg", "tiny.png"]
    assert caught.value.status == 2 and "--skip" in caught.value.message
    report = doctor.require(Data(str(tmp_path), prompt="a thing", skip=("empty.jpg", "words.jpg", "tiny.png")))
    assert report.starts and report.pictures == 2 and report.warnings == []


def test_a_check_gives_the_findings_in_order(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for plant in (planted.good, planted.blurred, planted.no_text):
        plant(photos)
    found = doctor.check(Data(str(photos), prompt="a thing"))
    assert [one.code for one in found] == ["unreadable", "unreadable", "blurred"]
    assert found[-1].files == ("dull.png",) and found[-1].advice


@pytest.mark.parametrize(
    "data",
    [
        Data(),
        Data("hf:"),
        Data("", prompt=""),
        Data("/nowhere", concepts=(Concept("/nowhere"),)),
        Data(concepts=(Concept("/nowhere"), Concept("/else", trigger=" "))),
        Data("/nowhere", background="no colour", template="{x}", validation=3),
    ],
)
def test_nothing_that_is_asked_breaks_it(data: Data) -> None:
    report = doctor.examine(data, Captions(tag_dropout=9, caption_variants=0), Framing((7,), min_kept=-1), Model("?"))
    assert not report.starts and report.recommendation is None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.tuples(NAMES, ENDINGS), CONTENT, max_size=6))
def test_no_folder_breaks_it(tmp_path_factory: pytest.TempPathFactory, files: dict[tuple[str, str], bytes]) -> None:
    folder = tmp_path_factory.mktemp("any")
    planted.good(folder)
    for (stem, ending), content in files.items():
        if stem + ending not in (".", ".."):
            (folder / (stem + ending)).write_bytes(content)
    before = planted.snapshot(folder)
    report = doctor.examine(Data(str(folder), prompt="a thing"))
    assert report.pictures >= 2
    assert all(one.code in findings.ADVICE and one.text.isprintable() for one in report.findings)
    assert planted.snapshot(folder) == before


def examples(counts: list[int]) -> list[Example]:
    return [Example(Path(f"{c}-{n}.png"), ("a",), concept=c) for c, count in enumerate(counts) for n in range(count)]


@given(st.integers(1, 3000), st.integers(1, 32))
def test_more_pictures_are_trained_no_shorter(count: int, batch: int) -> None:
    one, more = (doctor.recommend(examples([n]), Data("x"), "some/model", batch).steps for n in (count, count + 1))
    assert 10 <= one <= more and one % 10 == 0
    if one > 10:
        assert 10 * count <= one * batch < 100 * count + 10 * batch, "each picture is seen 10 to 100 times"


def test_few_pictures_of_a_subject_take_the_steps_of_the_literature() -> None:
    assert doctor.recommend(examples([5]), Data("x"), "some/model", 1).steps == 500
    assert doctor.recommend(examples([5]), Data("x"), "some/model", 4).steps == 130
    assert doctor.recommend(examples([30]), Data("x"), "some/model", 4).steps == 500


@given(st.lists(st.integers(1, 40), min_size=2, max_size=4))
def test_repeats_bring_concepts_within_a_factor_of_two(counts: list[int]) -> None:
    data = Data(concepts=tuple(Concept(f"/{n}") for n in range(len(counts))))
    repeats = doctor.recommend(examples(counts), data, "some/model", 1).repeats
    seen = [count * repeats[f"/{n}"] for n, count in enumerate(counts)]
    assert max(seen) < 2 * min(seen)


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        ("picture", "a.jpg: has 3 pages; save the one to learn as a PNG or JPEG", "animated"),
        ("picture", "a.jpg: too large: x; at most 89 megapixels are read: scale it down", "huge"),
        ("picture", "a.tif: 32 bits a pixel, whose range is not known", "mode"),
        ("picture", "a.jpg: what was never seen", "unreadable"),
        ("skip", "--skip a: no such file there", "setting"),
    ],
)
def test_every_problem_has_a_kind(code: str, text: str, expected: str) -> None:
    one = findings.of_problem(Problem(code, text, ("a.jpg",)))  # type: ignore[arg-type]
    assert (one.severity, one.code, one.files) == ("error", expected, ("a.jpg",))
