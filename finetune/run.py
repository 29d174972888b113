"""A run as the user sees it: its folder, its engine, the summary, the progress bar and the logs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from finetune import (
    checkpointing,
    checkpoints,
    data,
    disk,
    ema,
    engine,
    families,
    kv_cache,
    ledger,
    offload,
    optim,
    sharding,
    signals,
)
from finetune import config as configuration
from finetune.adapters import Group
from finetune.data import Item
from finetune.data.encoding import Turn
from finetune.data.reading import concepts
from finetune.errors import Failure, Fault, Stopped
from finetune.evaluation.tables import MEASURED
from finetune.export import trained
from finetune.families import Family, Source
from finetune.fast import allocation, compiling
from finetune.keeping import LOG, Keeper
from finetune.loop import NotFinite, Training, due
from finetune.report.following import Follower
from finetune.settings import Model, Optim, Output, Train
from finetune.signals import Watch
from finetune.weights import said

Piece = TypeVar("Piece")
LOGS, BEST = "logs", "best"
UNTOLD = (LOGS, checkpoints.FOLDER, ledger.LOCK, MEASURED)
"""What of a run's folder is nobody's product"""


class Measures(Protocol):
    """What measures a run while it trains (`evaluation/during.py`). All processes must ask."""

    stops: bool
    """Whether it is enough"""

    def go_on(self, training: Training) -> None:
        """Forget what was measured after the step that was taken last."""

    def measure(self, training: Training) -> None:
        """Measure the state that was kept last, where it is due; before the first step, the base."""

    def said(self) -> str | None:
        """What the figures say of the run."""


class Unmeasured:
    """Of a run that nothing measures on its way."""

    stops = False

    def go_on(self, training: Training) -> None: ...

    def measure(self, training: Training) -> None: ...

    def said(self) -> None: ...


UNMEASURED = Unmeasured()


class Run:
    """Made first: a wrong folder or precision is said before a model is loaded. Writes nothing until `begin`."""

    def __init__(self, config: Any, output: Output, train: Train, optimizer: Optim) -> None:
        """`config` is the recipe's whole configuration, kept with the run. Raises Fault when it cannot run as asked."""
        self.config, self.train = config, train
        model: Model = getattr(config, "model", Model())
        self.folder, self.tracker = output.output, output.tracker
        self.settings = configuration.asdict(config)
        self.watch = Watch.now or Watch()
        _require_tracker(self.tracker)
        _require_sense(train)
        optim.check(optimizer)
        ema.check(train, optimizer)
        engine.require_installed()
        if train.fast:
            allocation.share()
        AcceleratorState._reset_state()  # a second run in one process may have another precision
        self.accelerator = Accelerator(
            mixed_precision="no" if train.precision == "fp32" else train.precision,
            log_with=None if self.tracker == "none" else self.tracker,
            project_dir=self.folder,
            cpu=engine.device() == "cpu",  # else processes on a CPU would each take themselves for the only one
        )
        engine.require(train, self.accelerator)
        offload.check(model, self.accelerator)
        kv_cache.check(config, self.accelerator)
        compiling.require(train, model, self.accelerator)
        self.optimizer = optim.resolve(optimizer.optimizer, self.device, engine.is_sharding(self.accelerator))
        self.console = Console(quiet=not self.leads)
        self.keeper = Keeper(config, output, train, self.leads)
        self.report = Follower(self.folder, self.leads, output.report)
        self.subjects: Sequence[Item] = ()
        self._held = False
        self.accelerator.wait_for_everyone()  # each has looked at the folder before one of them begins in it

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, the only one of a single-process run."""
        return self.accelerator.is_main_process

    @property
    def seed(self) -> int:
        return self.train.seed

    @property
    def batch(self) -> int:
        """Subject pictures a step, over all passes and processes."""
        return self.train.batch_size * self.train.accumulation * self.accelerator.num_processes

    @property
    def turn(self) -> Turn:
        """This process's share of the encoding."""
        accelerator = self.accelerator
        return Turn(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights that do not train."""
        return engine.DTYPES[self.train.precision]

    def hold(self) -> None:
        """Take the output folder for this run, once nothing is left to refuse. Raises Fault when that cannot be."""
        signals.heed()
        self._held = True
        self.watch.push(self._ended)
        self.keeper.hold()
        self.watch.enter_context(disk.written(self.folder))

    def begin(
        self,
        family: Family,
        groups: Sequence[Group],
        subjects: Sequence[Item],
        companions: Sequence[Item],
        held: Sequence[Item] = (),
        warnings: Sequence[str] = (),
    ) -> None:
        """Keep the settings in the folder, and say what is going to happen."""
        if asked := self._agreed():
            raise signals.stopped(asked)
        if not self._held:
            self.hold()
        self.subjects = subjects
        self.keeper.begin()
        self.report.begin(subjects, held)
        self.watch.advice = f"Go on: `finetune train --output {self.folder} --resume`."
        if self.tracker != "none":
            self.accelerator.init_trackers(LOGS)
        self.console.print(self._summary(family, groups, subjects, companions, held))
        for warning in warnings:
            self.console.print(Text(f"warning: {warning}", style="yellow", overflow="fold"))

    def say(self, text: str) -> None:
        """A line for the user, once whatever the number of processes."""
        self.console.print(Text(text, overflow="fold"))

    def track(self, items: Iterable[Piece], what: str, total: int) -> Iterator[Piece]:
        """Go through `items` and show how far it is. Stops between two of them where a signal asks for it."""
        with self._progress() as progress:
            for item in progress.track(items, total=total, description=what):
                signals.heed()
                yield item

    def resume(self, training: Training, source: Source) -> None:
        """Where --resume asks for it, go on from the newest whole checkpoint."""
        if said := self.keeper.go_on(training, source.identity_later()):
            self.say(said)

    def steps(self, training: Training, measured: Measures = UNMEASURED) -> Iterator[int]:
        """Go through the training steps: the bar, the logs, the checkpoints, and what is measured at them.

        Yields the number of steps done.

        Raises Stopped, the state being kept, after the step in which a signal asked for it.
        """
        try:
            measured.go_on(training)
            measured.measure(training)  # the base, or what a stop has cut short
            if asked := self._agreed():
                raise signals.stopped(asked)
            while training.done < self.train.steps and not measured.stops:
                yield from self._until_done(training, measured)
            self._require_equal(training)
        except NotFinite as fault:
            if not fault.torn:
                self.keeper.keep(training, "failed")
            self.accelerator.wait_for_everyone()  # launchers end the others as soon as one has ended
            raise
        if training.validations:
            self.say(self.keeper.verdict(training))
        if measured.stops and training.done < self.train.steps:
            self.say(f"ends after step {training.done} of {self.train.steps}: --patience")
        if told := measured.said():
            self.say(told)
        training.settle()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _until_done(self, training: Training, measured: Measures) -> Iterator[int]:
        """The steps that are left, or those up to one that is not finite and is gone back from."""
        try:
            for step in self._reported(training):
                yield step
                self.report.stepped()
                asked = self._agreed()
                if asked or due(step, self.train.checkpoint_every) or step == self.train.steps:
                    self.keeper.keep(training, "stopped" if asked else "running")
                    self.accelerator.wait_for_everyone()
                    if not asked:
                        measured.measure(training)  # what is kept is not lost by it
                        asked = self._agreed()
                    self.report.update()
                if asked:
                    raise Stopped(
                        f"Stopped by {asked} after step {step} of {self.train.steps}; the state is kept. "
                        f"{self.watch.advice}"
                    )
                if measured.stops:
                    return
        except NotFinite as fault:
            if self.train.on_nan == "stop" or not (said := self.keeper.roll_back(training)):
                raise
            self.say(f"{fault.message.partition(';')[0]}: {said}")
            measured.go_on(training)

    def _require_equal(self, training: Training) -> None:
        """Several processes that each hold all weights must end with the same."""
        if self.accelerator.num_processes > 1 and engine.running(self.accelerator) != "fsdp":
            sharding.require_equal(training.parameters, self.accelerator)
            self.say(f"the trained weights are equal in all {self.accelerator.num_processes} processes")

    def any(self, mine: bool) -> bool:
        """Whether it is so in any of the processes. All must ask."""
        flag = torch.tensor(float(mine), device=self.device)
        return float(self.accelerator.reduce(flag, "sum")) > 0

    def _agreed(self) -> str | None:
        """The signal that any of the processes received: they ask one another after every step, and stop together."""
        received = signals.received()
        return (received or "a signal to another process") if self.any(received is not None) else None

    def _reported(self, training: Training) -> Iterator[int]:
        """The steps with their bar, `log.jsonl` and the tracker."""
        file = self.folder / LOG if self.leads else os.devnull
        with self._progress("{task.fields[state]}") as progress, open(file, "a", encoding="utf-8") as log:
            task = progress.add_task("train", total=self.train.steps, completed=training.done, state="")
            for report in training:
                state = f"loss {report.loss:.4f}  lr {report.lr:.2e}  {report.seconds:.2f} s/step{_held(training)}"
                progress.update(task, completed=report.step, state=state)
                if not self.console.is_terminal and self._worth_a_line(report.step):
                    line = f"step {report.step}/{self.train.steps}  {state}{_left(progress.tasks[task])}"
                    self.console.print(line, soft_wrap=True)
                told = {name: value for name, value in vars(report).items() if value is not None}
                log.write(json.dumps({**told, "time": time.time()}) + "\n")
                log.flush()
                curves = {name: value for name, value in told.items() if name not in ("step", "seconds")}
                self.accelerator.log(curves, step=report.step)
                yield report.step

    def _ended(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the folder, and leave in it how the command ended. A full disk may refuse even that."""
        state = "stopped" if isinstance(error, Stopped) else "failed" if isinstance(error, Failure) else None
        try:
            self.keeper.end(state)
        except (OSError, Failure):
            self.keeper.end()
        if state is not None:
            self.report.update()

    def fresh(self, name: str) -> Path:
        """Where a file or folder of the run is written. What a killed run has left of it goes: it is made again."""
        path = self.folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.parent.mkdir(exist_ok=True)
        return path

    def keep_best(self, training: Training, name: str, save: Callable[[str], object], *beside: str) -> None:
        """Write RUN/best, where checkpoints were measured: `name`, the result, as the best one's weights give it.

        `save` writes what the live model is, which takes these weights for good, and the files `beside` it. Where the
        last state is the best one, its files are there under a second name (hard links; copies where a disk has none),
        and take no more room.
        """
        step = self.keeper.best(training)
        if step is None:
            return
        self.fresh(BEST).mkdir()
        if step == training.done:
            for file in (name, *beside):
                _linked(self.folder / file, self.folder / BEST / file)
        else:
            trained.become(training.whole.family, self.folder / checkpoints.name(step))
            save(f"{BEST}/{name}")
        last = ", which is the last state: the same files under a second name" if step == training.done else ""
        self.say(f"best: step {step}{last}, in {self.folder / BEST / name}")

    def finish(self, usage: str) -> None:
        """Say what was written, and the command that uses it."""
        self.keeper.end("finished")
        self.report.update()
        table = Table.grid(padding=(0, 2))
        names = [path.relative_to(self.folder) for path in sorted(self.folder.rglob("*")) if path.is_file()]
        for name in (name for name in names if name.parts[0] not in UNTOLD):
            table.add_row(Text(str(name), overflow="fold"), said((self.folder / name).stat().st_size))
        self.console.print(Text(f"\nWritten to {self.folder}, loaded back and found equal:", overflow="fold"), table)
        self.console.print(Text(f"\nUse it:\n  {usage}"), soft_wrap=True)

    def _worth_a_line(self, step: int) -> bool:
        """Where no bar can move (a log file): the first estimate after five steps, then every tenth of the way."""
        return step == 5 or step % max(1, self.train.steps // 10) == 0

    @property
    def _concepts(self) -> list[str]:
        """What the concepts are called, where the user has given any."""
        read = getattr(self.config, "data", None)
        return [concepts.called(part) for part in concepts.parts(read)] if read else []

    def _progress(self, *extra: str) -> Progress:
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()]
        return Progress(*columns, TimeRemainingColumn(), *map(TextColumn, extra), console=self.console)

    def _summary(
        self,
        family: Family,
        groups: Sequence[Group],
        subjects: Sequence[Item],
        companions: Sequence[Item],
        held: Sequence[Item],
    ) -> Table:
        train, table = self.train, Table.grid(padding=(0, 2))
        epoch = sum(item.example.repeats for item in subjects)
        rows = {
            "model": f"{family.title}, predicts {family.objective().prediction}{_used(self.config.model)}",
            "trains": ", ".join(f"{group.part} {_count(group.size)} at {group.lr:g}{group.when}" for group in groups),
            "frozen": ", ".join(
                f"{name} {_count(families.quantized.size(part))}"
                for name, part in families.modules(family).items()
                if not all(p.requires_grad for p in part.parameters())
            ),
            "pictures": "\n".join(
                data.describe(subjects, families.tokenizers(family), self._concepts, families.chunks(family))
            ),
            "class pictures": _beside(companions),
            "held out": ", ".join(item.example.name for item in held) or "none",
            "steps": f"{train.steps} of {self.batch} pictures: {train.steps * self.batch / epoch:.1f} epochs",
            "with": f"{self.optimizer}, {train.precision}, {self.device}, "
            f"{self.accelerator.num_processes} process(es), {engine.running(self.accelerator)}, seed {train.seed}",
            "output": str(self.folder.absolute()),
        }
        for name, value in rows.items():
            table.add_row(f"[bold]{name}[/bold]", Text(value, overflow="fold"))
        return table


def _used(model: Model) -> str:
    """How the base is held and read, where that is not as it comes."""
    told = {"frozen layers": model.quantize, "clip skip": model.clip_skip, "chunks of text": model.text_chunks}
    return "".join(f"; {name}: {value}" for name, value in told.items() if value is not None)


def _require_tracker(tracker: str) -> None:
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise Fault(f"--tracker {tracker}: it is not installed. `pip install {tracker}`, or --tracker none.")


def _require_sense(train: Train) -> None:
    for name in ("steps", "batch_size", "accumulation"):
        if getattr(train, name) < 1:
            raise Fault(f"--{name.replace('_', '-')} {getattr(train, name)}: at least 1.")
    checkpointing.check(train.checkpoint_share)
    engine.dtype(train.precision)


def _linked(source: Path, target: Path) -> None:
    """The same file, or all of a folder, under another name."""

    def link(file: str, other: str) -> None:
        try:
            os.link(file, other)
        except OSError:
            shutil.copy2(file, other)

    if source.is_dir():
        shutil.copytree(source, target, copy_function=link)
    else:
        link(str(source), str(target))


def _beside(companions: Sequence[Item]) -> str:
    if not companions:
        return "none"
    what = "of the subject's own, held to the base's prediction" if companions[0].example.taught else "class pictures"
    return f"{len(companions)} {what}, weight {companions[0].example.weight:g}"


def _held(training: Training) -> str:
    """The last loss on held-out pictures."""
    return f"  held out {training.validations[max(training.validations)]:.4f}" if training.validations else ""


def _left(task: Task) -> str:
    return f"  about {timedelta(seconds=round(task.time_remaining))} left" if task.time_remaining else ""


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters:,}"
