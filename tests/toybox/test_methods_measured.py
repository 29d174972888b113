"""`finetune toybox methods`: what is finished is not done again, and only whole rows are told."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from PIL import Image

from finetune import adapters, cli, config, data, families, shelf, words
from finetune.errors import Failure, Stopped
from finetune.evaluation import prompts
from finetune.families import Family, Source
from finetune.settings import Model, Prior
from finetune.toybox import methods

DATASETS = Path(__file__).resolve().parents[2] / "datasets"
ROW = "(IA)3"


@pytest.fixture(scope="module")
def toybox() -> Family:
    return families.load(Source("toybox"))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Commands are done in this process, which has loaded all that they need, with few denoising steps."""
    told = SimpleNamespace(asked=[], stop=None)
    few = {"--class-images": "2", "--class-steps": "1", "--steps": "1"}

    def run(config: methods.Config, words: Sequence[str], place: Path) -> Any:
        if (words[0], place.parent.name) == told.stop:
            raise Stopped("stopped")
        told.asked.append((words[0], place.parent.name, place.name))
        if place.name.startswith("warm"):
            place.mkdir(parents=True)
        else:
            cli.main([few.get(before, word) for before, word in zip(["", *words], words, strict=False)])
        return SimpleNamespace(ru_utime=1.5, ru_stime=0.5, ru_maxrss=700_000)

    monkeypatch.setattr(methods, "_run", run)
    return told


def test_it_goes_on_where_it_was_stopped_and_tells_whole_rows(
    here: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page, picture = tmp_path / "out", tmp_path / "page.md", tmp_path / "picture.png"
    page.write_text(f"Before.\n\n{methods.MARKS[0]}\nold\n{methods.MARKS[1]}\n\nAfter.\n")
    words = ["toybox", "methods", str(out), "--datasets", str(DATASETS), "--count", "1", "--seeds", "4"]
    words += ["--rows", ROW, "--docs", str(page), "--picture", str(picture)]
    commands = [("train", "warm-4"), ("train", "ia-3-4"), ("evaluate", "ia-3-4")]

    here.stop = "evaluate", "neon"
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 75 and "old" in page.read_text()
    assert here.asked == [*((verb, "gizmo", row) for verb, row in commands),
                          *((verb, "neon", row) for verb, row in commands[:2])]  # fmt: skip

    here.stop, here.asked = None, []
    capsys.readouterr()
    cli.main(words)
    assert here.asked == [("evaluate", "neon", "ia-3-4")]
    told = (out / "table.md").read_text()
    assert page.read_text() == f"Before.\n\n{methods.MARKS[0]}\n{told}{methods.MARKS[1]}\n\nAfter.\n"
    assert told in capsys.readouterr().out
    assert [told.count(f"| {name} | ") for name in ("the base", ROW, "LoRA, rank 16")] == [2, 2, 0]
    tables = json.loads((out / "table.json").read_text())
    for task in ("gizmo", "neon"):
        run, [found] = out / "runs" / task / "ia-3-4", tables[task][ROW]
        states = json.loads((run / "evaluation" / "table.json").read_text())["states"]
        for state, figures in zip(states, (found["base"], found["figures"]), strict=True):
            assert figures == {name: figure["value"] for name, figure in state["figures"].items()}
        assert found["size"] == (run / "adapter.safetensors").stat().st_size
        assert (found["seconds"], found["memory"]) == (2.0, 700_000 * 1024)
    config, row = methods.Config(out, seeds=(4,), count=1), methods._chosen([ROW])[0]
    for task in methods.TASKS:
        assert methods._runs(config, row, task) and not methods._runs(config, replace(row, lr=1.0), task)
    with Image.open(picture) as sheet:
        assert sheet.height > 2 * 192 and sheet.width > 6 * 192


@pytest.mark.parametrize("row", methods.ROWS, ids=lambda row: row.name)
@pytest.mark.parametrize("task", methods.TASKS, ids=lambda task: task.name)
def test_each_row_is_a_command_line_of_its_recipe(row: methods.Row, task: methods.Task, tmp_path: Path) -> None:
    recipe, *told = methods._training(row, task, 1, task.steps)
    folders = ["--data", str(DATASETS / task.name / "pictures"), "--output", str(tmp_path / "run")]
    made = config.parse(shelf.load(recipe).Config, [*told, *folders], "finetune")
    assert made.optim.lr == row.lr and made.optim.text_encoder_lr is None
    taught = config.new_words(config.asdict(made))
    assert bool(taught) == ("{word}" in row.settings)
    for word in taught:  # new to the base, in all captions, and in what is asked of the run
        examples, _ = data.read(made.data, made.captions, 1)
        words.check([word], made.words, examples, Model(), Accelerator())
        [subject] = prompts.subjects(made.data, Prior(), examples, prompts.Asked(), task.protocol, "toybox")
        assert all(word in said for said in (*subject.prompts, *(one.captions[0] for one in examples)))
        assert not any(word in said or "neon" in said for said in subject.plain)


def test_a_command_is_measured_and_a_failed_one_said(tmp_path: Path) -> None:
    config = methods.Config(tmp_path)
    used = methods._run(config, ["--version"], tmp_path / "runs" / "one")
    assert used.ru_utime > 0 and used.ru_maxrss > 1000
    assert (tmp_path / "runs" / "one.log").read_text().startswith("finetune ")
    with pytest.raises(Failure, match=r"evaluate nowhere: ended with status 2.*one\.log"):
        methods._run(config, ["evaluate", "nowhere"], tmp_path / "runs" / "one")


def test_means_are_told_with_the_least_and_the_most() -> None:
    figures = {"likeness": 0.5, "fidelity": 0.7, "class drift": 0.1, "drift": 0.2}
    runs = [methods.Run(9, 6e8, 2000, {**figures, "likeness": value}, figures) for value in (0.4, 0.6, 0.8)]
    task = methods.TASKS[0]
    lines = methods.table(task, {ROW: runs}).splitlines()
    assert lines[2] == "| the base |  | 0.50 | 0.70 | 0.10 | 0.20 |  |  |  |"
    assert lines[3] == f"| {ROW} | 0.1 | 0.60 (0.40 to 0.80) | 0.70 | 0.10 | 0.20 | 2 kB | 9 s | 600 MB |"


@pytest.mark.parametrize(
    "row", [row for row in methods.ROWS if row.recipe in ("lora", "pivotal")], ids=lambda row: row.name
)
def test_each_method_fits_the_layers_of_toybox(row: methods.Row, toybox: Family) -> None:
    """A row that cannot be put on would end the command after an hour of it."""
    words = shlex.split(row.settings.format(word="--word sks"))
    settings = config.parse(
        shelf.load(row.recipe).Config, ["--data", "d", "--output", "o", "--no-prior", *words], "train"
    )
    family = copy.copy(toybox)
    family.pipeline = copy.copy(toybox.pipeline)
    family.pipeline.unet = copy.deepcopy(toybox.pipeline.unet)
    adapters.adapt(family, settings.adapter, row.lr, None, 0)
    assert any(p.requires_grad for p in families.denoiser(family).parameters())


@pytest.mark.parametrize(
    ("words", "said"), [(["--rows", "LoRE"], "no such row"), (["--datasets", "no"], "no pictures of gizmo")]
)
def test_unknown_rows_and_pictures_are_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["toybox", "methods", str(tmp_path), *words])
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
