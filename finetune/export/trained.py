"""What was trained, found again: a run's result, one of its checkpoints, an adapter file, a whole model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune import adapters, checkpoints, config, embeddings, families, ledger, optim, words
from finetune.adapters import NAME
from finetune.errors import Failure, Fault
from finetune.export import formats, in_weights, metadata
from finetune.export.carried import carried
from finetune.export.compare import coarsest, other_changes
from finetune.export.content import Adapter
from finetune.export.reading import attach, listed
from finetune.families import Family, Source
from finetune.keeping import best_step
from finetune.loop import named
from finetune.settings import Adapter as AdapterSettings
from finetune.settings import Optim, Words
from finetune.words import Vectors


@dataclass(frozen=True)
class Trained:
    """Where it lies: one of `file`, `folder` and `checkpoint`. Nothing but headers is read yet."""

    name: str
    """What its files are called after."""
    file: Path | None = None
    """An adapter file."""
    adapter: Adapter | None = None
    """What the file holds."""
    folder: Path | None = None
    """A diffusers folder of a whole model."""
    checkpoint: Path | None = None
    """A state of a run."""
    embeddings: tuple[Path, ...] = ()
    """Files of new words, alone or beside the adapter."""
    run: Path | None = None
    """The run's folder, where it is of a run."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the run, by table."""

    @property
    def said(self) -> str:
        """What it is."""
        kind = "the adapter" if self.adapts else "the embedding" if self.words else "the model"
        return f"{kind} of {self.checkpoint.name}" if self.checkpoint is not None else kind

    @property
    def adapts(self) -> bool:
        """Whether it is an adapter; else it is a whole model."""
        return self.file is not None or (self.checkpoint is not None and "adapter" in self.settings)

    @property
    def words(self) -> list[str]:
        """The new words that text encoders were taught."""
        return words.names(self.settings)

    def family(self, base: Source | None) -> type[Family]:
        """Of the base, or what the adapter's file says. Raises Fault when these differ, or where there is neither."""
        if base is None:
            if self.adapter is None:
                raise Fault(f"{self.run}: its settings do not say which base it was trained from. Name it: --model.")
            return formats.known_family(self.adapter)
        own = base.pipeline_class()
        made_for = self.adapter and self.adapter.family
        if made_for and families.known(made_for) is not families.known(own):
            raise Fault(f"{self.file}: an adapter for {made_for}; {base.model} is a {own}.")
        return families.known(own)

    def base(self) -> Source | None:
        """The model that it was trained from. Raises Fault when that lies on this machine and is another one now."""
        if self.folder is not None:
            told = self.settings.get("model", {})
            return Source(str(self.folder), clip_skip=told.get("clip_skip"), text_chunks=told.get("text_chunks"))
        if self.run is None or "model" not in self.settings:
            return None
        source, entry = Source(**self.settings["model"]), ledger.read(self.run)
        known = entry.identity.get("base") if entry else None
        here = source.folder is not None or source.file is not None
        if here and known is not None and source.identity() != known:
            raise Fault(f"{source.model}: not the model that {self.run} was trained from any more. Name it: --model.")
        return source


@dataclass(frozen=True)
class Loaded:
    """The same in memory."""

    adapter: Adapter | None
    """None for a whole model."""
    family: Family | None
    """The whole model; or the base with the adapter, None where no base is at hand."""
    carries: bool
    """Whether the family carries the adapter beside its weights; else it is in them."""
    metadata: Mapping[str, str]
    """What its files' headers say of it."""
    words: Mapping[str, Vectors] = field(default_factory=dict)
    """What the new words have become."""


def find(place: Path, step: str | None = None) -> Trained:
    """`place`: a run's folder, an adapter file, or a diffusers folder. `step`: a run's checkpoint, "best" or "last".

    An unfinished run gives its newest checkpoint. Raises Fault when there is no such thing.
    """
    if not place.exists():
        raise Fault(f"{place}: there is no such file or folder. Name a run's folder or an adapter file.")
    run = (place / ledger.SETTINGS).is_file()
    if step is not None and not run:
        raise Fault(f"--step {step}: {place} is no run's folder, and only a run has checkpoints.")
    if place.is_file():
        return Trained(place.stem, file=place, adapter=formats.read(place))
    if not run:
        if (place / "model_index.json").is_file():
            return Trained(place.resolve().name, folder=place)
        raise Fault(
            f"{place}: no run: it has no {ledger.SETTINGS}. Name a run's folder, an adapter file or a diffusers folder."
        )
    name, settings = place.resolve().name, config.tables(place / ledger.SETTINGS)
    file, folder = place / "adapter.safetensors", place / "model"
    new = tuple(place / f"{word}.safetensors" for word in words.names(settings))
    beside = new if all(one.is_file() for one in new) else ()
    if step is None and file.is_file():
        return Trained(name, file=file, adapter=formats.read(file), embeddings=beside, run=place, settings=settings)
    if step is None and beside and "adapter" not in settings:
        return Trained(name, embeddings=beside, run=place, settings=settings)
    if step is None and folder.is_dir():
        return Trained(name, folder=folder, run=place, settings=settings)
    checkpoint = _checkpoint(place, step or "last")
    return Trained(f"{name}-{checkpoint.name}", checkpoint=checkpoint, run=place, settings=settings)


def load(trained: Trained, source: Source | None) -> Loaded:
    """In float32 on the CPU, so that each weight is rounded once, when it is written. `source`: the base, if any."""
    if trained.checkpoint is not None:
        return _load_state(trained, trained.checkpoint, source)
    if trained.file is None:
        family = families.load(source or Source(str(trained.folder)))
        return Loaded(
            None, family, False, metadata.of_run(family, trained.settings, None), _put_words_on(family, trained)
        )
    adapter = trained.adapter or formats.read(trained.file)
    told = metadata.passed_on(adapter.metadata)
    if source is None:
        return Loaded(adapter, None, False, told)
    family = families.load(source)
    learned = _put_words_on(family, trained)
    carries = put_on(family, adapter, trained.file)
    return Loaded(adapter, family, carries, told, learned)


def _put_words_on(family: Family, trained: Trained) -> dict[str, Vectors]:
    """Teach the base the words of the run's files. What they are."""
    learned: dict[str, Vectors] = {}
    for word, path in zip(trained.words, trained.embeddings, strict=bool(trained.embeddings)):
        read = embeddings.read(path)
        embeddings.put_on(family, read)
        learned[word] = dict(zip(families.text_encoders(family), read.vectors, strict=True))
    return learned


def put_on(family: Family, adapter: Adapter, path: Path) -> bool:
    """Put an adapter of any format and kind on its base: beside the weights where diffusers can load it, else in them.

    Says which. `path`: what to call it in messages. Raises Fault when it is not of this base.
    """
    if formats.refused(adapter, "diffusers", type(family)) is not None:
        in_weights.put(family, adapter, NAME, path)
        return False
    with tempfile.TemporaryDirectory() as folder:  # diffusers takes one alpha of a kohya file for all layers
        file = Path(folder) / "adapter.safetensors"
        formats.write(file, adapter, "diffusers", {}, None, type(family))
        try:
            attach(family, file, NAME)
        except Fault as fault:
            raise Fault(fault.message.replace(str(file), str(path)), fault.details) from fault
    if wrong := other_changes(adapter, carried(family, NAME), coarsest(adapter.dtypes())):
        raise Failure(f"{path}: diffusers does not load it as it is:", listed(wrong))
    return True


def _checkpoint(run: Path, step: str) -> Path:
    """The folder of a whole checkpoint of the run."""
    newest, _ = checkpoints.newest(run)
    if newest is None:
        raise Fault(f"{run}: nothing to export yet: the run has no whole checkpoint. Go on with it: --resume.")
    steps = checkpoints.steps(run)
    best = best_step(run, newest.state["training"]["validations"], steps)
    if step == "best" and best is None:
        raise Fault(
            f"{run}: --step best: nothing was measured to choose by: neither what was learned (--measure in training) "
            "nor a loss on held-out pictures (--validation 0.2)."
        )
    asked = {"last": newest.step, "best": best}.get(step, int(step) if step.isdecimal() else None)
    if asked is None or asked not in steps:
        raise Fault(f"{run}: --step {step}: there are checkpoints of {', '.join(map(str, steps))}, best and last.")
    found = run / checkpoints.name(asked)
    if asked != newest.step and not checkpoints.is_whole(found):
        raise Fault(f"{found}: a broken checkpoint. Take another one: {', '.join(map(str, steps))}.")
    return found


def become(family: Family, path: Path, state: Mapping[str, Any] | None = None) -> None:
    """A model that was prepared to train takes, for good, the weights to use of a checkpoint (its average's, if any).

    `state`: what the checkpoint holds, where it is in memory. Raises Fault when it is of other weights.
    """
    state = state or checkpoints.load(path).state
    training, how = state["training"], Optim(**state["settings"]["optim"])
    plus = state["settings"].get("adapter", {}).get("lora_plus_ratio", 1.0)
    groups = adapters.groups(family, how.lr, how.text_encoder_lr, plus) + adapters.taught(family, how.lr)
    average = training["average"]["average"] if training["average"] else None
    _put_back(path, named(family, groups), average or training["parameters"])
    _put_back(path, adapters.beside(family), training.get("beside", {}))
    if how.optimizer == "schedulefree":  # it trains at other points than those to use, and knows them
        optimizer = optim.optimizer(groups, how, torch.device("cpu"))
        optimizer.load_state_dict(training["optimizer"])
        optim.settle(optimizer)


def _load_state(trained: Trained, path: Path, source: Source | None) -> Loaded:
    """The state of a checkpoint, put back onto the base as the recipe had it."""
    state = checkpoints.load(path).state
    settings = state["settings"]
    family = families.load(source or Source(**settings["model"]))
    how = Optim(**settings["optim"])
    rates = how.lr, how.text_encoder_lr
    if trained.adapts:
        adapters.adapt(family, AdapterSettings(**_given(settings["adapter"])), *rates, seed=0)
    elif not trained.words:
        adapters.full(family, *rates, parts=settings.get("full", {}).get("parts", ()))
    if trained.words:
        adapters.teach(family, trained.words, Words(**_given(settings["words"])), how.lr, settings["train"]["seed"])
    become(family, path, state)
    learned = words.vectors(family, trained.words) if trained.words else {}
    words.settle(family)
    adapter = carried(family, NAME) if trained.adapts else None
    told = metadata.of_run(family, settings, "lora" if trained.adapts else None)
    return Loaded(adapter, family, trained.adapts, told, learned)


def _given(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table's settings as their dataclass has them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}


def _put_back(path: Path, parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    if parameters.keys() != values.keys():
        raise Fault(f"{path}: holds other weights than its settings give:", listed(parameters.keys() ^ values.keys()))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
