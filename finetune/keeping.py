"""What keeps a run: its folder is held, its settings and state are kept, and it goes on from where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from finetune import checkpoints, config, disk, ledger
from finetune.checkpoints import Checkpoint
from finetune.data import Item
from finetune.errors import Fault, Finished
from finetune.loop import Training
from finetune.settings import Output, Train

LOG = ledger.LOG
FREE = frozenset({
    *("output", "resume", "resume_or_begin", "allow_changed", "tracker", "report", "cache", "use_cache"),
    *("batch_size", "accumulation", "processes", "engine"),
    *("save_every", "checkpoint_every", "keep_last", "keep_every", "on_nan", "ema_on_cpu", "validate_every"),
    *("optimizer_in_backward", "gradient_checkpointing", "checkpoint_share", "fast", "compile", "offload_blocks"),
    "cache_kv",
    *("sample_every", "sample_prompts", "sample_steps", "sample_guidance", "strengths"),
    *("measure", "measure_share", "measure_count", "measure_steps", "measure_batch", "measure_prompts"),
    *("subject", "class_name", "dino", "clip", "lpips", "patience"),
    *("title", "author", "license", "description", "tags", "tell_captions"),
})  # fmt: skip
"""Settings that may change between a checkpoint and what goes on from it: nothing that is trained follows from them.

Of how a step is split into passes and processes only the number of its pictures counts, which `identity` holds.
"""
BEGINNING = frozenset({ledger.LOCK, ledger.SETTINGS, f".{ledger.SETTINGS}.writing", f".{ledger.FILE}.writing"})
"""What a run that was killed at its very beginning may have left: there is nothing in it to lose."""
ROLLBACKS = 3
"""How often a run goes back by itself before it gives up."""
log = logging.getLogger(__name__)


class Keeper:
    """One for each process; only the leading one writes. Made before a model is loaded."""

    def __init__(self, run: Any, output: Output, train: Train, leads: bool) -> None:
        """`run`: the recipe's whole configuration. Raises Fault when the folder does not suit."""
        self.folder, self.allow_changed = output.output, output.allow_changed
        self.resume = output.resume or (output.resume_or_begin and _is_begun(self.folder))
        self.train, self.leads = train, leads
        self.rolled_back, self.factor = 0, 1.0  # how often; and what is left of the rate
        self.config = replace(run, output=replace(output, resume=False, resume_or_begin=False, allow_changed=False))
        self._lock: FileLock | None = None
        self._made: list[Path] = []  # folders that are there for the lock alone
        self._begun = False
        _require(self.folder, self.resume)

    def hold(self) -> None:
        """Make the folder and hold it: nobody else trains there until `end`. Raises Fault when that cannot be."""
        if not self.leads:
            return
        new = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Fault(f"{self.folder}: cannot be made ({error.strerror}). Name another --output.") from error
        self._made = new
        self._lock = ledger.hold(self.folder)
        _require(self.folder, self.resume)  # what another process may have made of it meanwhile

    def begin(self) -> None:
        """Keep the settings in the folder, those of a run that goes on beside its first ones."""
        if not self.leads:
            return
        self._made = []
        if not self.resume:
            disk.write_text(self.folder / ledger.SETTINGS, config.dumps(self.config))
        recipe = config.recipe_of(self.folder / ledger.SETTINGS) or ""
        before = ledger.read(self.folder) if self.resume else None
        now = replace(
            before or ledger.Entry("", 0), recipe=recipe, steps=self.train.steps, state="running", identity={}
        )
        self.entry = ledger.write(self.folder, now)
        self._begun = True

    def go_on(self, training: Training, base: Callable[[], str]) -> str | None:
        """Load the newest whole checkpoint where a run is resumed. What there is to say of it.

        `base`: the base's identity, asked for when it is needed: it takes a second for each gigabyte.

        Raises Fault when settings, base or data are not those that it was made with.
        """
        self._training, self._base = training, base
        if not self.resume:
            return None
        found, broken = checkpoints.newest(self.folder)
        said = [f"{path.name}: broken, left as it is" for path in broken]
        if found is None:
            if self.leads:
                _cut(self.folder / LOG, 0)
            return "; ".join([*said, "no checkpoint yet: the run begins again at its first step"])
        self._require_same(found.state["settings"], found.state["identity"])
        training.load(found.step, found.state["training"])
        self.factor = found.state["factor"]
        if self.leads:
            _cut(self.folder / LOG, found.step)
        return "; ".join([*said, f"goes on after step {found.step}"])

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a checkpoint is of, besides its settings."""
        batches = self._training.batches
        items = [*batches.order.subjects, *batches.order.companions, *batches.data.held]
        return {"base": self._base(), "data": _identity(items), "pictures a step": str(batches.order.batch)}

    def roll_back(self, training: Training) -> str | None:
        """Go back to the last checkpoint, at half the rate. What to say; None without one, or after three times."""
        found, _ = checkpoints.newest(self.folder)
        self.rolled_back += 1
        if found is None or self.rolled_back > ROLLBACKS:
            return None
        training.load(found.step, found.state["training"])
        self.factor /= 2
        training.slow_down(self.factor / found.state["factor"])  # it may have been kept at a lower rate already
        if self.leads:
            _cut(self.folder / LOG, found.step)
        return f"back to step {found.step}, on at {self.factor:g} of the rate"

    def keep(self, training: Training, state: str = "running") -> None:
        """Write a checkpoint of this step. All processes must ask."""
        held = training.state()
        if not self.leads:
            return
        kept = {
            "training": held,
            "settings": config.asdict(self.config),
            "identity": self.identity,
            "factor": self.factor,
        }
        checkpoint = Checkpoint(training.done, kept)
        best = best_step(self.folder, training.validations, [*checkpoints.steps(self.folder), training.done])
        checkpoints.save(self.folder, checkpoint, self.train.keep_last, self.train.keep_every, best)
        self.entry = ledger.write(self.folder, self.entry, state=state, step=training.done, identity=self.identity)

    def judged(self, best: int | None, word: str = "", reason: str = "") -> None:
        """Note what measuring says: the best state's steps, and the verdict on the last one."""
        if self.leads:
            self.entry = ledger.write(self.folder, self.entry, best=best, verdict=word, reason=reason)

    def best(self, training: Training) -> int | None:
        """The steps of the best checkpoint."""
        return best_step(self.folder, training.validations, checkpoints.steps(self.folder))

    def verdict(self, training: Training) -> str:
        """What the losses on held-out pictures say of the run."""
        told = training.validations
        best = lowest(told, checkpoints.steps(self.folder))
        said = [f"at step {step}: {told[step]:.4f}" for step in (min(told), max(told)) if step in told]
        if best is not None:
            said.append(f"lowest of the checkpoints at step {best}: {told[best]:.4f}, kept in {checkpoints.name(best)}")
        return "loss on held-out pictures " + "; ".join(said)

    def end(self, state: str | None = None) -> None:
        """Let go of the folder, and say in it how the run ended; without a state it stays as it was said last.

        Of a run that was not begun nothing stays there.
        """
        if self._lock is not None and state is not None and self._begun:
            self.entry = ledger.write(self.folder, self.entry, state=state)
        if self._made:
            (self.folder / ledger.LOCK).unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.release()
        for folder in self._made:
            with suppress(OSError):  # something else is in it meanwhile
                folder.rmdir()
        self._lock, self._made = None, []

    def _require_same(self, settings: Mapping[str, Any], identity: Mapping[str, str]) -> None:
        lines = ledger.changes(settings, config.asdict(self.config), FREE)
        told = {"pictures a step": f": {identity['pictures a step']}, now {self.identity['pictures a step']}"}
        other = [name for name in identity if identity[name] != self.identity[name]]
        lines += [name + told.get(name, ": not what it was made with") for name in other]
        if lines and not self.allow_changed:
            raise Fault(
                f"{self.folder}: what the training follows from has changed since its checkpoint. Put it back, or go "
                "on all the same with --allow-changed.",
                lines,
            )
        if lines:
            log.warning("goes on although changed: %s", "; ".join(lines))


def _is_begun(folder: Path) -> bool:
    """Whether there is a run to go on with. Raises Finished where it needs no more."""
    entry = ledger.read(folder)
    if entry is not None and entry.state == "finished":
        raise Finished(f"{folder}: the run there is finished: nothing is left to do.")
    return entry is not None


def _require(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise Fault(f"{folder}: a file, where --output names a folder.")
    entry = ledger.seen(folder) if folder.is_dir() else None
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if entry is None and there <= BEGINNING and (ledger.SETTINGS in there or not resume):
        return
    if resume and entry is None:
        raise Fault(f"{folder}: --resume, but there is no run there to go on with. Without --resume a new one begins.")
    if resume and entry is not None and entry.state == "finished":
        raise Fault(f"{folder}: the run there is finished: nothing is left to do. Name a new --output for another one.")
    if resume:
        return
    if entry is not None and entry.state != "finished":
        raise Fault(
            f"{folder}: an unfinished run is there ({entry.state}, {entry.step} of {entry.steps} steps). Go on with "
            f"it: `finetune train --output {folder} --resume`. Or name a new --output."
        )
    raise Fault(f"{folder}: there is something there already. A run writes over nothing: name a new --output.")


def best_step(folder: Path, validations: Mapping[int, float], kept: Iterable[int]) -> int | None:
    """The best of the checkpoints that are kept, by its steps: the one that measuring chose (`evaluation/verdict.py`
    has the rule), else the one with the lowest loss on held-out pictures."""
    entry, steps = ledger.read(folder), list(kept)
    return entry.best if entry and entry.best in steps else lowest(validations, steps)


def lowest(validations: Mapping[int, float], kept: Iterable[int]) -> int | None:
    """The step, of those that are kept, with the lowest loss on held-out pictures."""
    measured = {step: validations[step] for step in kept if step in validations}
    finite = {step: loss for step, loss in measured.items() if math.isfinite(loss)}
    return min(finite, key=lambda step: (finite[step], step)) if finite else None


def _identity(items: Iterable[Item]) -> str:
    """What is trained, whatever it is called and wherever it lies."""
    hashed = hashlib.sha256()
    for item in items:
        digest = item.example.facts.digest if item.example.facts else ""
        told = [digest, item.example.weight, item.example.repeats, item.captions, [str(view) for view in item.views]]
        told += [item.example.source.facts.digest] if item.example.source and item.example.source.facts else []
        told += [_bytes(item.example.mask)] if item.example.mask else []
        hashed.update(json.dumps(told).encode())
    return hashed.hexdigest()


def _bytes(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cut(file: Path, step: int) -> None:
    """Leave out of the log what was done after the checkpoint: it is done again."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        disk.write_text(file, "".join(f"{line}\n" for line in kept))
