"""docs/clusters: the same command resumes. SLURM's script is run for real, on a queue of this machine's own, and Ray's
task where Ray is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_slurm
import numpy as np
import pytest
import ray_here
import yaml
from PIL import Image

from finetune import cli, config, loop, shelf

FOLDER = Path(__file__).parents[1] / "docs" / "clusters"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def words(model: Path, pictures: Path, output: Path, steps: int = 4) -> list[str]:
    given = ["lora", "--model", str(model), "--data", str(pictures), "--output", str(output), "--prompt", "sks"]
    return [*given, "--no-prior", "--lr", "1e-2", "--steps", str(steps), "--tracker", "none"]


def log(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_the_same_command_begins_goes_on_and_ends(
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["train", *words(tiny_models["sd"], pictures, tmp_path / "run"), "--resume-or-begin"]
    take = loop.Training._step

    def stopped(self: loop.Training) -> loop.Report:
        if self.done == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return take(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(loop.Training, "_step", stopped)
        cli.main(command)
    assert stop.value.code == 75
    cli.main(command)
    assert "goes on after step 2" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 0 and "is finished: nothing is left to do" in capsys.readouterr().err
    cli.main(["train", *words(tiny_models["sd"], pictures, tmp_path / "whole")])
    assert log(tmp_path / "run") == log(tmp_path / "whole")


def test_what_is_no_run_is_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *words(tmp_path, tmp_path, tmp_path / "run"), "--resume-or-begin"])
    assert stop.value.code == 2 and "there is something there already" in capsys.readouterr().err


@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_slurm_script_is_queued_again_and_the_same_command_finishes(
    tasks: int, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    slurm = f"#!{sys.executable}\n{Path(fake_slurm.__file__).read_text()}"
    finetune = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m finetune "$@"\n'
    for name, text in {"srun": slurm, "scontrol": slurm, "finetune": finetune}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": str(tasks)}
    job |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "QUEUE": str(tmp_path / "queue")}
    steps = 20  # the signal comes when the log tells of the first: time enough, also where much else runs
    command = ["bash", str(FOLDER / "train.sbatch"), *words(tiny_models["sd"], pictures, tmp_path / "run", steps)]
    limit = {"LIMIT": str(tmp_path / "run" / "log.jsonl")}
    first = subprocess.run(command, env=os.environ | job | limit, capture_output=True, text=True, timeout=300)
    assert first.returncode == 75, first.stderr[-3000:]
    assert (tmp_path / "queue").read_text() == f"{os.getpid()}\n"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "stopped"
    again = subprocess.run(command, env=os.environ | job, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    said = " ".join(again.stdout.split())
    assert "goes on after step" in said and f"{tasks} process(es)" in said
    assert [step for step, _ in log(tmp_path / "run")] == [*range(1, steps + 1)]
    assert (tmp_path / "run" / "adapter.safetensors").is_file()


def understood(command: list[str]) -> Any:
    """The settings of `finetune train RECIPE ...`, as the command line reads them."""
    assert command[:2] == ["finetune", "train"]
    recipe = shelf.load(command[2])
    return config.parse(recipe.Config, command[3:], "finetune train")


def test_the_kubernetes_job_gives_a_command_and_knows_its_statuses() -> None:
    claim, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    made = understood([*container["command"], *container["args"]])
    assert made.output.resume_or_begin and made.train.processes == 1
    rules = {tuple(rule["onExitCodes"]["values"]): rule["action"]
             for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule}  # fmt: skip
    assert rules == {(2,): "FailJob", (75,): "Ignore"}
    assert claim["metadata"]["name"] == "finetune-runs"


def test_the_spot_job_gives_a_command() -> None:
    task = yaml.safe_load((FOLDER / "sky.yaml").read_text())
    line = task["run"].replace("\\\n", " ").replace("$SKYPILOT_NUM_GPUS_PER_NODE", "1")
    made = understood(shlex.split(line))
    assert made.output.resume_or_begin and str(made.output.output).startswith("/runs/")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]


def test_the_ray_task_gives_a_command_and_knows_its_statuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, which is told how often a task is begun again, and after what."""
    told: dict[str, Any] = {}
    plain = SimpleNamespace(remote=lambda **options: told.update(options) or (lambda task: task))
    monkeypatch.setitem(sys.modules, "ray", plain)
    job = runpy.run_path(str(FOLDER / "ray_job.py"))
    statuses, given = iter([0, 1, 2, 75]), list[list[str]]()

    def ended(words: list[str]) -> None:
        given.append(words)
        raise SystemExit(next(statuses))

    monkeypatch.setattr(cli, "main", ended)
    page = (FOLDER.parent / "clusters.md").read_text()
    line = page[page.index("ray job submit") :].partition("\n```")[0].replace("\\\n", " ")
    words = shlex.split(line)
    words = words[words.index("docs/clusters/ray_job.py") + 1 :]
    assert [job["train"](words) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(job["Moved"]):
        job["train"](words)
    made = understood(["finetune", *given[0]])
    assert made.output.resume_or_begin and made.train.processes == 1 and made.output.output == Path("/runs/dog")
    assert told == {"num_gpus": 1, "max_retries": 20, "retry_exceptions": [job["Moved"]]}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install ray")
def test_rays_task_goes_on_after_its_worker_was_killed_and_after_it_was_stopped(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    given = [*words(tiny_models["sd"], pictures, tmp_path / "run", 6), "--checkpoint-every", "1"]
    disturbed = [sys.executable, ray_here.__file__, "SIGKILL,SIGTERM", *given]
    done = subprocess.run(disturbed, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("SIGKILL in step") == 1 and done.stdout.count("goes on after step") == 2
    cli.main(["train", *words(tiny_models["sd"], pictures, tmp_path / "whole", 6)])
    one, other = ((tmp_path / run / "adapter.safetensors").read_bytes() for run in ("run", "whole"))
    assert one == other and log(tmp_path / "run") == log(tmp_path / "whole")
