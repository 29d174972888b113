"""The rule that chooses the best state, and the verdict, over tables that were written by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from finetune.evaluation import measures, verdict
from finetune.evaluation.tables import BASE, Figure, State, Table, Verdict

PROMPTS = 6


def figure(measure: str, value: float, spread: float = 0.02) -> Figure:
    """A mean over prompts that differ a little, always in the same way."""
    values = [value + spread * (number - (PROMPTS - 1) / 2) / PROMPTS for number in range(PROMPTS)]
    told = measures.bootstrap(values, 0, measure)
    return Figure(measure, measure, told.value, told.low, told.high, told.units, "judge", "scale", tuple(values))


def state(step: int, likeness: float, fidelity: float = 0.30, drift: float = 0.0, copies: float = 0.0) -> State:
    values = {"likeness": likeness, "fidelity": fidelity, "class drift": drift, "copies": copies}
    name = f"step-{step:06d}" if step else BASE
    return State(name, step, {measure: figure(measure, value) for measure, value in values.items()})


def table(*states: State, real: float = 1.0) -> Table:
    return Table("run", "short", [state(0, 0.0), *states], {verdict.REAL: real})


def test_the_best_is_the_earliest_within_the_tolerance_of_the_highest() -> None:
    told = table(state(100, 0.5), state(200, 0.795), state(300, 0.8), state(400, 0.78))
    assert verdict.best(told).step == 200
    assert verdict.best(table(state(100, 0.5), state(200, 0.78), state(300, 0.8))).step == 300


def test_a_style_that_other_prompts_take_on_is_over_trained() -> None:
    told = replace(table(state(100, 0.8, drift=0.9)), protocol="style")
    said = verdict.judge(told)
    assert said.word == "over-trained" and "prompts that do not ask for the style have taken it on: 90%" in said.reason


def test_below_the_floor_no_likeness_helps() -> None:
    told = table(state(100, 0.6, fidelity=0.29), state(200, 0.9, fidelity=0.26))
    assert verdict.floor(told) == pytest.approx(0.27)
    assert verdict.best(told).step == 100


def test_where_no_state_reaches_the_floor_the_nearest_is_the_best() -> None:
    told = table(state(100, 0.6, fidelity=0.2), state(200, 0.9, fidelity=0.25))
    assert verdict.best(told).step == 200
    assert "no state reaches the floor" in verdict.judge(told).best_reason


def test_a_state_without_a_likeness_is_never_the_best() -> None:
    told = table(state(100, math.nan), state(200, 0.4))
    assert verdict.best(told).step == 200


def test_good() -> None:
    said = verdict.judge(table(state(100, 0.4), state(200, 0.8)))
    assert (said.word, said.state, said.best) == ("good", "step-000200", "step-000200")
    assert "80%" in said.reason and "Use it as it is" in said.advice


def test_under_trained() -> None:
    said = verdict.judge(table(state(100, 0.1), state(200, 0.4)))
    assert said.word == "under-trained" and "40% (" in said.reason and "more steps" in said.advice


def test_how_far_is_measured_from_the_base_to_the_real_pictures() -> None:
    """The same likeness is much where real pictures of the subject are not very alike."""
    assert verdict.judge(table(state(100, 0.4), real=0.6)).word == "good"
    assert verdict.judge(table(state(100, 0.4), real=math.nan)).word == "unknown"


def test_over_trained_where_prompts_are_not_followed() -> None:
    said = verdict.judge(table(state(100, 0.8), state(200, 0.9, fidelity=0.2)))
    assert (said.word, said.best) == ("over-trained", "step-000100")
    assert "floor 0.270" in said.reason and said.advice.startswith("Take step-000100.")


def test_over_trained_where_likeness_was_higher() -> None:
    said = verdict.judge(table(state(100, 0.8), state(200, 0.7)))
    assert said.word == "over-trained" and "0.100 (0.100 to 0.100) less than step-000100 had" in said.reason


def test_an_interval_that_crosses_the_line_carries_no_alarm() -> None:
    wide = State("step-000200", 200, {**state(200, 0.8).figures, "fidelity": figure("fidelity", 0.26, spread=0.2)})
    assert wide.figures["fidelity"].high > 0.27
    assert verdict.judge(table(state(100, 0.8), wide)).word == "good"


def test_over_trained_where_the_class_has_become_the_subject() -> None:
    said = verdict.judge(table(state(100, 0.8, drift=0.7)))
    assert said.word == "over-trained" and "bare class" in said.reason
    assert verdict.judge(table(state(100, 0.8, drift=0.45))).word == "good"


def varied(one: State, variety: float, spread: float = 0.02, pictures: int = verdict.ENOUGH) -> State:
    told = replace(figure("class diversity", variety, spread), units=pictures)
    return State(one.name, one.step, {**one.figures, "class diversity": told})


def test_over_trained_where_the_class_has_lost_its_variety() -> None:
    """It need not have become like the subject: all toys may be green, and no toy be pip."""

    def judged(variety: float, spread: float = 0.02, pictures: int = verdict.ENOUGH) -> Verdict:
        states = [varied(state(0, 0.0), 0.6), varied(state(100, 0.8), variety, spread, pictures)]
        return verdict.judge(Table("run", "short", states, {verdict.REAL: 1.0}))

    said = judged(0.3)
    assert said.word == "over-trained" and "differ 50% (49% to 51%) as much as the base's" in said.reason
    assert judged(0.5).word == "good"
    assert judged(0.45, spread=0.4).word == "good"  # 75 %, but with an interval that reaches 80 %
    assert judged(0.3, pictures=2).word == "good", "one distance has no interval"


def test_over_trained_where_samples_are_copies() -> None:
    said = verdict.judge(table(state(100, 0.8, copies=0.4)))
    assert said.word == "over-trained" and "copy a training picture" in said.reason


def test_the_verdict_on_an_earlier_state_is_asked_by_name() -> None:
    told = table(state(100, 0.4), state(200, 0.8))
    assert verdict.judge(told, "step-000100").word == "under-trained"


def test_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError, match="no trained state"):
        verdict.best(table())
