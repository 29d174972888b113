"""A run, evaluated: its states found, their pictures drawn or found in RUN/evaluation, the table and the verdict."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune import checkpoints, config, data, families, ledger, sampling
from finetune.errors import Fault
from finetune.evaluation import measuring, plan, prompts
from finetune.evaluation.drawing import How, Track
from finetune.evaluation.judges import Panel
from finetune.evaluation.measuring import Drawn
from finetune.evaluation.plan import JSON, Plan, sentence
from finetune.evaluation.prompts import Asked
from finetune.evaluation.tables import BASE, EVALUATED, RESULT, Table
from finetune.export import trained
from finetune.families import Family, Source
from finetune.settings import Captions, Data, Framing, Loss, Model, Prior, Samples, Train

__all__ = ["FOLDER", "JSON", "Brief", "as_sampled", "brief", "evaluate", "identity", "sentence"]

FOLDER = EVALUATED
BARE = 4
"""Times the pictures of a prompt: those of the bare class. Of half as many, intervals of what it lost were too wide"""


@dataclass(frozen=True)
class Brief:
    """A run and what is asked of it, before anything is loaded."""

    run: Path
    plan: Plan
    states: Sequence[tuple[str, int, str | None]]
    """Name, steps, and what `trained.find` calls it"""
    loss: Loss
    validations: Mapping[int, float]


def brief(
    run: Path, steps: Sequence[str], asked: Asked, protocol: str, how: How, count: int, references: Sequence[Path] = ()
) -> Brief:
    """Raises Fault where the run, its pictures or its words are not to be had."""
    trained.find(run)
    file = _settings(run)
    if config.tables(file).get("slider"):
        raise Fault(
            f"{run}: a slider, which learns nothing that pictures could be compared with. Look at it: `finetune grid "
            f"--run {run} --scale -2 -1 0 1 2 --prompt ...`."
        )
    model, read = config.group(Model, file, "model"), config.group(Data, file, "data")
    prior, loss = config.group(Prior, file, "prior"), config.group(Loss, file, "loss")
    seed = config.group(Train, file, "train").seed
    examples, held = data.read(read, config.group(Captions, file, "captions"), seed)
    subjects = prompts.subjects(read, prior, examples, asked, protocol, model.model)
    if references and len(references) != len(subjects):
        raise Fault(f"--references: {len(references)} for {len(subjects)} concepts: give one for each, or none.")
    own = [data.read_plain(folder, "") for folder in references]
    real = plan.real(len(subjects), examples, held, read.background, own)
    unrelated, name = prompts.unrelated(model.model), run.resolve().name
    source = Source(**vars(model))
    made = Plan(run / FOLDER, name, source, subjects, unrelated, real, protocol, how, count, BARE * count)
    return Brief(run, made, _states(run, steps), loss, _validations(run))


def as_sampled(run: Path, seed: int, batch: int) -> How:
    """As the run draws its own samples. Raises Fault where there is no run."""
    samples, framing = (
        config.group(Samples, _settings(run), "samples"),
        config.group(Framing, _settings(run), "framing"),
    )
    return How(seed, samples.sample_steps, samples.sample_guidance, max(framing.resolution, default=None), batch)


def evaluate(asked: Brief, panel: Panel, device: torch.device | str, track: Track) -> Table:
    """Draw what is missing, measure, and write the tables to RUN/evaluation."""
    base = _base(asked, device, track)
    states = [asked.plan.state(panel, BASE, 0, base, None)]
    bleed: list[list[float]] = []
    for name, step, where in asked.states:
        drawn = _trained(asked, name, step, where, device, track)
        states.append(asked.plan.state(panel, name, step, drawn, base, asked.validations.get(step)))
        bleed = measuring.bleeding(panel, drawn, asked.plan.real)
    table = asked.plan.table(states, asked.plan.facts(panel), bleed)
    plan.write(table, asked.plan.folder, asked.plan.how.seed)
    return table


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
    total = (entry.step if entry.state == "finished" else entry.steps) if entry else 0
    written = trained.find(run).checkpoint is None
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
    def load() -> Family:
        family = families.load(asked.plan.source, torch.float32, device)
        sampling.as_trained(family, asked.loss)
        return family

    return asked.plan.draw(BASE, 0, asked.plan.source.identity(), load, track)


def _trained(asked: Brief, name: str, step: int, where: str | None, device: torch.device | str, track: Track) -> Drawn:
    found = trained.find(asked.run, where)

    def load() -> Family:
        family = trained.load(found, found.base()).family
        assert family is not None
        family.pipeline.to(device)
        sampling.as_trained(family, asked.loss)
        return family

    drawn = asked.plan.draw(name, step, identity(found), load, track)
    gc.collect()
    return drawn


def identity(found: trained.Trained) -> str:
    """A name for exactly these weights."""
    if found.folder is not None:
        return Source(str(found.folder)).identity()
    if found.checkpoint is not None:
        return checkpoints.identity(found.checkpoint)
    hashed = hashlib.sha256()
    for file in [found.file, *found.embeddings] if found.file else found.embeddings:
        hashed.update(file.read_bytes())
    return hashed.hexdigest()


def _validations(run: Path) -> dict[int, float]:
    """Losses on held-out pictures, by step."""
    told = {line["step"]: line.get("validation") for line in ledger.logged(run)}
    return {step: loss for step, loss in told.items() if loss is not None}
