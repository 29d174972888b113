"""The page: facts, pictures and curves put into the template, everything escaped, nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from finetune import __version__, disk, toml
from finetune.errors import Fault
from finetune.evaluation.tables import BASE, Figure, State, Table
from finetune.report import curves, facts, gallery, usage
from finetune.report.curves import Chart, Line
from finetune.report.facts import Facts
from finetune.report.gallery import called
from finetune.report.record import Box
from finetune.report.thumbnails import SIDE
from finetune.weights import said

FILE = "report.html"
GENERATOR = '<meta name="generator" content="finetune report">'
"""By which a report is known from a file of somebody else's"""
HALF = 480
"""Pixels that a curve has where two stand side by side"""
ASKS = {
    "likeness": "Is it the subject?",
    "likeness 2": "Is it the subject, seen by another model?",
    "fidelity": "Does it show what the words say?",
    "class drift": "Has the bare class become the subject?",
    "diversity": "Do pictures of one prompt differ?",
    "drift": "Has what is unrelated moved?",
    "copies": "Are training pictures given back?",
}
WORDS = {"good": "good", "over-trained": "over", "under-trained": "under"}
"""How a verdict looks"""
STATES = {
    "running": "is being trained",
    "finished": "finished",
    "stopped": "was stopped, its state kept",
    "interrupted": "was interrupted",
    "failed": "has failed",
    "unknown": "whether it has ended is not known",
}


@dataclass(frozen=True)
class Head:
    """What is said first."""

    word: str
    look: str
    reason: str
    advice: str
    best: str = ""
    best_reason: str = ""


@dataclass(frozen=True)
class Card:
    """One measure over the states."""

    title: str
    ask: str
    figure: Figure
    """Of the chosen state"""
    state: str
    svg: Markup


def write(run: Path, file: Path) -> None:
    """Write the report of a run, whole or not at all. Raises Fault for what is no run."""
    disk.write_text(file, render(facts.read(run)))


def refresh(run: Path) -> None:
    """Make the report in a run's folder anew, where there is one."""
    if (run / FILE).is_file() and _is_report(run / FILE):
        write(run, run / FILE)


def require_own(file: Path) -> None:
    """Raises Fault where a file is somebody else's, or cannot be there."""
    if not file.parent.is_dir():
        raise Fault(f"{file}: there is no folder {file.parent}; nothing was created.")
    if file.is_dir():
        raise Fault(f"{file}: a folder. Name an HTML file to write: --output FILE.")
    if file.exists() and not _is_report(file):
        raise Fault(f"{file}: is there already and is no report, so it is not written over. Name another --output.")


def _is_report(file: Path) -> bool:
    return GENERATOR in file.read_bytes()[:2000].decode("utf-8", "replace")


def render(told: Facts, live: str | None = None) -> str:
    """The page. `live`: the version that a page which follows the run compares with what the server has."""
    grid = gallery.grid(told)
    best = told.verdict.best if told.verdict else None
    scripts = [_text("page.js"), *([_text("live.js")] if live is not None else [])]
    return (
        _environment()
        .get_template("page.html")
        .render(
            facts=told,
            head=_head(told),
            state=STATES.get(told.state, told.state),
            left=_left(told),
            grid=grid,
            chosen=next((number for number, state in enumerate(grid.columns) if state.name == best), None),
            cards=_cards(told),
            measuring=_measuring(told),
            losses=_losses(told),
            pairs=[(state, gallery.pairs(told, state)) for state in _with_pairs(told)],
            trained=gallery.trained(told),
            samples=gallery.samples(told),
            settings=_settings(told.settings),
            uses=list(usage.uses(told)),
            style=_style(),
            scripts=[Markup(script) for script in scripts],
            policy=_policy(scripts, live is not None),
            generator=Markup(GENERATOR),
            live=live,
            side=SIDE,
            made=time.strftime("%Y-%m-%d %H:%M", time.localtime(told.updated)),
            version=__version__,
        )
    )


def _head(told: Facts) -> Head:
    if told.verdict is not None:
        verdict = told.verdict
        word, look = verdict.word or "unknown", WORDS.get(verdict.word, "unknown")
        reason = f"{_begun(called(verdict.state))}: {called(verdict.reason)}." if verdict.reason else ""
        best = called(verdict.best), called(verdict.best_reason)
        return Head(_begun(word), look, reason, called(verdict.advice), *best)
    lowest = min(told.log.validation, key=lambda point: point[1], default=None)
    held = f" Its loss on held-out pictures was lowest at step {lowest[0]}: {lowest[1]:.4f}." if lowest else ""
    if told.state == "running":
        return Head("In training", "unknown", f"Nothing was measured yet.{held}", "")
    return Head("Not measured", "unknown", f"Whether it is any good was not measured yet.{held}", _measuring(told))


def _measuring(told: Facts) -> str:
    return f"`{usage.shell('evaluate', str(told.folder))}` says whether it is under-trained, good or over-trained."


def _begun(text: str) -> str:
    """As a sentence begins."""
    return text[:1].upper() + text[1:]


def _left(told: Facts) -> str:
    """How long it goes on."""
    if told.state != "running" or not told.log.last:
        return ""
    return f"about {duration(told.log.last * (told.steps - told.step))} left"


def _cards(told: Facts) -> list[Card]:
    if told.table is None:
        return []
    measures = dict.fromkeys(name for state in told.table.states for name in state.figures)
    return [_card(told.table, name, told.verdict.best if told.verdict else None) for name in measures]


def _card(table: Table, measure: str, best: str | None) -> Card:
    states = [*(state for state in table.states if state.name == BASE), *table.trained]
    measured = [state for state in states if measure in state.figures]
    chosen = next((state for state in measured if state.name == best), measured[-1])
    figure = chosen.figures[measure]
    trained = [state for state in measured if state.name != BASE]
    shown = trained or measured
    known = [state for state in shown if state.value(measure) == state.value(measure)]
    line = Line(
        "",
        [(state.step, state.value(measure)) for state in known],
        band=[(state.step, state.figures[measure].low, state.figures[measure].high) for state in known],
    )
    base = next((state.value(measure) for state in measured if state.name == BASE), None)
    chart = Chart(
        f"{measure} by step",
        "; ".join(f"{called(state.name)}: {value_of(state.figures[measure])}" for state in measured),
        [line],
        (chosen.step, f"chosen: {called(chosen.name)}") if chosen.name == best and chosen in known else None,
        (base, f"base {curves.number(base)}") if base is not None and base == base else None,
    )
    return Card(_title(measure, figure), ASKS.get(measure, ""), figure, called(chosen.name), chart.svg())


def _title(measure: str, figure: Figure) -> str:
    name = measure.rstrip(" 2").capitalize()
    return name if figure.title.lower() == measure else f"{name} ({figure.title})"


def value_of(figure: Figure) -> str:
    """`.779 (.757 to .801)`, as the tables have it."""
    if figure.value != figure.value:
        return "not to be had"
    return f"{figure.value:.3f}" + (f" ({figure.low:.3f} to {figure.high:.3f})" if figure.units > 1 else "")


@dataclass(frozen=True)
class Curve:
    """What the log tells of each step."""

    title: str
    note: str
    """What to know of it"""
    on_desk: Markup
    on_phone: Markup
    wide: bool = False


def _losses(told: Facts) -> list[Curve]:
    log = told.log
    found: list[Curve] = []
    if log.loss:
        lines = [Line("each step", log.loss, "raw"), Line("smoothed", curves.smoothed(log.loss), "smooth")]
        first, last = lines[1].points[0][1], lines[1].points[-1][1]
        said = f"Loss of {len(log.loss)} steps; smoothed it went from {first:.4f} to {last:.4f}."
        chart = Chart("loss by step", said, lines)
        note = "It swings with the noise of each step: look at where it goes, not at single steps."
        found.append(Curve("Training loss", note, chart.svg(860), chart.svg(), wide=True))
    if log.validation:
        step, lowest = min(log.validation, key=lambda point: point[1])
        said = f"Loss on held-out pictures, lowest at step {step}: {lowest:.4f}."
        mark = step, f"lowest: step {step}"
        chart = Chart("loss on held-out pictures by step", said, [Line("", log.validation)], mark)
        note = "Always at the same noise and timesteps; rising means learning by heart."
        found.append(Curve("Loss on held-out pictures", note, chart.svg(HALF), chart.svg()))
    if log.rate:
        rates = [value for _, value in log.rate]
        said = f"Learning rate, from {min(rates):.2e} to {max(rates):.2e}."
        chart = Chart("learning rate by step", said, [Line("", log.rate, "smooth")])
        note = "The denoiser's, by which weights moved."
        found.append(Curve("Learning rate", note, chart.svg(HALF), chart.svg()))
    return found


def _with_pairs(told: Facts) -> list[State]:
    """The chosen state, and the one that the verdict is about; by step."""
    if told.table is None:
        return []
    last = {state.name for state in told.table.trained[-1:]}
    names = {told.verdict.best, told.verdict.state} if told.verdict else last
    return [state for state in told.table.trained if state.name in names and state.copies]


def _settings(told: Mapping[str, Any], name: str = "") -> list[tuple[str, list[tuple[str, str]]]]:
    """Tables of settings with their lines; several tables of one name are numbered."""
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    plain = [(key, _value(value)) for key, value in told.items() if not _is_table(value)]
    if plain:
        groups.append((name or "run", plain))
    for key, value in told.items():
        if isinstance(value, Mapping):
            groups += _settings(value, key)
        elif _is_table(value):
            groups += [group for number, one in enumerate(value, 1) for group in _settings(one, f"{key} {number}")]
    return groups


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(one, Mapping) for one in value))


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return toml.value(value)
    except (TypeError, ValueError):  # dates and the like, which are nobody's setting
        return str(value)


def _policy(scripts: Sequence[str], live: bool) -> str:
    """Content-Security-Policy: pictures that stand in the page, and exactly its own style and scripts."""
    return "; ".join([
        "default-src 'none'",
        "img-src data:",
        f"style-src {_hash(_text('style.css'))}",
        f"script-src {' '.join(map(_hash, scripts))}",
        *(["connect-src 'self'"] if live else []),
        "base-uri 'none'",
        "form-action 'none'",
    ])  # fmt: skip


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _style() -> Markup:
    return Markup(_text("style.css"))


@cache
def _text(name: str) -> str:
    """A file of this package; in it nothing ends a style or script early."""
    return (resources.files("finetune.report") / "assets" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("finetune.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,  # a run of days keeps to the page that it began with
    )
    made.filters |= {"called": called, "value_of": value_of, "size": said, "what": usage.what}
    made.filters |= {"code": code, "heat": heat, "outline": outline, "is_whole": is_whole, "time": duration}
    return made


def code(text: str) -> Markup:
    """What stands between backticks set as code, all of it escaped."""
    parts = [Markup("<code>{}</code>").format(part) if number % 2 else escape(part)
             for number, part in enumerate(text.split("`"))]  # fmt: skip
    return Markup("").join(parts)


def heat(value: float | None) -> int:
    """0 to 4: how dark a cell of likeness is."""
    return 0 if value is None or value != value else min(4, max(0, int(value * 5)))


def outline(box: Box) -> str:
    """A crop as a path in a picture of 100 x 100."""
    top, left, bottom, right = (100 * side for side in box)
    return f"M{left:.2f} {top:.2f}V{bottom:.2f}H{right:.2f}V{top:.2f}Z"


def is_whole(box: Box) -> bool:
    """Whether a crop is all of the picture, but for what nobody sees."""
    return max(box[0], box[1], 1 - box[2], 1 - box[3]) < 0.005


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
