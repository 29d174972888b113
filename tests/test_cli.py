"""The command line: answers at once, says faults in a paragraph, runs shipped recipes and the user's own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import __version__, cli, config, shelf

PAGE = '''
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Config:
    """A page of one's own."""
    output: Path
    """Where it goes."""
    steps: int = 3
    """How many."""

def main(config):
    config.output.write_text(f"{config.steps} of them")
'''


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "my_recipe.py"
    file.write_text(PAGE)
    return file


def run(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetune", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})


def stopped(*words: str | Path) -> int | str | None:
    """The exit status of a command that does not end well."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in words])
    return caught.value.code


ANSWERED_AT_ONCE = [
    ["--help"],
    ["train", "--help"],
    ["recipes"],
    *([*verb.split(), "--help"] for verb in cli.VERBS if verb != "train"),
    *(["train", name, "--help"] for name in shelf.recipes()),
    ["train", "lora", "--data", "d", "--output", "o", "--rnk", "8"],
]


@pytest.mark.parametrize("words", ANSWERED_AT_ONCE, ids=" ".join)
def test_questions_and_slips_are_answered_before_anything_heavy_is_imported(words: list[str]) -> None:
    code = (
        "import sys\nfrom finetune.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    print('imported:', *{'torch', 'diffusers', 'transformers', 'PIL', 'numpy'} & {*sys.modules})"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.rstrip().splitlines()[-1] == "imported:", done.stderr
    assert done.returncode == (2 if "--rnk" in words else 0)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0, "seconds of the processor"


def test_a_training_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    """PyTorch's compiler (0.9 s), and what else is installed beside: statistics, tables, plots, other data sets."""
    unused = ["torch._inductor.compile_fx", "networkx", "scipy.stats._stats_py", "pandas", "datasets", "matplotlib"]
    code = (
        "import sys\nfrom finetune.cli import main\nmain(sys.argv[2:])\n"
        "print('imported:', *{*sys.argv[1].split()} & {*sys.modules})"
    )
    words = ["train", "lora", "--config", "lora-toybox-subject", "--data", str(shelf.datasets() / "gizmo" / "pictures")]
    words += ["--prompt", "a photo of zxq", "--no-prior", "--output", str(tmp_path / "run"), "--steps", "1"]
    words += ["--measure", "off", "--sample-every", "0", "--cache", str(tmp_path / "cache")]
    done = subprocess.run([sys.executable, "-c", code, " ".join(unused), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().splitlines()[-1] == "imported:"


def test_a_misspelt_flag_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped("train", "lora", "--data", "d", "--output", "o", "--lerning-rank", "8") == 2
    assert stopped("train", "lora", "--data", "d", "--output", "o", "--sample-promps", "a toy") == 2
    assert "--sample-prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "lora"], "finetune trian: there is no such command. Did you mean train?"),
        (["toybox"], "finetune toybox: which one?"),
        (["train"], "finetune train: which recipe?"),
        (["train", "lara"], "lara: there is no such recipe. Did you mean lora? A file of your own: ./lara.py"),
        (["train", "./gone.py"], "./gone.py: there is no such file. `finetune copy lora gone.py`"),
        (["train", "lora", "--config", "lora-sd15-subjct"], "no shipped settings of that name. Did you mean"),
        (["copy", "lroa", "a.py"], "lroa: there is nothing of that name to copy. Did you mean lora?"),
        (["copy", "lora", "a.txt"], "a.txt: lora is a .py file: name the copy so, e.g. a.py"),
        (["copy", "lora", "/nowhere/at/all.py"], "/nowhere/at/all.py: cannot be written"),
    ],
)
def test_a_wrong_name_is_said_with_the_nearest(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert stopped(*words) == 2
    assert said in capsys.readouterr().err
    assert not [*tmp_path.glob("*.*")], "nothing is made"


def test_a_fault_ends_with_a_paragraph_and_its_status(tmp_path: Path) -> None:
    done = run("train", "lora", "--data", tmp_path / "gone", "--output", tmp_path / "run", "--no-prior")
    assert done.returncode == 2
    assert "gone" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_fault_shows_where_it_came_from_when_asked() -> None:
    done = run("train", "lara", FINETUNE_DEBUG="1")
    assert "Traceback" in done.stderr and "Did you mean lora?" in done.stderr


def test_ctrl_c_ends_with_130(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page.write_text(PAGE + "    raise KeyboardInterrupt\n")
    assert stopped("train", page, "--output", page.parent / "out") == 130
    assert capsys.readouterr().err.strip() == "Stopped."


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"finetune {__version__}\n"


def test_recipes_lists_every_recipe_and_all_settings(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["recipes"])
    said = capsys.readouterr().out
    for name, path in {**shelf.recipes(), **shelf.settings()}.items():
        assert len(shelf.describe(path)) > 10
        assert f"  {name} " in said and shelf.describe(path) in said


def test_a_recipe_of_ones_own_runs(page: Path) -> None:
    cli.main(["train", str(page), "--output", str(page.parent / "out"), "--steps", "5"])
    assert (page.parent / "out").read_text().startswith("5 of")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "does not define Config and main"),
        (PAGE.replace("def main", "def start"), "does not define main"),
        ("def main(config:\n", "line 1: not valid Python"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(
    page: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page.write_text(text)
    assert stopped("train", page) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", shelf.recipes())
def test_a_copied_recipe_is_whole_and_never_written_over(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "my_recipe.py"
    cli.main(["copy", name, str(copy)])
    assert copy.read_text() == shelf.recipes()[name].read_text()
    mine = shelf.load(str(copy))
    made = config.parse(mine.Config, ["--output", "o"], "finetune")
    assert config.asdict(made) == config.asdict(config.parse(shelf.load(name).Config, ["--output", "o"], "finetune"))
    copy.write_text("mine")
    assert stopped("copy", name, copy) == 2
    assert copy.read_text() == "mine" and "already" in capsys.readouterr().err


def test_settings_are_copied_under_either_name(tmp_path: Path) -> None:
    name = next(iter(shelf.settings()))
    cli.main(["copy", name, str(tmp_path / "a.toml")])
    cli.main(["copy", f"{name}.toml", str(tmp_path / "b.toml")])
    assert (tmp_path / "a.toml").read_bytes() == (tmp_path / "b.toml").read_bytes()


@pytest.mark.parametrize("name", shelf.settings())
def test_ready_settings_are_understood_by_their_recipe(name: str) -> None:
    recipe = config.recipe_of(shelf.settings()[name])
    assert recipe and name.startswith(f"{recipe}-")
    words = ["--config", name, "--output", "o"]
    made = config.parse(shelf.load(recipe).Config, words, f"finetune train {recipe}")
    assert made.model.model != "toybox" or "toybox" in name


def test_settings_alone_name_their_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text('recipe = "lora"\n[data]\ndata = "no-such-folder"\n[prior]\nprior = false\n')
    assert stopped("train", "--config", tmp_path / "run.toml", "--output", tmp_path / "out") == 2
    assert "no-such-folder" in capsys.readouterr().err


def test_accelerate_launches_it_with_the_shipped_config(page: Path) -> None:
    page.write_text(PAGE.replace("of them", "on {Accelerator().num_processes}").replace(
        "def main", "from accelerate import Accelerator\ndef main"))  # fmt: skip
    launcher = Path(__file__).parents[1] / "accelerate_config.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launcher, "-m", "finetune", "train"]
    subprocess.run(
        [*map(str, command), str(page), "--output", str(page.parent / "out")], check=True, capture_output=True
    )
    assert (page.parent / "out").read_text() == "3 on 1"
