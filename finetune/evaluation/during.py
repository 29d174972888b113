"""A run that measures itself: at its checkpoints, on fixed seeds, within a share of the time.

The pictures are those of `finetune evaluate`, only fewer, of fewer denoising steps, and of no unrelated prompts.
Nothing that trains is touched, so that the same is trained with and without.

**What is measured when.** The base before the first step, and the last state, always. What is left of the share is
spread evenly over the steps: a checkpoint is measured where its turn is paid for, else it is passed over. Fewer
pictures would not do instead, as only the same prompts and seeds can be compared.

**Patience** counts checkpoints that were measured: when so many were since the best one (`verdict.best`), the run ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

from finetune import adapters, checkpoints, disk
from finetune.data import Example
from finetune.errors import Fault, Stopped
from finetune.evaluation import judges, measuring, plan, prompts
from finetune.evaluation.drawing import How
from finetune.evaluation.measuring import Drawn
from finetune.evaluation.plan import JSON, Plan
from finetune.evaluation.record import Record, called
from finetune.evaluation.tables import BASE, MEASURED
from finetune.families import Family, Source
from finetune.glance import EMBEDDED
from finetune.loop import Training, due
from finetune.previews import able_to_draw
from finetune.run import Run
from finetune.settings import Measure, Prior

FOLDER = MEASURED
PROTOCOL = "short"
MOST = 0.1
"""The largest share of the time"""
log = logging.getLogger(__name__)


class Measured:
    """Made before a model is loaded, in each process; the leading one draws and measures, the others wait."""

    def __init__(self, run: Run, config: Any, examples: Sequence[Example], held: Sequence[Example]) -> None:
        """`config`: the recipe's own. Raises Fault for settings that make no sense, and without the metric models."""
        self.run, self.settings, self.passed_over = run, config.measure, 0
        self.stops = False
        """Whether patience is at its end"""
        self.on = _is_on(config.measure, config.model.model)
        _require_sense(config.measure, self.on)
        try:
            subjects = _subjects(config, examples) if self.on else []
        except Fault as fault:
            if config.measure.measure != "auto" or config.measure.patience:
                raise
            run.say(f"nothing is measured while training: {fault.message}")
            self.on = False
        if self.on and run.leads:
            made = _plan(run, config, subjects, examples, held)
            places = config.measure.dino, config.measure.clip, config.measure.lpips
            self.panel = judges.panel(config.measure.measure, made.source.model, places, run.device)
            self.record = Record(made, made.facts(self.panel))

    def go_on(self, training: Training) -> None:
        """Take up what was measured of this run, up to the step that was taken last. All processes must ask."""
        if self.on and self.run.leads:
            self.record.read(training.done)
            self._tell()
        self._look_at_patience()

    def measure(self, training: Training) -> None:
        """Measure the checkpoint of the step that was taken last, or the base, where it is due. All must ask."""
        if not self.run.any(self.on and self.run.leads and self._is_due(training.done)):
            return
        with training.settled():
            if self.run.leads:
                self._attempt(training)
        self._look_at_patience()

    def said(self) -> str | None:
        """The verdict in words, and what measuring took."""
        if not (self.on and self.run.leads and self.record.trained):
            return None
        took, steps = self.record.took, self.record.steps_took()
        count = len(self.record.trained)
        over = f" {self.passed_over} checkpoints were passed over for want of time." if self.passed_over else ""
        return (
            f"{plan.sentence(self.record.verdict())}\nMeasured {count} state{'s' * (count > 1)} and the base in "
            f"{took:.0f} s, beside {steps:.0f} s of steps ({took / steps:.1%}).{over} {self.record.plan.folder / JSON}"
        )

    def _is_due(self, done: int) -> bool:
        total, share = self.run.train.steps, self.settings.measure_share
        if called(done) in self.record.states:
            return False
        if done in (0, total):
            return True
        if not due(done, self.run.train.checkpoint_every):
            return False
        if affordable(done, total, self.record.steps_took(), self.record.spent, share):
            return True
        if not self.passed_over:
            self.run.say(
                f"step {done}: not measured, it would take more than {share:.0%} of the time (--measure-share)"
            )
        self.passed_over += 1
        return False

    def _attempt(self, training: Training) -> None:
        """What goes wrong in measuring is said, and the training goes on without; a full disk ends it as elsewhere."""
        began = time.perf_counter()
        try:
            self._measure(training)
        except Stopped:
            pass  # by a signal, which the run heeds next; what was drawn is kept
        except Exception as error:
            if disk.refusal(error) or (error.__cause__ and disk.refusal(error.__cause__)):
                raise
            why = next(iter(str(error).splitlines()), "") or type(error).__name__
            self.run.say(f"step {training.done}: measuring failed, and is given up; the training goes on ({why})")
            log.debug("measuring failed", exc_info=True)
            self.on = False
        finally:
            self.record.spend(called(training.done), time.perf_counter() - began)

    def _measure(self, training: Training) -> None:
        if BASE not in self.record.states:
            drawn = self._draw(training, BASE)
            self.record.add(self.record.plan.state(self.panel, BASE, 0, drawn, None))
        if training.done:
            name = called(training.done)
            drawn = self._draw(training, name)
            validation = training.validations.get(training.done)
            state = self.record.plan.state(self.panel, name, training.done, drawn, None, validation)
            self.record.add(state, measuring.bleeding(self.panel, drawn, self.record.plan.real))
            self._tell()

    def _draw(self, training: Training, name: str) -> Drawn:
        """The live model's pictures, or the base's: with the adapter off, or before anything has trained."""
        made, family, step = self.record.plan, training.whole.family, training.done
        base = name == BASE
        identity = made.source.identity() if base else checkpoints.identity(self.run.folder / checkpoints.name(step))
        with ExitStack() as stack:

            def load() -> Family:
                if base and step and not adapters.knows_base(family):
                    raise Fault("the base's pictures were not drawn before the first step, and all weights train")
                stack.enter_context(able_to_draw(self.run, family, made.source))
                stack.enter_context(adapters.off(family) if base else nullcontext())
                return family

            return made.draw(name, 0 if base else step, identity, load, lambda items, what: items)

    def _tell(self) -> None:
        """Let the run know which state is the best, and the verdict on the last one."""
        if self.record.trained:
            said = self.record.verdict()
            self.run.keeper.judged(self.record.states[said.best].step, said.word, plan.sentence(said))
        else:
            self.run.keeper.judged(None)

    def _look_at_patience(self) -> None:
        patience = self.settings.patience
        over = self.on and self.run.leads and patience and self.record.since_best() >= patience
        self.stops = self.run.any(bool(over))


def affordable(done: int, steps: int, took: float, spent: dict[str, float], share: float) -> bool:
    """Whether a checkpoint may be measured. `took`: seconds of the steps done; `spent`: seconds of measuring, by state.

    The share of all steps' time, less what the base took and the last state will, is due by the part of the steps done.
    """
    base, cost = spent.get(BASE, 0.0), next(reversed(spent.values()), 0.0)  # the last one tells what the next will take
    left = share * took / done * steps - base - cost
    return sum(spent.values()) - base + cost <= left * done / steps


def _is_on(settings: Measure, model: str) -> bool:
    return settings.measure in ("toybox", "published") or (settings.measure == "auto" and model == EMBEDDED)


def _subjects(config: Any, examples: Sequence[Example]) -> list[prompts.Subject]:
    settings, model = config.measure, config.model.model
    asked = prompts.Asked(settings.measure_prompts, settings.subject, settings.class_name)
    return prompts.subjects(config.data, getattr(config, "prior", Prior()), examples, asked, PROTOCOL, model)


def _plan(
    run: Run, config: Any, subjects: Sequence[prompts.Subject], examples: Sequence[Example], held: Sequence[Example]
) -> Plan:
    size = max(config.framing.resolution, default=None)
    how = How(
        run.seed, config.measure.measure_steps, config.samples.sample_guidance, size, config.measure.measure_batch
    )
    real = plan.real(len(subjects), examples, held, config.data.background)
    source, name = Source(**vars(config.model)), run.folder.resolve().name
    count = config.measure.measure_count
    return Plan(run.folder / FOLDER, name, source, subjects, (), real, PROTOCOL, how, count, 2 * count)


def _require_sense(settings: Measure, on: bool) -> None:
    for name in ("measure_count", "measure_steps", "measure_batch"):
        if getattr(settings, name) < 1:
            raise Fault(f"--{name.replace('_', '-')} {getattr(settings, name)}: at least 1.")
    if not 0 < settings.measure_share <= MOST:
        raise Fault(f"--measure-share {settings.measure_share:g}: more than 0, at most {MOST:g}. --measure off: none.")
    if settings.patience < 0:
        raise Fault(f"--patience {settings.patience}: 0 or more.")
    if settings.patience and not on:
        raise Fault(
            f"--patience {settings.patience}: nothing is measured that could get better. Say --measure published (or "
            "toybox, for the embedded model)."
        )
