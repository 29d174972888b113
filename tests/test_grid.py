"""`finetune grid`: each cell is the picture that its labels say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Images
from PIL.Image import Image

from finetune import families, pictures, sampling
from finetune.cli import main
from finetune.families import Source
from finetune.initial import Initial

Table = tuple[list[list[Image]], list[str], list[str], str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    """A run of four steps with checkpoints of 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "photos").mkdir()
    Images.new("RGB", (64, 64), "teal").save(folder / "photos" / "a.png")
    main(["train", "lora", "--model", str(tiny_models["sd"]), "--data", str(folder / "photos"), "--prompt", "a dog",
          "--no-prior", "--steps", "4", "--lr", "0.1", "--checkpoint-every", "2", "--tracker", "none",
          "--output", str(folder / "run")])  # fmt: skip
    return folder / "run"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """Run the command; gives what was put into the table, and checks that the file is that table."""

    def draw(*words: str) -> Table:
        seen: list[Table] = []
        real = pictures.grid

        def spy(rows: list[list[Image]], beside: list[str], above: list[str], title: str) -> Image:
            seen.append((rows, list(beside), list(above), title))
            return real(rows, beside, above, title)

        monkeypatch.setattr(pictures, "grid", spy)
        main(["grid", "--output", str(tmp_path / "grid.png"), "--steps", "2", *words]
             if "--steps" not in words else ["grid", "--output", str(tmp_path / "grid.png"), *words])  # fmt: skip
        [table] = seen
        assert np.array_equal(np.asarray(Images.open(tmp_path / "grid.png")), np.asarray(real(*table)))
        return table

    return draw


def alike(one: Image, other: Image) -> bool:
    return bool(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= 1)


def different(table: list[list[Image]]) -> bool:
    flat = [picture for row in table for picture in row]
    return not any(alike(a, b) for i, a in enumerate(flat) for b in flat[:i])


def test_prompts_and_seeds(drawn: object, tiny_models: dict[str, Path]) -> None:
    model = ["--model", str(tiny_models["sd"])]
    rows, beside, above, title = drawn(*model, "--prompt", "a dog", "a (cat:1.3)", "--seed", "3", "1", "7")
    assert beside == ["a dog", "a (cat:1.3)"] and above == ["seed 3", "seed 1", "seed 7"]
    assert "steps 2" in title and "guidance 5" in title
    family = families.load(Source(str(tiny_models["sd"])))
    for row, prompt in zip(rows, beside, strict=True):
        for picture, seed in zip(row, (3, 1, 7), strict=True):
            [alone] = sampling.sample(family, [prompt], [seed], steps=2, guidance=5.0, weighted=True)
            assert alike(picture, alone)
    assert different(rows)


def test_rows_and_columns_change_places(drawn: object, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    words = ["--model", str(tiny_models["sd"]), "--prompt", "a", "b", "--guidance", "1", "6"]
    rows, beside, above, _ = drawn(*words)
    assert beside == ["a", "b"] and above == ["guidance 1", "guidance 6"]
    turned, beside, above, _ = drawn(*words, "--rows", "guidance", "--overwrite")
    assert beside == ["guidance 1", "guidance 6"] and above == ["a", "b"]
    assert all(alike(turned[j][i], rows[i][j]) for i in range(2) for j in range(2))


def test_one_side_only(drawn: object, tiny_models: dict[str, Path]) -> None:
    words = ["--model", str(tiny_models["sd"]), "--prompt", "a"]
    rows, beside, above, _ = drawn(*words, "--steps", "1", "2", "4")
    assert (beside, above) == ([""], ["steps 1", "steps 2", "steps 4"]) and different(rows)
    _, beside, above, _ = drawn(*words, "--steps", "1", "2", "--rows", "steps", "--overwrite")
    assert (beside, above) == (["steps 1", "steps 2"], ["seed 0"])


def test_strengths_of_a_picture(drawn: object, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    Images.linear_gradient("L").convert("RGB").resize((64, 64)).save(tmp_path / "a.png")
    words = ["--model", str(tiny_models["sd"]), "--prompt", "a", "--init", str(tmp_path / "a.png"), "--steps", "4"]
    rows, _, above, _ = drawn(*words, "--strength", "0", "0.5", "1")
    assert above == ["strength 0", "strength 0.5", "strength 1"]
    family = families.load(Source(str(tiny_models["sd"])))
    for picture, strength in zip(rows[0], (0.0, 0.5, 1.0), strict=True):
        start = Initial(Images.open(tmp_path / "a.png"), strength)
        [alone] = sampling.sample(family, ["a"], [0], steps=4, guidance=5.0, initial=start)
        assert alike(picture, alone)


def test_checkpoints_of_a_run(drawn: object, run: Path, tiny_models: dict[str, Path]) -> None:
    """The base's column is the base, that of the last step what the run's adapter draws."""
    words = ["--run", str(run), "--checkpoint", "base", "all", "--prompt", "a", "b", "--rows", "prompt"]
    rows, beside, above, title = drawn(*words)
    assert beside == ["a", "b"] and above == ["base", "step 2", "step 4"] and title.startswith("run,")
    assert different(rows)
    family = families.load(Source(str(tiny_models["sd"])))
    assert alike(rows[0][0], sampling.sample(family, ["a"], [0], steps=2, guidance=5.0)[0])
    family.pipeline.load_lora_weights(run, weight_name="adapter.safetensors")
    assert alike(rows[1][2], sampling.sample(family, ["b"], [0], steps=2, guidance=5.0)[0])


def test_adapter_files_and_their_strengths(drawn: object, run: Path, tiny_models: dict[str, Path]) -> None:
    file = str(run / "adapter.safetensors")
    words = ["--model", str(tiny_models["sd"]), "--prompt", "a", "--scale", "0", "1"]
    rows, beside, above, _ = drawn(*words, "--checkpoint", "base", file)
    assert beside == ["base", "adapter"] and above == ["scale 0", "scale 1"]
    assert alike(rows[0][0], rows[0][1]) and alike(rows[0][0], rows[1][0]) and not alike(rows[1][0], rows[1][1])
    [same], _, _, title = drawn(*words, "--adapter", file, "--overwrite")
    assert alike(same[0], rows[1][0]) and alike(same[1], rows[1][1]) and "adapter" in title


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt", "a"], "here it is none"),
        (["--prompt", "a", "b", "--seed", "0", "1", "--steps", "1", "2"], "here it is prompt, steps, seed"),
        (["--prompt", "a", "--seed", "0", "1", "--rows", "prompt"], "--rows prompt: it has one value only"),
        (["--prompt", "a", "--seed", "1", "1"], "--seed: a value stands there twice"),
        (["--prompt", "a", "--seed", "0", "1", "--strength", "0.5"], "name the picture too"),
        (["--prompt", "a", "--seed", "0", "1", "--steps", "0"], "--steps 0"),
        (["--prompt", "a", "(b"], "never closed"),
        (["--prompt", "a", "--checkpoint", "none.safetensors", "base"], "none.safetensors"),
        (["--seed", "0", "1"], "say what to draw"),
    ],
)
def test_what_is_no_table_is_refused(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["grid", "--model", "no-such/model", "--output", str(tmp_path / "grid.png"), *words])
    assert stop.value.code == 2 and expected in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_not_there_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(
            ["grid", "--run", str(run), "--prompt", "a", "--checkpoint", "2", "3", "--output", str(tmp_path / "g.png")]
        )
    assert stop.value.code == 2 and "checkpoints of 2, 4" in " ".join(capsys.readouterr().err.split())
