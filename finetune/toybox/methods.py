"""Measures the methods beside each other on toybox: each learns the same subject and the same style, over seeds.

    OMP_NUM_THREADS=1 finetune toybox methods OUT --docs docs/methods.md --picture docs/methods.png

is how the tables there came about. Every training and every evaluation is a command line of its own, one after the
other; what is finished stays in OUT and is not done again, so that the same command goes on after a stop, and after a
line of `ROWS` was added or changed. A row is told when all its seeds are there.

**What is the same for all**: pictures, class pictures, steps, batch, base, the text encoder (frozen), and the seeds,
prompts and pictures that they are judged by, which have no part in the training. **What is not**: the rate. Each row
has one that suits it, chosen on gizmo at seed 9, which is not told of.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from finetune import disk, signals
from finetune.errors import Failure, Fault
from finetune.evaluation.tables import BASE, EVALUATED, FILE, RESULT, State, from_json, plain

MARKS = "<!-- measured on toybox: written by finetune toybox methods -->", "<!-- /measured on toybox -->"
TRAINED, JUDGED = "trained.json", "judged.json"
"""What is kept of a run's training and evaluation, once they are whole"""
TRAIN = "--sample-guidance 2 --checkpoint-every 0 --measure off --tracker none --no-report"
FROZEN = "--text-encoder-lr None"
EVALUATE = "--step result --steps 10 --seed 1000"
FIRST, COLOURS = 1000, 64
"""The seed there, and how many colours the picture of the pictures has"""


@dataclass(frozen=True)
class Row:
    name: str
    """What the tables call it"""
    recipe: str
    lr: float
    settings: str = FROZEN
    """What else it says on the command line; `{word}` stands for what its task says of a new word"""
    prior: bool = True
    """Whether its recipe preserves a prior"""


ROWS = (
    Row("LoRA, rank 16", "lora", 0.005, f"{FROZEN} --rank 16"),
    Row("LoRA, rank 16, convolutions 8", "lora", 0.002, f"{FROZEN} --rank 16 --conv-rank 8"),
    Row("LoRA, rank 16, PiSSA", "lora", 0.002, f"{FROZEN} --rank 16 --init pissa"),
    Row("DoRA, rank 16", "lora", 0.005, f"{FROZEN} --method dora --rank 16"),
    Row("LoHa, rank 8", "lora", 0.01, f"{FROZEN} --method loha --rank 8"),
    Row("LoKr, rank 16", "lora", 0.02, f"{FROZEN} --method lokr --rank 16"),
    Row("OFT, blocks of 16", "lora", 0.003, f"{FROZEN} --method oft --rank 16"),
    Row("BOFT, blocks of 4, 2 butterflies", "lora", 0.003, f"{FROZEN} --method boft --rank 4 --butterflies 2"),
    Row("(IA)3", "lora", 0.1, f"{FROZEN} --method ia3"),
    Row("all of the UNet", "dreambooth", 0.0003),
    Row("its attention", "dreambooth", 0.001, f"{FROZEN} --parts attention"),
    Row("its keys and values of the text", "dreambooth", 0.003, f"{FROZEN} --parts kv"),
    Row("its norms", "dreambooth", 0.01, f"{FROZEN} --parts norm"),
    Row("textual inversion, 4 vectors", "textual_inversion", 0.003, "{word} --vectors 4", prior=False),
    Row("pivotal tuning, rank 16", "pivotal", 0.005, f"{FROZEN} {{word}} --vectors 4 --word-lr 0.003 --rank 16"),
)
"""Rates from seed 9: LoRA's loss is higher at two fifths and at twice its rate, OFT's and (IA)3's at three times. BOFT
has OFT's rate. A word's likeness there is .54 at .003, .45 at .01; pivotal tuning has this rate and LoRA's."""


@dataclass(frozen=True)
class Task:
    """What is learned, and how it is judged."""

    name: str
    """Of the data set"""
    kind: str
    steps: int
    train: str
    prior: str
    """Of recipes that preserve one"""
    word: str
    """Of recipes that teach a new word"""
    protocol: str
    apart: str
    """What the table calls its class drift"""


CLASSES = "--class-images 24 --class-steps 20 --class-guidance 4 --class-prompt"
TASKS = (
    Task("gizmo", "subject", 150, "--batch-size 2", f"{CLASSES} 'a photo of a toy'",
         "--word sks --init-words toy", "short", "class drift"),
    Task(
        "neon", "style", 60, "--batch-size 2",
        f"{CLASSES} 'a photo of a house' 'a cartoon of a cat' 'a photo of a rocket in a meadow' "
        "'a cartoon of a mushroom under water'",
        "--trigger glow --template '{caption} {trigger}' --init-words cartoon", "style", "leak into other prompts",
    ),
)  # fmt: skip
"""The style's class are other pictures: without, toybox draws all in neon before it draws neon well. Its captions say
"neon", which toybox's text encoder knows: the word that it is taught stands behind them, "a neon sign of a car glow".
In front of them it drowned what they show (pivotal tuning at seed 9: prompt score .10 for .47), as CLIP reads from left
to right."""
WARMING = Row("warm", "lora", 0.0001)
"""A training of one step, after which class pictures are drawn and pictures encoded: no row pays for that"""
SHOWN = {"gizmo": ("subject-01", "subject-03", "class-01"), "neon": ("subject-01", "subject-03", "unrelated-01")}
"""Of the first seed: prompts of each task, and what its class, or another prompt, became"""


@dataclass(frozen=True)
class Config:
    """Train every method on toybox, a subject and a style, over several seeds; measure each and tell it in tables."""

    output: Positional[Path]
    """Folder for the runs, and for table.json and table.md. What is finished there is kept."""
    datasets: Path = Path("datasets")
    """Folder of gizmo and neon."""
    rows: tuple[str, ...] = ()
    """Train only these rows, by their names. Default: all."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of the trainings."""
    steps: int | None = None
    """Another number of steps than that of the tables, to try it out."""
    count: int = 2
    """Pictures of each prompt that are judged."""
    docs: Path | None = None
    """A page whose tables are rewritten, between its marks."""
    picture: Path | None = None
    """Where a few pictures of each method go, side by side."""


@dataclass(frozen=True)
class Run:
    """One training of a row: what it took, and what came of it."""

    seconds: float
    """Processor time of the whole command"""
    memory: int
    """Bytes: the most that it held at once"""
    size: int
    """Bytes of the file or folder that it wrote"""
    figures: dict[str, float]
    base: dict[str, float]


Tables = Mapping[str, Mapping[str, Sequence[Run]]]
"""By task and row: a run of each seed"""


def main(config: Config) -> None:
    rows = _chosen(config.rows)
    for task in TASKS:
        if not (config.datasets / task.name / "pictures").is_dir():
            raise Fault(f"--datasets {config.datasets}: no pictures of {task.name}. Name the folder of the data sets.")
    for row in rows:
        for task in TASKS:
            for seed in config.seeds:
                _train(config, WARMING, task, seed, 1)
                _train(config, row, task, seed, config.steps or task.steps)
                _evaluate(config, row, task, seed)
        _tell(config)
    print((config.output / "table.md").read_text(encoding="utf-8"), end="")


def _chosen(names: Sequence[str]) -> list[Row]:
    known = {row.name: row for row in ROWS}
    if unknown := [name for name in names if name not in known]:
        raise Fault(f"--rows {unknown[0]}: there is no such row, but {'; '.join(known)}.")
    return [known[name] for name in names] if names else [*ROWS]


def _place(config: Config, row: Row, task: Task, seed: int) -> Path:
    name = "-".join("".join(one if one.isalnum() else " " for one in row.name.lower()).split())
    return config.output / "runs" / task.name / f"{name}-{seed}"


def _training(row: Row, task: Task, seed: int, steps: int) -> list[str]:
    """What `finetune train` is told beside its folders: what is the same for all, then the task's, then the row's."""
    prior = task.prior if row.prior else ""
    own = row.settings.format(word=task.word)
    told = f"{TRAIN} --seed {seed} --steps {steps} {task.train} {prior} --lr {row.lr:g} {own}"
    return [row.recipe, *shlex.split(told)]


def _judging(config: Config, task: Task) -> list[str]:
    return shlex.split(f"{EVALUATE} --count {config.count} --protocol {task.protocol}")


def _train(config: Config, row: Row, task: Task, seed: int, steps: int) -> None:
    """From the beginning, unless it is there: of a training that was gone on with nobody knows the time."""
    place, asked = _place(config, row, task, seed), _training(row, task, seed, steps)
    if _done(place / TRAINED, asked):
        return
    shutil.rmtree(place, ignore_errors=True)
    folders = ["--data", str(config.datasets / task.name / "pictures"), "--output", str(place)]
    used = _run(config, ["train", *asked, *folders], place)
    took = {"seconds": used.ru_utime + used.ru_stime, "memory": used.ru_maxrss * 1024}
    disk.write_text(place / TRAINED, json.dumps({"asked": asked, **took}, indent=1) + "\n")


def _evaluate(config: Config, row: Row, task: Task, seed: int) -> None:
    """The base draws the same for all runs of a task: what one of them has is taken."""
    place, asked = _place(config, row, task, seed), _judging(config, task)
    if _done(place / JUDGED, asked):
        return
    for base in sorted(place.parent.glob(f"*/{EVALUATED}/{BASE}"))[:1]:
        if not (place / EVALUATED / BASE).exists():
            shutil.copytree(base, place / EVALUATED / BASE)
    references = config.datasets / task.name / "references"
    _run(config, ["evaluate", str(place), *asked, "--references", str(references)], place)
    disk.write_text(place / JUDGED, json.dumps({"asked": asked}, indent=1) + "\n")


def _done(record: Path, asked: Sequence[str]) -> bool:
    """Whether it was, and as it is asked for now."""
    return record.is_file() and json.loads(record.read_text(encoding="utf-8"))["asked"] == asked


def _run(config: Config, words: Sequence[str], place: Path) -> Any:
    """What the command used, as `os.wait4` tells it. A signal is heeded before the next one.

    Nothing heavy is loaded here: Linux counts what a process held when it started another as that one's peak too.
    """
    signals.heed()
    print(f"{place.name}: finetune {words[0]}", file=sys.stderr, flush=True)
    log = place.with_name(f"{place.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    there = {**os.environ, "FINETUNE_CACHE": str((config.output / "cache").resolve())}
    with log.open("ab") as file:
        child = subprocess.Popen([sys.executable, "-m", "finetune", *words], stdout=file, stderr=file, env=there)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        signals.heed()  # which may have ended it too
        raise Failure(f"finetune {' '.join(words)}: ended with status {child.returncode}. What it said is in {log}.")
    return used


def _tell(config: Config) -> None:
    """Write the tables of all rows that are whole, and the page and the picture that are wanted."""
    found = {task.name: {row.name: runs for row in ROWS if (runs := _runs(config, row, task))} for task in TASKS}
    told = {task: {row: [asdict(run) for run in runs] for row, runs in rows.items()} for task, rows in found.items()}
    disk.write_text(config.output / FILE, json.dumps(plain({"seeds": config.seeds, **told}), indent=1) + "\n")
    text = "\n".join(table(task, found[task.name]) for task in TASKS)
    disk.write_text(config.output / "table.md", text)
    if config.docs is not None:
        before, rest = config.docs.read_text(encoding="utf-8").split(MARKS[0])
        disk.write_text(config.docs, f"{before}{MARKS[0]}\n{text}{MARKS[1]}{rest.split(MARKS[1])[1]}")
    if config.picture is not None:
        _draw(config, [row for row in ROWS if all(row.name in rows for rows in found.values())], config.picture)


def _runs(config: Config, row: Row, task: Task) -> list[Run]:
    """Of each seed, in their order; none where one is missing."""
    places = {seed: _place(config, row, task, seed) for seed in config.seeds}
    steps, judging = config.steps or task.steps, _judging(config, task)
    whole = all(
        _done(place / TRAINED, _training(row, task, seed, steps)) and _done(place / JUDGED, judging)
        for seed, place in places.items()
    )
    return [_read(place) for place in places.values()] if whole else []


def _read(place: Path) -> Run:
    record = json.loads((place / TRAINED).read_text(encoding="utf-8"))
    measured = from_json((place / EVALUATED / FILE).read_text(encoding="utf-8"))
    files = [*place.glob("*.safetensors"), *(place / "model").rglob("*")]  # an adapter, words; a whole model
    size = sum(file.stat().st_size for file in files if file.is_file())
    return Run(record["seconds"], record["memory"], size, _values(measured.trained[-1]), _values(measured.base))


def _values(state: State) -> dict[str, float]:
    return {name: figure.value for name, figure in state.figures.items()}


def table(task: Task, rows: Mapping[str, Sequence[Run]]) -> str:
    """Means over the seeds, with the least and the most, as Markdown; the base first."""
    measures = ("likeness", "fidelity", "class drift", "drift")
    head = [f"{task.name}, a {task.kind}", "rate", "likeness", "prompt score", task.apart, "drift", "file",
            "processor time", "peak memory"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for base in [next(iter(rows.values()))[0].base] if rows else []:
        told = [f"{base[one]:.2f}" if one in base else "" for one in measures]
        lines.append(["the base", "", *told, "", "", ""])
    rates = {row.name: f"{row.lr:g}" for row in ROWS}
    for name, runs in rows.items():
        figures = [_spread([run.figures[one] for run in runs], ".2f") for one in measures]
        size, memory = max(run.size for run in runs) / 1e3, max(run.memory for run in runs) / 1e6
        took = _spread([run.seconds for run in runs], ".0f")
        lines.append([name, rates[name], *figures, f"{size:,.0f} kB", f"{took} s", f"{memory:.0f} MB"])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _spread(values: Sequence[float], how: str) -> str:
    low, high = f"{min(values):{how}}", f"{max(values):{how}}"
    mean = f"{sum(values) / len(values):{how}}"
    return mean if low == high else f"{mean} ({low} to {high})"


def _draw(config: Config, rows: Sequence[Row], to: Path) -> None:
    """What is shown of the base and of each method, in few colours, as a page's picture."""
    if not rows:
        return
    from PIL import Image

    from finetune import pictures

    def files(row: Row, state: str) -> list[Path]:
        folders = {task.name: _place(config, row, task, config.seeds[0]) / EVALUATED / state for task in TASKS}
        return [folders[task] / f"{name}-seed{FIRST}.png" for task, names in SHOWN.items() for name in names]

    shown = [files(rows[0], BASE), *(files(row, RESULT) for row in rows)]
    prompts = [pictures.read_settings(file)["prompt"] for file in shown[1]]
    cells = [[Image.open(file).convert("RGB") for file in each] for each in shown]
    sheet = pictures.grid(cells, ["the base", *(row.name for row in rows)], prompts)
    sheet.quantize(COLOURS).save(to, optimize=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
