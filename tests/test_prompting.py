"""The grammar of weights, what they do to embeddings, and prompts that are longer than a text encoder takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Images

from finetune import families, prompting, sampling
from finetune.cli import main
from finetune.errors import Fault
from finetune.families import Family, Source, base

DRAW = {"steps": 2, "guidance": 4.0}


@pytest.fixture(params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Family:
    return families.load(Source(str(tiny_models[request.param])))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a dog", [("a dog", 1.0)]),
        ("", []),
        ("a (red) dog", [("a ", 1.0), ("red", 1.1), (" dog", 1.0)]),
        ("a (red:1.5) dog", [("a ", 1.0), ("red", 1.5), (" dog", 1.0)]),
        ("(red: .5)", [("red", 0.5)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("((very))", [("very", pytest.approx(1.21))]),
        (r"a dog \(brown\)", [("a dog (brown)", 1.0)]),
        (r"(a \(b\):1.2)", [("a (b)", 1.2)]),
        ("(at 10:30)", [("at 10", 30.0)]),
        ("ratio 3:2, [x] \\n", [("ratio 3:2, [x] \\n", 1.0)]),
        ("(word:high)", [("word:high", 1.1)]),
        ("()", []),
    ],
)
def test_weights_are_read(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert prompting.parse(prompt) == expected


@pytest.mark.parametrize(("prompt", "said"), [("a (dog", "`(` is never closed"), ("a :) dog", "`)` is never opened")])
def test_parentheses_that_do_not_match_are_refused(
    prompt: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--prompt", prompt, "--model", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_can_be_written(text: str) -> None:
    escaped = text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
    assert prompting.parse(escaped) == ([(text, 1.0)] if text else [])


@settings(deadline=None)
@given(text=st.text(alphabet="ab ():.1\\", max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parts = prompting.parse(text)
    except Fault:
        return
    assert all(np.isfinite(weight) and part for part, weight in parts)


def embedded(family: Family, prompt: str, negative: str = "") -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return prompting.arguments(family, [prompting.read(family, prompt)], prompting.read(family, negative))


def test_what_needs_nothing_is_left_to_diffusers(family: Family) -> None:
    assert embedded(family, r"a dog \(brown\)") == {"prompt": ["a dog (brown)"], "negative_prompt": None}


def encoded(family: Family, text: str) -> dict[str, torch.Tensor]:
    """What the text encoders say, of no words too."""
    pipeline = family.pipeline
    return family.encode_tokens([base.tokens(pipeline, one, [text]) for one in families.tokenizers(family)])


def test_a_short_prompt_has_the_embeddings_of_diffusers(family: Family) -> None:
    """Bit for bit, of the positive and of the negative prompt."""
    read = prompting.read(family, "a red ball")
    with torch.no_grad():
        ours = prompting._encoded(family, read, 1)
        theirs = family.encode_prompts(["a red ball"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_move_words_away_from_the_empty_prompt(family: Family) -> None:
    """z' = empty + w (z - empty) at the words' own places, and nowhere else."""
    plain, empty = family.encode_prompts(["ab cd"])["text"], encoded(family, "")["text"]
    weighted = embedded(family, "ab (cd:1.5)")["prompt_embeds"]
    expected = plain.clone()
    expected[:, 3:5] = empty[:, 3:5] + 1.5 * (plain[:, 3:5] - empty[:, 3:5])  # a token a letter, after the beginning
    torch.testing.assert_close(weighted, expected)
    assert torch.equal(weighted[:, :3], plain[:, :3]) and torch.equal(weighted[:, 5:], plain[:, 5:])
    torch.testing.assert_close(embedded(family, "ab (cd:0)")["prompt_embeds"][:, 3:5], empty[:, 3:5])


def test_a_long_prompt_goes_on_in_further_chunks(family: Family) -> None:
    """70 letters and a word of 7 that would not fit: it begins the second chunk."""
    first, second = " ".join(["abcde"] * 14), "fghijkl mn"
    long = embedded(family, f"{first} {second}", "ugly")
    parts = [family.encode_prompts([text]) for text in (first, second)]
    torch.testing.assert_close(long["prompt_embeds"], torch.cat([part["text"] for part in parts], 1))
    against = [encoded(family, text)["text"] for text in ("ugly", "")]
    torch.testing.assert_close(long["negative_prompt_embeds"], torch.cat(against, 1))
    if "pooled" in parts[0]:
        torch.testing.assert_close(long["pooled_prompt_embeds"], parts[0]["pooled"])


def test_a_word_longer_than_a_chunk_is_cut(family: Family) -> None:
    assert [len(chunk) for chunk in prompting.read(family, "x" * 100).chunks[0]] == [75, 25]


def test_no_negative_prompt_is_what_it_is_for_diffusers(tiny_models: dict[str, Path]) -> None:
    """SDXL: zeros; others: the empty prompt."""
    for kind, zero in (("sd", False), ("sdxl", True)):
        said = embedded(families.load(Source(str(tiny_models[kind]))), "(a dog:1.2)")
        assert bool((said["negative_prompt_embeds"] == 0).all()) is zero


def test_a_picture_does_not_depend_on_the_lengths_beside_it(family: Family) -> None:
    prompts, seeds = ["a dog", "(a dog:1.3)", "a dog " * 30, "a cat"], [1, 1, 1, 2]
    together = sampling.sample(family, prompts, seeds, weighted=True, **DRAW)
    for picture, prompt, seed in zip(together, prompts, seeds, strict=True):
        [alone] = sampling.sample(family, [prompt], [seed], weighted=True, **DRAW)
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(alone).astype(int)).max() <= 1
    assert not np.array_equal(together[0], together[1]) and not np.array_equal(together[0], together[2])


def test_generate_reads_weights_and_files_of_prompts(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    (tmp_path / "prompts.txt").write_text("# toys\n(a dog:1.0)\n\na (dog:1.4)\n", encoding="utf-8")
    words = ["--steps", "2", "--model", str(tiny_models["sd"]), "--output", str(tmp_path / "out")]
    main(["generate", "--prompt", "a dog", "--prompts", str(tmp_path / "prompts.txt"), *words])
    pictures = [np.asarray(Images.open(path)) for path in sorted((tmp_path / "out").glob("0*.png"))]
    assert len(pictures) == 3
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize(("content", "said"), [(b"\n# nothing\n", "no prompt in it"), (b"\xff\xfe\xfa", "UTF-8")])
def test_files_without_prompts_are_refused(
    content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
