"""Several things in one run, and each way to hold the class: through the command line."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from finetune import cli

CONCEPTS = """
recipe = "lora"

[[concepts]]
data = "{root}/dog"
prompt = "a photo of sks dog"
trigger = "sks"
class_prompt = "a photo of a dog"
repeats = 3

[[concepts]]
data = "{root}/cat"
trigger = "zwx"
template = "a photo of {{trigger}} cat, {{caption}}"
class_prompt = ["a photo of a cat", "a drawing of a cat"]
weight = 0.5
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for concept, sizes in {"dog": [(64, 64), (64, 120)], "cat": [(100, 64), (64, 64), (70, 70)]}.items():
        (tmp_path / concept).mkdir()
        for number, size in enumerate(sizes):
            Image.effect_noise(size, 30 + 50 * number).convert("RGB").save(tmp_path / concept / f"{number}.png")
            if concept == "cat":
                (tmp_path / concept / f"{number}.txt").write_text(f"number {number}")
    (tmp_path / "concepts.toml").write_text(CONCEPTS.format(root=tmp_path))
    return tmp_path


def train(model: Path, root: Path, output: str, *flags: str, recipe: str = "lora") -> Path:
    quick = ["--steps", "4", "--batch-size", "2", "--class-images", "2", "--class-steps", "1", "--tracker", "none"]
    large = ["--max-upscale", "4", "--min-kept", "0.2"]
    given = ["--model", str(model), "--output", str(root / output), *quick, *large]
    cli.main(["train", recipe, *given, *flags])
    return root / output


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_two_concepts_train_in_one_run(
    tiny_models: dict[str, Path], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tiny_models["sd"], root, "run", "--config", str(root / "concepts.toml"))
    said = " ".join(capsys.readouterr().out.split())
    assert "5 pictures" in said and "2 concepts: sks: 2, 6 an epoch; zwx: 3" in said
    assert "4 of 2 pictures: 0.9 epochs" in said  # 2 x 3 repeats and 3
    assert len(losses(run)) == 4
    kept = tomllib.loads((run / "settings.toml").read_text())
    assert [concept["trigger"] for concept in kept["concepts"]] == ["sks", "zwx"]
    cli.main(["train", "--config", str(run / "settings.toml"), "--output", str(root / "again")])
    assert (root / "again" / "adapter.safetensors").read_bytes() == (run / "adapter.safetensors").read_bytes()


def test_each_concept_weighs_in_the_loss_what_it_was_given(tiny_models: dict[str, Path], root: Path) -> None:
    """L = sum of w l over the step's pictures / their number: linear in the weights, where the model stays the base."""
    total = {}
    for weights in ((1, 1), (3, 1), (1, 3), (0.5, 2)):
        table = [f'[[concepts]]\ndata = "{root}/{name}"\nprompt = "a photo of {name}"\nweight = {weight:.1f}\n'
                 for name, weight in zip(("dog", "cat"), weights, strict=True)]  # fmt: skip
        (root / "weights.toml").write_text("\n".join(['recipe = "lora"', *table]))
        flags = ["--config", str(root / "weights.toml"), "--no-prior", "--lr", "0"]
        total[weights] = sum(losses(train(tiny_models["sd"], root, f"run{weights}", *flags)))
    dog, cat = ((total[weights] - total[1, 1]) / 2 for weights in ((3, 1), (1, 3)))
    assert min(dog, cat) > 0.1
    assert total[1, 1] == pytest.approx(dog + cat, rel=1e-5)
    assert total[0.5, 2] == pytest.approx(0.5 * dog + 2 * cat, rel=1e-5)


@pytest.mark.parametrize("recipe", ["lora", "dreambooth"])
def test_without_class_pictures_the_base_is_the_teacher(
    recipe: str, tiny_models: dict[str, Path], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    word = ["--data", str(root / "dog"), "--prompt", "a photo of sks dog", "--trigger", "sks", "--class-word", "dog"]
    run = train(tiny_models["sd"], root, "run", *word, "--prior-from", "base", recipe=recipe)
    said = " ".join(capsys.readouterr().out.split())
    assert "held to the base's prediction" in said and "class pictures ━" not in said
    again = train(tiny_models["sd"], root, "again", *word, "--prior-from", "base", recipe=recipe)
    without = train(tiny_models["sd"], root, "without", *word, "--no-prior", recipe=recipe)
    assert losses(run) == losses(again)
    # An adapter begins as nothing at all, so the base's prediction is its own: the first loss is the subject's alone.
    assert losses(run)[0] == pytest.approx(losses(without)[0], abs=1e-6)
    assert losses(run)[-1] != losses(without)[-1]


def test_the_base_cannot_be_asked_where_all_weights_train(
    tiny_models: dict[str, Path], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train(tiny_models["sd"], root, "run", "--data", str(root / "dog"), "--prompt", "x", "--no-prior",
              "--unmasked-prior", "1", recipe="dreambooth")  # fmt: skip
    assert stopped.value.code == 2
    assert "--unmasked-prior 1" in capsys.readouterr().err
    assert not (root / "run").exists()
