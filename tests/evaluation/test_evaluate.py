"""`finetune evaluate` and `finetune compare`, through the command line, on runs of tiny models."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_judges
from PIL import Image

from finetune import cli, sampling
from finetune.evaluation import drawing, judges, measures
from finetune.pictures import read_settings

SIDE = 64
DRAWING = ("--steps", "2", "--count", "2", "--prompt", "a sks dog on a sofa", "a red sks dog")


def noise(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        random = np.random.default_rng(first + number)
        picture = Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        picture.save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    found = tiny_judges.save(tmp_path_factory.mktemp("judges"))
    return [word for name in ("dino", "clip", "lpips") for word in (f"--{name}", str(found[name]))]


def train(recipe: str, model: Path | str, run: Path, *words: str) -> Path:
    given = ["--model", str(model), "--output", str(run), "--tracker", "none", "--lr", "1e-2"]
    cli.main(["train", recipe, *given, "--steps", "4", "--checkpoint-every", "2", "--no-prior", *words])
    return run


@pytest.fixture(scope="module")
def run(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    pictures = noise(place / "pictures", 3)
    words = ["--data", str(pictures), "--prompt", "a photo of sks dog", "--class-prompt", "a photo of a dog"]
    return train("lora", tiny_models["sd"], place / "run", *words, "--validation", "0.3")


def evaluate(run: Path, places: list[str], *words: str) -> dict[str, Any]:
    cli.main(["evaluate", str(run), *DRAWING, *places, *words])
    return dict(json.loads((run / "evaluation" / "table.json").read_text()))


def opened(folder: Path, beginning: str) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in sorted(folder.glob(f"{beginning}*.png"))]


def test_every_figure_is_that_of_the_kept_pictures(
    run: Path, places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    table = evaluate(run, places)
    assert [(state["name"], state["step"]) for state in table["states"]] == [
        ("base", 0), ("step-000002", 2), ("result", 4),
    ]  # fmt: skip
    folder, result = run / "evaluation", table["states"][-1]
    panel = judges.published(*places[1::2])
    drawn, base = folder / "result", folder / "base"
    real = opened(run.parent / "pictures", "")
    dino, clip = panel.likeness["DINO"], panel.words
    samples = opened(drawn, "subject-")
    assert len(samples) == 4

    def value(measure: str) -> float:
        return float(result["figures"][measure]["value"])

    cosines = dino.see(samples).numpy() @ dino.see(real).numpy().T
    assert value("likeness") == pytest.approx(cosines.mean(), abs=1e-5)
    seen = panel.likeness["CLIP-I"].see(samples).numpy() @ panel.likeness["CLIP-I"].see(real).numpy().T
    assert value("likeness 2") == pytest.approx(seen.mean(), abs=1e-5)
    said = clip.read(["a dog on a sofa"] * 2 + ["a red dog"] * 2).numpy()
    assert value("fidelity") == pytest.approx((clip.see(samples).numpy() * said).sum(1).mean(), abs=1e-5)
    classes = dino.see(opened(drawn, "class-")).numpy() @ dino.see(real).numpy().T
    assert value("class drift") == pytest.approx(classes.mean(), abs=1e-5)
    assert result["figures"]["class drift"]["title"] == "PRES"
    bare = panel.differ.distances(opened(drawn, "class-")).numpy()
    assert value("class diversity") == pytest.approx(bare[np.triu_indices(len(bare), 1)].mean(), rel=1e-4)
    apart = [float(panel.differ.distances(samples[at : at + 2])[0, 1]) for at in (0, 2)]
    assert value("diversity") == pytest.approx(np.mean(apart), rel=1e-4)
    one, other = (dino.see(opened(place, "unrelated-")).numpy() for place in (drawn, base))
    assert value("drift") == pytest.approx((1 - (one * other).sum(1)).mean(), abs=1e-5) and value("drift") > 0
    assert "drift" not in table["states"][0]["figures"]
    assert table["states"][1]["validation"] > 0
    for figure in result["figures"].values():
        assert figure["low"] <= figure["value"] <= figure["high"] and figure["judge"] and figure["scale"]

    assert read_settings(drawn / "subject-01-seed0.png")["prompt"] == "a sks dog on a sofa"
    assert read_settings(base / "subject-01-seed0.png")["prompt"] == "a dog on a sofa"
    told = capsys.readouterr().out
    assert "| state | DINO | CLIP-I | CLIP-T | PRES | class DIV | DIV | copies | drift |" in told
    assert f"Verdict on result: {table['verdict']['word']}: " in told
    assert "DINO" in (folder / "table.csv").read_text() and "Verdict" in (folder / "table.md").read_text()
    assert html.escape(table["verdict"]["reason"]) in (run / "report.html").read_text(encoding="utf-8")


def test_a_style_is_measured_by_what_else_takes_it_on(
    run: Path, places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Likeness of things in it, as CLIP sees them, fidelity to the things alone, and likeness of unrelated prompts."""
    other = tmp_path / "run"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("evaluation"))
    words = ["--subject", "sks {}", "--step", "result"]
    table = evaluate(other, places, "--protocol", "style", *words)
    assert (table["protocol"], table["facts"]["measured against"]) == ("style", [["a dog on a sofa", "a red dog"]])
    drawn, real, figures = other / "evaluation" / "result", opened(run.parent / "pictures", ""), table["states"][-1]
    assert not opened(drawn, "class-"), "a style has no class"
    clip = judges.published(*places[1::2]).words
    for measure, beginning in (("likeness", "subject-"), ("class drift", "unrelated-")):
        cosines = clip.see(opened(drawn, beginning)).numpy() @ clip.see(real).numpy().T
        assert figures["figures"][measure]["value"] == pytest.approx(cosines.mean(), abs=1e-5)
    said = clip.read(["a dog on a sofa"] * 2 + ["a red dog"] * 2).numpy()
    seen = clip.see(opened(drawn, "subject-")).numpy()
    assert figures["figures"]["fidelity"]["value"] == pytest.approx((seen * said).sum(1).mean(), abs=1e-5)
    assert "| state | CLIP-I | DINO | CLIP-T | style leak | DIV | copies | drift |" in capsys.readouterr().out


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_figures(
    run: Path, places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(run, places, "--batch", "4", "--step", "result")
    (run / "evaluation").rename(tmp_path / "before")
    drawn: list[str] = []
    sample = sampling.sample

    def failing(family: Any, prompts: list[str], *given: Any, **options: Any) -> list[Image.Image]:
        if len(drawn) >= 12:
            raise KeyboardInterrupt
        drawn.extend(prompts)
        return sample(family, prompts, *given, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(drawing, "sample", failing)
        evaluate(run, places, "--batch", "4", "--step", "result")
    assert stop.value.code == 130 and len(drawn) == 12

    def counting(family: Any, prompts: list[str], *given: Any, **options: Any) -> list[Image.Image]:
        drawn.extend(prompts)
        return sample(family, prompts, *given, **options)

    monkeypatch.setattr(drawing, "sample", counting)
    again = evaluate(run, places, "--batch", "4", "--step", "result")
    assert again == whole
    assert len(drawn) == 2 * (4 + 8 + 8), "nothing is drawn twice"
    assert evaluate(run, places, "--batch", "4", "--step", "result") == whole and len(drawn) == 40


def test_a_signal_stops_it_after_the_batch(
    run: Path, places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other, sample = tmp_path / "run", sampling.sample
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("evaluation"))

    def signalled(*given: Any, **options: Any) -> list[Image.Image]:
        os.kill(os.getpid(), signal.SIGTERM)
        return sample(*given, **options)

    monkeypatch.setattr(drawing, "sample", signalled)
    with pytest.raises(SystemExit) as stop:
        evaluate(other, places, "--batch", "4")
    assert stop.value.code == 75 and "Go on with the same command" in capsys.readouterr().err
    assert len(list((other / "evaluation" / "base").glob("*.png"))) == 4


def test_other_settings_are_drawn_anew(run: Path, places: list[str]) -> None:
    first = evaluate(run, places, "--step", "last")
    other = evaluate(run, places, "--step", "last", "--seed", "5")
    assert first["states"][1]["figures"]["likeness"] != other["states"][1]["figures"]["likeness"]
    assert evaluate(run, places, "--step", "last") == first


def test_a_planted_training_picture_is_found(run: Path, places: list[str]) -> None:
    first = evaluate(run, places, "--step", "result")
    name = first["states"][1]["copies"][0]["picture"]
    target = run / "evaluation" / "result" / "subject-02-seed1.png"
    kept = target.read_bytes()
    try:
        target.write_bytes((run.parent / "pictures" / name).read_bytes())
        found = evaluate(run, places, "--step", "result")["states"][1]["copies"][0]
    finally:
        target.write_bytes(kept)
    assert (found["file"], found["picture"], found["alarm"]) == ("result/subject-02-seed1.png", name, True)
    assert found["similarity"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--count", "0"], "--count 0: at least 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--step", "3"], "--step 3: there are checkpoints of 2, 4, best and last"),
        (["--protocol", "dreambooth", "--prompt", "a dog"], "has its own prompts"),
        (["--protocol", "style", "--class-name", "dog"], "a style has no class"),
        (["--dino", "no/such-model"], "this metric model cannot be loaded"),
        (["--references", "a", "b"], "--references: 2 for 1 concepts"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", str(run), *words])
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", str(tmp_path)])
    assert stop.value.code == 2 and "no run" in capsys.readouterr().err


def test_all_weights_and_several_concepts(
    tiny_models: dict[str, Path], places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model folder as the result; two concepts, their matrix, and references of one's own."""
    for number, name in enumerate("ab"):
        noise(tmp_path / name, 2, first=10 * number)
    file = tmp_path / "two.toml"
    tables = [
        f'[[concepts]]\ndata = "{tmp_path / name}"\nprompt = "a photo of {word}"\n'
        f'class_prompt = ["a photo of a {kind}"]'
        for name, word, kind in (("a", "sks dog", "dog"), ("b", "xyz cat", "cat"))
    ]
    file.write_text("\n".join(tables))
    run = train("dreambooth", tiny_models["sd"], tmp_path / "run", "--config", str(file))
    words = ["--references", str(tmp_path / "b"), str(tmp_path / "a"), "--step", "result"]
    cli.main(["evaluate", str(run), "--steps", "1", "--count", "1", *places, *words])
    table = json.loads((run / "evaluation" / "table.json").read_text())
    assert table["concepts"] == ["sks dog", "xyz cat"]
    seer = judges.DINO(places[1])
    drawn = [seer.see(opened(run / "evaluation" / "result", f"subject{number}-")) for number in ("", 1)]
    own = [seer.see(opened(tmp_path / name, "")) for name in "ba"]
    assert np.allclose(table["bleed"], measures.bleed(drawn, own), atol=1e-5)
    assert table["states"][1]["figures"]["diversity"]["value"] is None, "one picture of a prompt has no diversity"
    assert "| prompts of | like sks dog | like xyz cat |" in capsys.readouterr().out


def test_toybox_is_judged_by_its_own_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = Path(__file__).parents[2] / "datasets" / "gizmo" / "pictures"
    words = ["--data", str(pictures), "--class-prompt", "a photo of a toy", "--rank", "4", "--measure", "off"]
    run = train("lora", "toybox", tmp_path / "run", *words)
    cli.main(["evaluate", str(run), "--steps", "2", "--count", "1", "--step", "result", "--json"])
    printed = capsys.readouterr().out
    table = json.loads((run / "evaluation" / "table.json").read_text())
    assert json.loads(printed[printed.rindex("\n{\n") :]) == table
    assert table["facts"]["prompts"][0][0] == "a photo of sks toy in the snow"
    assert {figure["judge"].partition(" (")[0] for figure in table["states"][1]["figures"].values()} == {"toybox judge"}


def test_runs_side_by_side(run: Path, places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other|run"
    shutil.copytree(run, other)
    one = evaluate(run, places, "--step", "result")
    two = evaluate(other, places, "--step", "2")
    capsys.readouterr()
    cli.main(["compare", str(run), str(other), "--format", "json"])
    table = json.loads(capsys.readouterr().out)
    values = [each["states"][1]["figures"]["likeness"]["value"] for each in (one, two)]
    rows = [state["figures"]["likeness"]["value"] for state in table["states"]]
    assert rows == pytest.approx([*values, np.mean(values)]) and table["states"][-1]["name"] == "mean of all"
    assert table["states"][-1]["figures"]["likeness"]["units"] == 2
    cli.main(["compare", str(run), str(other), "--output", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    assert "| run (result) |" in text and "other\\|run (step-000002)" in text

    evaluate(other, places, "--step", "2", "--seed", "9")
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", str(run), str(other)])
    assert stop.value.code == 2 and "seed: 9; run: 0" in " ".join(capsys.readouterr().err.split())


def test_only_what_was_evaluated_is_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (([str(run)], "two runs or more"), ([str(run), str(tmp_path)], "finetune evaluate")):
        with pytest.raises(SystemExit) as stop:
            cli.main(["compare", *words])
        assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
