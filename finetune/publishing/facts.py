"""What a run's folder tells of it, read without torch: settings, how long it took, losses on held-out pictures."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune import ledger, provenance, weights
from finetune.config import new_words
from finetune.errors import Fault
from finetune.evaluation import tables
from finetune.evaluation.tables import State

ADAPTER, MODEL = "adapter.safetensors", "model"
"""What recipes write: an adapter, or a whole model as a diffusers folder."""
SPOKEN = (
    *("prompt", "trigger", "template", "class_prompt", "class_word", "sample_prompts", "title", "author"),
    *("description", "license", "tags", "target", "positive", "negative", "preserve", "word", "init_words"),
)
"""Settings whose words are told on purpose."""
TABLE = {
    "steps": "steps",
    "batch_size": "pictures a pass",
    "accumulation": "passes a step",
    "method": "method",
    "parts": "parts that train",
    "rank": "rank",
    "alpha": "alpha",
    "conv_rank": "rank of convolutions",
    "init": "begun with",
    "factor": "factor",
    "vectors": "vectors of a new word",
    "init_words": "a new word's beginning",
    "word_lr": "learning rate of new words",
    "word_until": "share of the steps that these train",
    "adapter_from": "share of them before the adapter",
    "lr": "learning rate",
    "text_encoder_lr": "learning rate of the text encoders",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "resolution": "resolution",
    "quantize": "frozen base",
    "clip_skip": "clip skip",
    "text_chunks": "chunks of 75 tokens",
    "prior": "prior preservation",
    "min_snr_gamma": "min-SNR gamma",
    "ema": "EMA decay",
    "precision": "precision",
    "seed": "seed",
}
"""Settings that the card tells, and what it calls them."""


@dataclass(frozen=True)
class Facts:
    run: Path
    settings: Mapping[str, Any]
    """By table, as in settings.toml"""
    log: tuple[Mapping[str, Any], ...]
    """The lines of log.jsonl"""

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The settings by name."""
        return dict(provenance.leaves(self.settings))

    @property
    def adapter(self) -> Path | None:
        """The adapter; None where a whole model was trained."""
        return self.run / ADAPTER if (self.run / ADAPTER).is_file() else None

    @cached_property
    def taught(self) -> list[str]:
        """The new words that text encoders were taught."""
        return new_words(self.settings)

    @property
    def embeddings(self) -> list[Path]:
        """The file of each."""
        return [self.run / f"{word}{weights.SUFFIX}" for word in self.taught]

    @property
    def whole(self) -> bool:
        """Whether a whole model was trained."""
        return self.adapter is None and not self.taught

    @property
    def result(self) -> list[Path]:
        """The files of what was trained."""
        if self.whole:
            return sorted(path for path in (self.run / MODEL).rglob("*") if path.is_file())
        return [*([self.adapter] if self.adapter else []), *self.embeddings]

    @property
    def lost(self) -> list[str]:
        """What was trained and is not there."""
        if not self.taught:
            return [] if self.result else [f"neither {ADAPTER} nor {MODEL}"]
        adapter = [self.run / ADAPTER] if "adapter" in self.settings else []
        return [f"no {file.name}" for file in (*adapter, *self.embeddings) if not file.is_file()]

    @property
    def concepts(self) -> list[Mapping[str, Any]]:
        """What was learned: the table `data`, and those of `concepts`."""
        return [self.settings.get("data") or {}, *(self.settings.get("concepts") or ())]

    @property
    def words(self) -> list[str]:
        """The new words, or the triggers, or else the prompts that stand for all captions."""
        if self.taught:
            return self.taught
        for name in ("trigger", "prompt"):
            if words := [str(one[name]) for one in self.concepts if one.get(name)]:
                return list(dict.fromkeys(words))
        return []

    @property
    def prompts(self) -> list[str]:
        """What the run drew its samples of, or was trained with; of new words each is said, and none goes without."""
        asked = self.flat.get("sample_prompts") or [one["prompt"] for one in self.concepts if one.get("prompt")]
        drawn = list(dict.fromkeys(map(str, asked)))
        if self.taught:
            drawn = [prompt for prompt in drawn if any(word in prompt for word in self.taught)]
            return [*drawn, *(word for word in self.taught if not any(word in prompt for prompt in drawn))]
        return drawn or self.words or [self.slider["target"]] * bool(self.slider)

    @property
    def slider(self) -> Mapping[str, Any]:
        """The table of a slider's prompts; empty for everything else."""
        return self.settings.get("slider") or {}

    @property
    def strengths(self) -> tuple[float, ...]:
        """Those of the adapter that show what it does."""
        return tuple(self.slider.get("strengths", (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)))

    @property
    def spoken(self) -> str:
        """All that the settings tell in words."""
        tables = [self.flat, *self.concepts]
        told = [table[name] for table in tables for name in SPOKEN if table.get(name)]
        return "\n".join(" ".join(one) if isinstance(one, list) else str(one) for one in told)

    @cached_property
    def model(self) -> str:
        """The base as it may be told: a hub name, `toybox`, or `local`. An adapter's header knows it best."""
        told = json.loads(self.header.get("finetune", "{}"))
        return str(told.get("model") or provenance.public_model(str(self.flat.get("model") or "")))

    @property
    def base(self) -> str | None:
        """The base's hub name; None for `toybox`, and for what lies on this machine."""
        return self.model if "/" in self.model else None

    @property
    def embedded(self) -> bool:
        return self.model == "toybox"

    @cached_property
    def header(self) -> dict[str, str]:
        """What the adapter's file, or a new word's, says of itself."""
        return {} if self.whole else weights.read_metadata(self.result[0])

    @property
    def training(self) -> dict[str, str]:
        """What the card tells of the training, by name."""
        counted = {"pictures": self.header.get("ss_num_train_images"), "size": self.header.get("modelspec.resolution")}
        told = {name: value for name, value in counted.items() if value}
        told |= {title: _said(self.flat[name]) for name, title in TABLE.items() if _is_set(self.flat.get(name))}
        if self.log:
            told["time of its steps"] = str(timedelta(seconds=round(sum(float(line["seconds"]) for line in self.log))))
        return told

    @property
    def held_out(self) -> dict[int, float]:
        """Loss on the held-out pictures by step."""
        return {line["step"]: line["validation"] for line in self.log if line.get("validation") is not None}

    @cached_property
    def measured(self) -> tuple[State, State] | None:
        """The base and the result, as they were measured last. Raises Fault for a table that cannot be read."""
        for folder in tables.FOLDERS:
            file = self.run / folder / tables.FILE
            if not file.is_file():
                continue
            try:
                table = tables.from_json(file.read_text(encoding="utf-8"))
                last = table.trained[-1]
            except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise Fault(
                    f"{file}: this table cannot be read. Measure again: `finetune evaluate {self.run}`."
                ) from error
            if last.name == tables.RESULT or last.step == self.steps:
                return table.base, last
        return None

    @property
    def steps(self) -> int:
        """How far the training went."""
        return max((int(line["step"]) for line in self.log), default=0)


def read(run: Path) -> Facts:
    """Raises Fault where there is no run, or one that is not finished."""
    if not run.is_dir():
        raise Fault(f"{run}: there is no such folder. Name a run's folder, the --output of a training.")
    if not (run / ledger.SETTINGS).is_file():
        raise Fault(f"{run}: no run: it has no {ledger.SETTINGS}. Name the --output of a training.")
    entry = ledger.seen(run)
    if entry is None or entry.state != "finished":
        how = f"{entry.state}, {entry.step} of {entry.steps} steps" if entry else "without run.json"
        raise Fault(f"{run}: the run is not finished ({how}). Go on: `finetune train --output {run} --resume`.")
    facts = Facts(
        run, tomllib.loads((run / ledger.SETTINGS).read_text(encoding="utf-8")), tuple(_log(run / ledger.LOG))
    )
    if facts.lost:
        raise Fault(f"{run}: what was trained is not there any more: {', '.join(facts.lost)}.")
    return facts


def _log(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _is_set(value: Any) -> bool:
    return value not in (None, [], "auto", "default", -1) and not (isinstance(value, float) and value == 0.0)


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
