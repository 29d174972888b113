"""`finetune explain`: what is watched is what happens, and watching changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from PIL import Image as Images

from finetune import families, pictures, prompting, sampling
from finetune.cli import main
from finetune.families import Family, Source
from finetune.watching import watched


@pytest.fixture(params=["sd", "sdxl"])
def family(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Family:
    return families.load(Source(str(tiny_models[request.param])))


def draw(family: Family) -> Images.Image:
    return sampling.sample(family, ["ab cd"], [3], steps=3, guidance=4.0)[0]


def test_watching_changes_nothing_and_sees_each_step(family: Family) -> None:
    alone = draw(family)
    with watched(family, [0, 2]) as seen:
        beside = draw(family)
    assert np.array_equal(np.asarray(alone), np.asarray(beside))
    assert sorted(seen.given) == sorted(seen.attention) == [0, 2]
    assert seen.given[0].shape == (1, 4, 8, 8) and seen.attention[2].shape == (77, 8, 8)
    torch.testing.assert_close(seen.attention[2].sum(0), torch.ones(8, 8))
    assert not any(module._forward_pre_hooks for module in family.pipeline.unet.modules())


def test_attention_is_that_of_diffusers(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the scores that diffusers' own plain processor computes, of every layer with full resolution."""
    scores: list[torch.Tensor] = []
    real = Attention.get_attention_scores

    def spy(self: Attention, query: torch.Tensor, key: torch.Tensor, mask: object = None) -> torch.Tensor:
        found = real(self, query, key, mask)
        if key.shape[1] == 77:
            heads = found.unflatten(0, (-1, self.heads))[-1]  # of the prompt, which comes after the negative one
            scores.append(heads.mean(0))
        return found

    monkeypatch.setattr(Attention, "get_attention_scores", spy)
    family.pipeline.unet.set_attn_processor(AttnProcessor())
    with watched(family, [0]) as seen:
        sampling.sample(family, ["ab cd"], [3], steps=1, guidance=4.0)
    maps = []
    for score in scores:
        side = int(len(score) ** 0.5)
        small = score.T.reshape(1, 77, side, side)
        maps.append(torch.nn.functional.interpolate(small, (8, 8), mode="bilinear")[0])
    assert len(maps) > 5
    torch.testing.assert_close(seen.attention[0], torch.stack(maps).mean(0))


def test_words_are_found_at_their_tokens(family: Family) -> None:
    """A token a letter, after the one that begins; the second chunk begins at 77."""
    assert prompting.places(family, "ab (cd:1.3)") == [("ab", [1, 2]), ("cd", [3, 4])]
    places = prompting.places(family, " ".join(["abcde"] * 16))
    assert places[14] == ("abcde", [71, 72, 73, 74, 75]) and places[15] == ("abcde", [78, 79, 80, 81, 82])


def test_the_film_strip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the embedded model: its picture at both ends, noise in the middle, and red is looked for where red is."""
    tables = []
    real = pictures.grid
    monkeypatch.setattr(pictures, "grid", lambda *table: tables.append(table) or real(*table))
    words = ["--prompt", "a photo of a red toy", "--seed", "4", "--steps", "8", "--columns", "3"]
    main(["explain", *words, "--output", str(tmp_path / "explain.png")])
    main(["generate", *words[:6], "--output", str(tmp_path / "out")])
    [file] = (tmp_path / "out").glob("*.png")
    own = np.asarray(Images.open(file)).astype(int)
    (noised, _, times, title), (rows, labels, columns) = tables
    assert times == ["t = 0", "t = 333", "t = 666", "t = 999"] and title == "a photo of a red toy"
    assert labels == ["noise is taken away", "1. a", "2. photo", "3. of", "4. a", "5. red", "6. toy"]
    assert columns == ["step 1", "step 5", "step 8", "picture, mean"]
    assert np.array_equal(np.asarray(rows[0][-1]), own) and np.array_equal(np.asarray(noised[0][0]), own)
    far = [np.abs(np.asarray(picture).astype(int) - own).mean() for picture in rows[0]]
    assert far == sorted(far, reverse=True) and far[0] > 30
    lit = np.asarray(rows[5][-1]).sum(2) / own.sum(2).clip(1)
    red = own[..., 0] > own[..., 1:].max(2) + 80
    assert red.mean() > 0.1 and lit[red].mean() > 1.3 * lit[~red].mean()
    assert pictures.read_settings(tmp_path / "explain.png")["seed"] == 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "say what to draw"),
        (["--prompt", "a", "--columns", "1"], "--columns 1: at least 2"),
        (["--prompt", "a", "--output", "a.gif"], "a PNG file"),
        (["--prompt", "a", "--init", "a.png"], "drawn from noise"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["explain", "--model", "no-such/model", *words])
    assert stop.value.code == 2 and expected in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
