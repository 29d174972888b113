"""Which checkpoint is the good one, and is a state under-trained, good or over-trained: rules over a table.

**The best state.** Of the states whose fidelity is not below the floor, those are as good as the best whose likeness is
within `TOLERANCE` of the highest; the earliest of these is the best, as it has forgotten least. The floor is `FLOOR` of
what the base itself reaches on the same prompts with the class in the subject's place. Where no state reaches
the floor, the one of the highest fidelity is the best.

**The verdict** on a state, the first of these that holds:

- *over-trained*, when its interval lies wholly on the wrong side of a line: fidelity below the floor; likeness less
  than that of an earlier state, prompt by prompt, by more than `TOLERANCE`; likeness of the bare class to the subject
  more than `CLASS` of the way from the base's to the real pictures'; pictures of the bare class less than `VARIETY` as
  different from each other as the base's; or samples that copy training pictures, more than `COPIES` of them;
- *under-trained*, when likeness has gone less than `REACHED` of the way from the base's to that of the real pictures to
  each other (Ruiz et al. 2022 report DINO .569 for textual inversion, .668 for DreamBooth, .774 for photos);
- *good* otherwise.

What a class loses is both of what Ruiz et al. 2022 (section 3.3) preserve it against: that its pictures become like the
subject, and that they become like each other. Diversity of the subject's own pictures has no line: a subject that is
drawn well looks the same in the same scene. Of real pictures of gizmo and pip in one scene toybox's judge says .034
to .066, and .044 of those that a good adapter drew. Of a style the bare class is every prompt that does not ask for it.
"""

from __future__ import annotations

import math

from finetune.evaluation.measures import Estimate, bootstrap
from finetune.evaluation.prompts import STYLE
from finetune.evaluation.tables import Figure, State, Table, Verdict

TOLERANCE = 0.01
"""Likeness: half of the .02 within which two states count as the same, as both have been measured."""
FLOOR = 0.9
CLASS = 0.5
"""Of the way: Ruiz et al. 2022 report .49 with and .66 without the prior's loss, where real photos have .77"""
VARIETY = 0.8
"""Of the base's. On toybox with the prior's loss .69 to .80 was measured of gizmo after 100 to 900 steps (8 pictures,
with intervals of .1 on either side: no alarm); without it .30 after 600, and .55 of pip"""
CLASS_TAKEN = "the bare class has become like the subject"
STYLE_TAKEN = "prompts that do not ask for the style have taken it on"
ENOUGH = 8
"""Pictures of the bare class: of fewer, no interval tells how varied they are"""
COPIES = 0.1
REACHED = 0.6
REAL = "likeness of the real pictures to each other"
"""In the facts of a table"""


def floor(table: Table) -> float:
    """The least fidelity that a good state has."""
    told = table.base.value("fidelity")
    return told - (1 - FLOOR) * abs(told)


def best(table: Table) -> State:
    """By the rule above. Raises ValueError when no trained state was measured."""
    if not table.trained:
        raise ValueError("no trained state was measured: nothing to choose from")
    least = floor(table)
    able = [state for state in table.trained if not state.value("fidelity") < least]
    if not able:
        return max(table.trained, key=lambda state: (state.value("fidelity"), -state.step))
    highest = max(_number(state.value("likeness")) for state in able)
    return next(state for state in able if _number(state.value("likeness")) >= highest - TOLERANCE)


def judge(table: Table, name: str | None = None, seed: int = 0) -> Verdict:
    """The verdict on the state of this name; by default the last one of the training."""
    chosen = best(table)
    state = next(one for one in table.trained if one.name == name) if name else table.trained[-1]
    word, reason = _word(table, state, seed)
    return Verdict(word, reason, state.name, chosen.name, _why(table, chosen), _advice(word, state, chosen))


def progress(table: Table, state: State, measure: str = "likeness") -> Estimate:
    """How far a likeness has gone from the base's (0) to that of the real pictures to each other (1)."""
    low, high = table.base.value(measure), float(table.facts.get(REAL) or math.nan)
    one = state.figures[measure]
    value, least, most = ((value - low) / (high - low) for value in (one.value, one.low, one.high))
    return Estimate(value, least, most, one.units)


def lost(one: State, other: State, seed: int = 0) -> Estimate:
    """By how much `other` has less likeness than `one`, prompt by prompt: both drew the same prompts and seeds."""
    pairs = zip(one.figures["likeness"].values, other.figures["likeness"].values, strict=True)
    return bootstrap([before - after for before, after in pairs], seed, "lost likeness")


def _word(table: Table, state: State, seed: int) -> tuple[str, str]:
    if not {"likeness", "fidelity"} <= state.figures.keys():
        return "unknown", "likeness or fidelity to the prompts was not measured"
    if over := _over(table, state, seed):
        return "over-trained", over
    gone = progress(table, state)
    if math.isnan(gone.value):
        return "unknown", "there is less than two real pictures to say how like the subject is to itself"
    said = (
        f"likeness has gone {gone.value:.0%} ({_interval(gone, '.0%')}) of the way from the base to the real pictures"
    )
    if gone.value < REACHED:
        return "under-trained", f"{said}; at least {REACHED:.0%} is asked"
    fidelity = state.figures["fidelity"]
    return "good", (
        f"{said}, and fidelity to the prompts, {fidelity.value:.3f} ({_interval(fidelity)}), is not wholly below the "
        f"floor {floor(table):.3f}"
    )


def _over(table: Table, state: State, seed: int) -> str | None:
    fidelity, least = state.figures["fidelity"], floor(table)
    if fidelity.high < least:
        return (
            f"fidelity to the prompts is {fidelity.value:.3f} ({_interval(fidelity)}), all of it below the floor "
            f"{least:.3f}, which is {FLOOR:.0%} of the base's"
        )
    for earlier in table.trained:
        if earlier.step < state.step and len(earlier.figures["likeness"].values) > 1:
            less = lost(earlier, state, seed)
            if less.low > TOLERANCE:
                return f"likeness is {less.value:.3f} ({_interval(less)}) less than {earlier.name} had"
    if "class drift" in state.figures and "class drift" in table.base.figures:
        drifted = progress(table, state, "class drift")
        if drifted.low > CLASS:
            return (
                f"{_became(table)}: {drifted.value:.0%} ({_interval(drifted, '.0%')}) of the "
                f"way to its real pictures, more than {CLASS:.0%}"
            )
    if "class diversity" in state.figures and "class diversity" in table.base.figures:
        left, whole = state.figures["class diversity"], table.base.value("class diversity")
        if left.units >= ENOUGH and left.high < VARIETY * whole:
            share = Estimate(left.value / whole, left.low / whole, left.high / whole, left.units)
            return (
                f"pictures of the bare class differ {share.value:.0%} ({_interval(share, '.0%')}) as much as the "
                f"base's, less than {VARIETY:.0%}"
            )
    copies = state.figures.get("copies")
    if copies and copies.low > COPIES:
        return f"{copies.value:.0%} ({_interval(copies, '.0%')}) of the samples copy a training picture"
    return None


def _became(table: Table) -> str:
    return STYLE_TAKEN if table.protocol == STYLE else CLASS_TAKEN


def _why(table: Table, chosen: State) -> str:
    if chosen.value("fidelity") < floor(table):
        return f"no state reaches the floor of fidelity {floor(table):.3f}; this one comes nearest"
    return (
        f"the earliest within {TOLERANCE:g} of the highest likeness ({chosen.value('likeness'):.3f}) of the states "
        f"whose fidelity ({chosen.value('fidelity'):.3f}) is not below {floor(table):.3f}"
    )


def _advice(word: str, state: State, chosen: State) -> str:
    if word == "under-trained":
        return "Train for more steps, or at a higher rate."
    if word == "over-trained":
        other = f"Take {chosen.name}. " if chosen.name != state.name else ""
        return f"{other}Train for fewer steps or at a lower rate, with prior preservation, or on more pictures."
    if chosen.name != state.name:
        return f"It can be used as it is; {chosen.name} is as like and has forgotten less."
    return "Use it as it is." if word == "good" else "Measure it with at least two real pictures."


def _interval(one: Estimate | Figure, how: str = ".3f") -> str:
    return f"{one.low:{how}} to {one.high:{how}}"


def _number(value: float) -> float:
    return -math.inf if math.isnan(value) else value
