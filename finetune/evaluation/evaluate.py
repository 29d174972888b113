"""A run, evaluated: its states found, their pictures drawn or found in RUN/evaluation, the table and the verdict."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from finetune import checkpoints, config, data, disk, families, ledger, provenance, sampling
from finetune.data.reading import pictures
from finetune.errors import Fault
from finetune.evaluation import drawing, measuring, prompts, verdict
from finetune.evaluation.drawing import How, Track, wanted
from finetune.evaluation.judges import Panel
from finetune.evaluation.measuring import Drawn, Real
from finetune.evaluation.prompts import Asked, Subject
from finetune.evaluation.tables import BASE, RESULT, State, Table, to_csv, to_json, to_markdown
from finetune.export import trained
from finetune.families import Family, Source
from finetune.settings import Captions, Data, Framing, Loss, Model, Prior, Samples

FOLDER = "evaluation"
JSON, CSV, MARKDOWN = "table.json", "table.csv", "table.md"


@dataclass(frozen=True)
class Brief:
    """A run and what is asked of it, before anything is loaded."""

    run: Path
    source: Source
    """The base"""
    states: Sequence[tuple[str, int, str | None]]
    """Name, steps, and what `trained.find` calls it"""
    subjects: Sequence[Subject]
    unrelated: Sequence[str]
    real: Real
    loss: Loss
    validations: Mapping[int, float]
    protocol: str
    how: How
    count: int


def brief(
    run: Path, steps: Sequence[str], asked: Asked, protocol: str, how: How, count: int, references: Sequence[Path] = ()
) -> Brief:
    """Raises Fault where the run, its pictures or its words are not to be had."""
    trained.find(run)
    file = _settings(run)
    model, read = config.group(Model, file, "model"), config.group(Data, file, "data")
    prior, loss = config.group(Prior, file, "prior"), config.group(Loss, file, "loss")
    examples, held = data.read(read, config.group(Captions, file, "captions"))
    subjects = prompts.subjects(read, prior, examples, asked, protocol, model.model)
    if references and len(references) != len(subjects):
        raise Fault(f"--references: {len(references)} for {len(subjects)} concepts: give one for each, or none.")
    sets = [data.read_plain(folder, "") for folder in references] or [
        [one for one in (*examples, *held) if one.concept == number] for number in range(len(subjects))
    ]
    opened = [[pictures.decode(one.path, read.background)[0].convert("RGB") for one in own] for own in sets]
    training = [pictures.decode(one.path, read.background)[0].convert("RGB") for one in examples]
    return Brief(
        run, Source(**vars(model)), _states(run, steps), subjects, prompts.unrelated(model.model),
        Real(opened, training, [one.name or one.path.name for one in examples]),
        loss, _validations(run), protocol, how, count,
    )  # fmt: skip


def as_sampled(run: Path, seed: int, batch: int) -> How:
    """As the run draws its own samples. Raises Fault where there is no run."""
    samples, framing = (
        config.group(Samples, _settings(run), "samples"),
        config.group(Framing, _settings(run), "framing"),
    )
    return How(seed, samples.sample_steps, samples.sample_guidance, max(framing.resolution, default=None), batch)


def evaluate(asked: Brief, panel: Panel, device: torch.device | str, track: Track) -> Table:
    """Draw what is missing, measure, and write the tables to RUN/evaluation."""
    folder, base = asked.run / FOLDER, _base(asked, device, track)
    states = [State(BASE, 0, measuring.figures(panel, base, None, asked.real, asked.subjects, asked.how.seed))]
    bleed: list[list[float]] = []
    for name, step, where in asked.states:
        drawn = _trained(asked, name, step, where, device, track)
        found = measuring.figures(panel, drawn, base, asked.real, asked.subjects, asked.how.seed)
        near = measuring.pairs(measuring.neighbours(panel, drawn, asked.real), drawn, asked.real)
        states.append(State(name, step, found, near, asked.validations.get(step)))
        bleed = measuring.bleeding(panel, drawn, asked.real)
    facts = {
        verdict.REAL: measuring.of_each_other(panel, asked.real),
        "prompts": [subject.prompts for subject in asked.subjects],
        "measured against": [subject.plain for subject in asked.subjects],
        "class prompts": [subject.class_prompt for subject in asked.subjects],
        "unrelated prompts": asked.unrelated,
        "pictures of each prompt": asked.count,
        "real pictures": [len(own) for own in asked.real.references],
        "seed": asked.how.seed,
        "steps": asked.how.steps,
        "guidance": asked.how.guidance,
        "software": provenance.software(),
    }
    names = [subject.name for subject in asked.subjects]
    table = Table(asked.run.resolve().name, asked.protocol, states, facts, bleed, names)
    said = verdict.judge(table, seed=asked.how.seed)
    disk.write_text(folder / JSON, to_json(table, verdict=vars(said)))
    disk.write_text(folder / CSV, to_csv([table]))
    disk.write_text(folder / MARKDOWN, to_markdown(table) + f"\n{sentence(said)}\n")
    return table


def sentence(said: verdict.Verdict) -> str:
    """The verdict in words."""
    return (
        f"Verdict on {said.state}: {said.word}: {said.reason}. Best of those measured: {said.best}, "
        f"{said.best_reason}. {said.advice}"
    )


def _settings(run: Path) -> Path:
    file = run / ledger.SETTINGS
    if not file.is_file():
        raise Fault(f"{run}: no run: it has no {ledger.SETTINGS}. Name the --output of a training.")
    return file


def _states(run: Path, steps: Sequence[str]) -> list[tuple[str, int, str | None]]:
    """What is evaluated, by step. By default all: each checkpoint that is kept, and the result of a finished run.

    A checkpoint of the last step is the result.
    """
    entry = ledger.read(run)
    total = entry.steps if entry else 0
    written = any((run / name).exists() for name in ("adapter.safetensors", "model"))
    found: dict[str, tuple[str, int, str | None]] = {}
    kept = [step for step in checkpoints.steps(run) if not (written and step == total)]
    for asked in steps or [*map(str, kept), *([RESULT] if written else [])]:
        if asked == RESULT:
            if not written:
                raise Fault(f"{run}: --step {RESULT}: the run has not written its result yet. Give last, or a step.")
            found[RESULT] = (RESULT, total, None)
            continue
        where = trained.find(run, asked).checkpoint
        assert where is not None
        found[where.name] = (where.name, int(where.name.rpartition("-")[2]), asked)
    if not found:
        raise Fault(f"{run}: nothing to evaluate yet: the run has no whole checkpoint. Go on with it: --resume.")
    return sorted(found.values(), key=lambda state: state[1])


def _base(asked: Brief, device: torch.device | str, track: Track) -> Drawn:
    """What the base draws of the same prompts, the class in the subject's place."""

    def load() -> Family:
        family = families.load(asked.source, torch.float32, device)
        sampling.as_trained(family, asked.loss)
        return family

    texts = [subject.plain for subject in asked.subjects]
    return _drawn(asked, BASE, asked.source.identity(), texts, load, 0, track)


def _trained(asked: Brief, name: str, step: int, where: str | None, device: torch.device | str, track: Track) -> Drawn:
    found = trained.find(asked.run, where)

    def load() -> Family:
        family = trained.load(found, found.base()).family
        assert family is not None
        family.pipeline.to(device)
        sampling.as_trained(family, asked.loss)
        return family

    texts = [subject.prompts for subject in asked.subjects]
    drawn = _drawn(asked, name, _identity(found), texts, load, step, track)
    gc.collect()
    return drawn


def _drawn(
    asked: Brief,
    name: str,
    identity: str,
    texts: Sequence[Sequence[str]],
    load: Callable[[], Family],
    step: int,
    track: Track,
) -> Drawn:
    """The pictures of one state: of the subjects, their classes, and unrelated prompts (one each)."""
    seed, count = asked.how.seed, asked.count
    subjects = [wanted(f"subject{i or ''}", one, count, seed) for i, one in enumerate(texts)]
    classes = [
        wanted(f"class{i or ''}", [one.class_prompt], 4 * count, seed) if one.class_prompt else []
        for i, one in enumerate(asked.subjects)
    ]
    unrelated = wanted("unrelated", asked.unrelated, 1, seed)
    every = [picture for group in (*subjects, *classes, unrelated) for picture in group]
    facts = {"model": asked.source.model, "revision": asked.source.revision, "step": step}
    drawn = iter(drawing.draw(asked.run / FOLDER / name, every, asked.how, identity, load, facts, track))
    files = [f"{name}/{picture.file}" for group in subjects for picture in group]
    taken = [[*islice(drawn, len(group))] for group in (*subjects, *classes, unrelated)]
    return Drawn(taken[: len(subjects)], taken[len(subjects) : -1], taken[-1], files)


def _identity(found: trained.Trained) -> str:
    """A name for exactly these weights."""
    if found.folder is not None:
        return Source(str(found.folder)).identity()
    file = found.file or (found.checkpoint and found.checkpoint / checkpoints.MANIFEST)
    assert file is not None
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _validations(run: Path) -> dict[int, float]:
    """Losses on held-out pictures, by step."""
    file = run / ledger.LOG
    lines: list[dict[str, Any]] = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        if file.is_file()
        else []
    )
    return {line["step"]: line["validation"] for line in lines if line.get("validation") is not None}
