"""Measuring while training, through the command line, on runs of tiny models that toybox's judge looks at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_judges
from safetensors.torch import load_file
from test_evaluate import noise

from finetune import checkpoints, cli, ledger, loop
from finetune.evaluation import drawing, during, verdict
from finetune.evaluation.tables import State, Table

STEPS = 6
FREE = ("--optimizer", "schedulefree")
ON = ("--measure", "toybox", "--measure-steps", "1", "--measure-batch", "2")
ON += ("--measure-prompts", "a photo of sks dog", "a red sks dog")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise(tmp_path_factory.mktemp("data") / "pictures", 3)


@pytest.fixture
def train(tiny_models: dict[str, Path], pictures: Path) -> Callable[..., None]:
    def begin(recipe: str, run: Path, *words: str, steps: int = STEPS) -> None:
        given = ["--model", str(tiny_models["sd"]), "--data", str(pictures), "--output", str(run), "--tracker", "none"]
        given += ["--prompt", "a photo of sks dog", "--no-prior", "--class-prompt", "a photo of a dog", "--lr", "1e-2"]
        cli.main(["train", recipe, *given, "--steps", str(steps), "--checkpoint-every", "2", *words])

    return begin


@pytest.fixture(autouse=True)
def afford(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models take their steps so fast that hardly a picture is paid for: time is no matter here."""
    monkeypatch.setattr(during, "affordable", lambda *given: True)


def table(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "measured" / "table.json").read_text()))


def names(run: Path) -> list[str]:
    return [state["name"] for state in table(run)["states"]]


def product(run: Path, recipe: str = "lora") -> bytes:
    file = "adapter.safetensors" if recipe == "lora" else "model/unet/diffusion_pytorch_model.safetensors"
    return (run / file).read_bytes()


def choose(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the rule choose this step, once it was measured, and the first one before."""

    def best(table: Table) -> State:
        return next((state for state in table.trained if state.step == step), table.trained[0])

    monkeypatch.setattr(verdict, "best", best)


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("lora", ["--dropout", "0.3", "--text-encoder-lr", "1e-3", "--ema", "0.9"]),
        ("lora", [*FREE]),
        ("lora", ["--method", "ia3"]),
        ("dreambooth", ["--validation", "0.3"]),
    ],
)
def test_the_same_is_trained_with_it_and_without(
    recipe: str, flags: list[str], train: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on, off = tmp_path / "on" / "run", tmp_path / "off" / "run"
    train(recipe, on, *flags, *ON)
    said = " ".join(capsys.readouterr().out.split())
    train(recipe, off, *flags, "--measure", "off")
    assert product(on, recipe) == product(off, recipe)
    losses = [[line["loss"] for line in ledger.logged(run)] for run in (on, off)]
    assert losses[0] == losses[1]
    assert not (off / "measured").exists() and ledger.read(off).verdict == ""  # type: ignore[union-attr]

    told = table(on)
    assert names(on) == ["base", "step-000002", "step-000004", "step-000006"]
    assert all(set(state["figures"]) >= {"likeness", "fidelity", "class drift", "copies"} for state in told["states"])
    assert (told["states"][1]["validation"] is not None) == ("--validation" in flags)
    assert len([*(on / "measured" / "step-000004").glob("*.png")]) == 2 + 2
    assert (
        f"Verdict on step-000006: {told['verdict']['word']}: " in said and "Measured 3 states and the base in" in said
    )
    entry = ledger.read(on)
    assert entry is not None and entry.verdict == told["verdict"]["word"] and entry.reason in said
    assert entry.best == int(told["verdict"]["best"][5:])
    assert (on / "best" / ("adapter.safetensors" if recipe == "lora" else "model")).exists()


@pytest.mark.parametrize(
    ("recipe", "form", "flags"),
    [
        ("lora", "diffusers", ["--ema", "0.5"]),
        ("lora", "diffusers", ["--init", "pissa", "--rank", "4", "--lora-plus-ratio", "4", *FREE]),
        ("lora", "peft", ["--method", "oft", "--rank", "4"]),
        ("dreambooth", "merged", ["--ema", "0.5"]),
    ],
)  # fmt: skip
def test_the_best_is_kept_and_written(
    recipe: str, form: str, flags: list[str], train: Callable[..., None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """An earlier state: its checkpoint outlives keep_last, best/ holds what a run of so many steps ends with."""
    choose(monkeypatch, 2)
    run, short = tmp_path / "run", tmp_path / "short"
    train(recipe, run, *ON, "--keep-last", "1", *flags)
    assert sorted(os.listdir(run / "checkpoints")) == ["step-000002", "step-000006"]
    train(recipe, short, *flags, steps=2)
    name = "adapter.safetensors" if recipe == "lora" else "model/unet/diffusion_pytorch_model.safetensors"
    best, ended, last = (load_file(place / name) for place in (run / "best", short, run))
    assert best.keys() == ended.keys()
    assert all(best[key].equal(ended[key]) for key in best)
    assert not all(best[key].equal(last[key]) for key in best)
    said = " ".join(capsys.readouterr().out.split())
    assert "best: step 2, in" in said

    cli.main(["runs", str(run)])
    assert table(run)["verdict"]["word"] in capsys.readouterr().out
    cli.main(["inspect", str(run / "best" / name.split("/")[0])])
    cli.main(
        ["export", str(run), "--step", "best", "--format", form, "--dtype", "fp32", "--output", str(tmp_path / "x")]
    )
    assert "of step-000002, written" in capsys.readouterr().out


def test_where_the_last_is_the_best_its_file_has_two_names(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, STEPS)
    run = tmp_path / "run"
    train("dreambooth", run, *ON)
    one, other = (run / place / "unet" / "diffusion_pytorch_model.safetensors" for place in ("model", "best/model"))
    assert one.samefile(other) and (run / "best" / "model" / "model_index.json").is_file()


@pytest.mark.parametrize("recipe", ["lora", "dreambooth"])
def test_a_stopped_run_goes_on_with_its_table(
    recipe: str, train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A signal while the second checkpoint is measured, after one picture: nothing is drawn twice, all is the same."""
    whole, run = tmp_path / "whole" / "run", tmp_path / "stopped" / "run"
    train(recipe, whole, *ON)
    drawn: list[Path] = []
    draw = drawing._draw

    def watched(family: Any, folder: Path, batch: Any, *given: Any) -> None:
        draw(family, folder, batch, *given)
        drawn.extend(folder / one.file for one in batch)
        if len(drawn) == 2 * 4 + 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(drawing, "_draw", watched)
    with pytest.raises(SystemExit) as stop:
        train(recipe, run, *ON)
    assert stop.value.code == 75 and "after step 4 of 6; the state is kept" in " ".join(capsys.readouterr().err.split())
    assert names(run) == ["base", "step-000002"]
    entry = ledger.read(run)
    assert entry is not None and (entry.state, entry.step, entry.best) == ("stopped", 4, 2)
    cli.main(["train", "--output", str(run), "--resume"])
    assert len(drawn) == len(set(drawn)) == 4 * 4
    assert table(run) == table(whole) and product(run, recipe) == product(whole, recipe)


def test_what_was_measured_after_the_checkpoint_is_measured_again(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint is lost; and a loss that is not finite, from which the run goes back."""
    whole, run = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    train("lora", whole, *ON)
    take = loop.Training._step

    def killed(self: loop.Training) -> loop.Report:
        if self.done == 5:
            raise KeyboardInterrupt
        return take(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop.Training, "_step", killed)
        train("lora", run, *ON)
    assert names(run)[-1] == "step-000004"
    (run / checkpoints.name(4) / "manifest.json").unlink()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(loop.Training, "_step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        cli.main(["train", "--output", str(run), "--resume"])
    assert names(run) == ["base", "step-000002"] and not (run / "measured" / "step-000004").exists()
    failed: list[int] = []

    def infinite(self: loop.Training) -> loop.Report:
        if self.done == 5 and not failed:
            failed.append(1)
            raise loop.NotFinite("step 6: the loss is nan")
        return take(self)

    monkeypatch.setattr(loop.Training, "_step", infinite)
    cli.main(["train", "--output", str(run), "--resume", "--on-nan", "rollback"])
    assert names(run) == names(whole) and failed
    assert table(run)["states"][:3] == table(whole)["states"][:3]


def test_patience_ends_the_run(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two checkpoints since the best one: finished after step 6 of 12, also where it was stopped on the way."""
    choose(monkeypatch, 2)
    run, stopped = tmp_path / "a" / "run", tmp_path / "b" / "run"
    words = [*ON, "--patience", "2"]
    train("lora", run, *words, steps=12)
    said = " ".join(capsys.readouterr().out.split())
    assert "ends after step 6 of 12: --patience" in said and "best: step 2" in said
    entry = ledger.read(run)
    assert entry is not None and (entry.state, entry.step, entry.steps) == ("finished", 6, 12)
    assert names(run)[-1] == "step-000006"

    save, asked = ledger.write, []

    def killed(folder: Path, entry: ledger.Entry, **changes: Any) -> ledger.Entry:
        """Once the last state is measured, before anything is exported."""
        entry = save(folder, entry, **changes)
        if "best" in changes and entry.step == 6 and not asked:
            asked.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return entry

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(ledger, "write", killed)
        train("lora", stopped, *words, steps=12)
    assert stop.value.code == 75
    cli.main(["train", "--output", str(stopped), "--resume"])
    assert ledger.logged(stopped)[-1]["step"] == 6 and product(stopped) == product(run)
    assert table(stopped) == table(run)


def test_checkpoints_are_passed_over_for_want_of_time(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(during, "affordable", lambda done, *given: done == 4)
    run = tmp_path / "run"
    train("lora", run, *ON, steps=8)
    assert names(run) == ["base", "step-000004", "step-000008"]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("not measured, it would take more than 10% of the time") == 1
    assert "2 checkpoints were passed over" in said


@pytest.mark.parametrize(("each", "share", "measured"), [(2.0, 0.1, 7), (4.0, 0.1, 2), (8.0, 0.1, 0), (4.0, 0.05, 0)])
def test_the_share_holds(each: float, share: float, measured: int, real_affordable: Callable[..., bool]) -> None:
    """200 steps of a second: base and last state, and what is left of the share spread over ten checkpoints."""
    spent = {"base": each}
    for done in range(20, 200, 20):
        if real_affordable(done, 200, float(done), spent, share):
            spent[f"step-{done}"] = each
    assert len(spent) - 1 == measured
    assert sum(spent.values()) + each <= max(200 * share, 2 * each)


@pytest.fixture
def real_affordable() -> Callable[..., bool]:
    return AFFORDABLE


AFFORDABLE = during.affordable


def test_what_goes_wrong_in_measuring_costs_no_training(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add, run, off = during.Record.add, tmp_path / "on" / "run", tmp_path / "off" / "run"

    def failing(self: during.Record, state: State, *given: Any) -> None:
        if state.step == 4:
            raise RuntimeError("CUDA out of memory")
        add(self, state, *given)

    monkeypatch.setattr(during.Record, "add", failing)
    train("lora", run, *ON)
    said = " ".join(capsys.readouterr().out.split())
    assert "step 4: measuring failed, and is given up; the training goes on (CUDA out of memory)" in said
    train("lora", off, "--measure", "off")
    assert product(run) == product(off) and names(run) == ["base", "step-000002"]
    assert ledger.read(run).state == "finished"  # type: ignore[union-attr]


def test_a_full_disk_ends_it_as_anywhere(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(drawing, "save_png", full)
        train("lora", run, *ON)
    assert stop.value.code == 1 and "the disk is full" in capsys.readouterr().err
    cli.main(["train", "--output", str(run), "--resume"])
    assert names(run)[-1] == "step-000006"


def test_published_models_measure_too(train: Callable[..., None], tmp_path: Path) -> None:
    """Real classes of DINO, CLIP and LPIPS; prompts of one's own; two pictures of each."""
    places = [
        word
        for name, place in tiny_judges.save(tmp_path).items()
        if name != "dinov2"
        for word in (f"--{name}", str(place))
    ]
    words = ["--measure", "published", *places, "--measure-steps", "1", "--measure-count", "2"]
    train("lora", tmp_path / "run", *words, "--measure-prompts", "a sks dog on a sofa")
    told = table(tmp_path / "run")
    assert told["states"][-1]["figures"]["likeness"]["title"] == "DINO"
    assert {file.name for file in (tmp_path / "run" / "measured" / "step-000006").glob("*.png")} == {
        *(f"subject-01-seed{seed}.png" for seed in range(2)),
        *(f"class-01-seed{seed}.png" for seed in range(4)),
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--patience", "2"], "--patience 2: nothing is measured"),
        (["--patience", "-1"], "--patience -1: 0 or more"),
        (["--measure", "toybox", "--measure-share", "0.2"], "--measure-share 0.2: more than 0, at most 0.1"),
        (["--measure", "toybox", "--measure-share", "0"], "--measure-share 0: more than 0"),
        (["--measure", "toybox", "--measure-count", "0"], "--measure-count 0: at least 1"),
        (["--measure-steps", "0"], "--measure-steps 0: at least 1"),
        (["--measure", "someone"], "someone"),
        (["--measure", "published", "--dino", "no/such-model"], "this metric model cannot be loaded"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(
    words: list[str], said: str, train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("finetune.load", lambda *given: pytest.fail("a model was loaded"), raising=False)
    with pytest.raises(SystemExit) as stop:
        train("lora", tmp_path / "run", *words)
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "engine"), [("lora", "ddp"), ("dreambooth", "fsdp")])
def test_two_processes_measure_once_and_end_together(
    recipe: str, engine: str, pictures: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """The leading one measures, with all weights where they are shared out. Patience ends both."""
    run = tmp_path / "run"
    words = ["train", recipe, "--model", str(tiny_models["sd"]), "--data", str(pictures), "--output", str(run)]
    words += ["--prompt", "a photo of sks dog", "--no-prior", "--lr", "1e-6", "--tracker", "none", "--steps", "8"]
    words += ["--checkpoint-every", "2", "--patience", "2", "--processes", "2", "--engine", engine, *ON]
    script = [str(Path(tiny_judges.__file__).with_name("measuring.py")), engine]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *script, *words]
    done = subprocess.run(launch, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    entry = ledger.read(run)
    assert entry is not None and (entry.state, entry.step, entry.best) == ("finished", 6, 2)
    assert names(run) == ["base", "step-000002", "step-000004", "step-000006"]
    assert done.stdout.count("Verdict on step-000006") == 1
    assert (run / "best").is_dir()


def test_without_words_for_what_is_learned_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nobody asked for it, a line says so; where somebody did, it is refused."""
    folder = noise(tmp_path / "pictures", 2)
    for number, caption in enumerate(("red waves", "green hills")):
        (folder / f"{number}.txt").write_text(caption)
    words = ["train", "lora", "--data", str(folder), "--output", str(tmp_path / "run"), "--no-prior", "--steps", "1"]
    words += ["--tracker", "none", "--rank", "1"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--measure", "toybox"])
    assert stop.value.code == 2 and "which words call what was learned?" in " ".join(capsys.readouterr().err.split())
    cli.main(words)
    assert "nothing is measured while training: which words" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run" / "measured").exists() and not (tmp_path / "run" / "best").exists()


def test_a_folder_that_a_killed_run_left_half_written_is_no_obstacle(
    train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a model was exported on the way and before its checkpoint: it is written again."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("finetune.keeping.Keeper.keep", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        train("dreambooth", run, "--save-every", "2", "--measure", "off")
    assert (run / "model-000002").is_dir()
    cli.main(["train", "--output", str(run), "--resume"])
    assert (run / "model").is_dir() and (run / "model-000004").is_dir()
