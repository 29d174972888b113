"""finetune export RUN_OR_FILE: what was trained, in the formats that programs read; each file is loaded back first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from finetune.errors import Fault
from finetune.imports import swift

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from finetune.export.trained import Loaded, Trained
    from finetune.families import Source

Form = Literal["diffusers", "kohya", "peft", "embedding", "merged", "single-file", "all"]
FILES = {
    "diffusers": "{}-diffusers.safetensors",
    "kohya": "{}-kohya.safetensors",
    "peft": "{}-peft.safetensors",
    "embedding": "",
    "merged": "{}-merged",
    "single-file": "{}-single-file.safetensors",
}
"""What is written for each format, in this order. Embeddings are called by their words, as programs call them."""
ADAPTERS = ("diffusers", "kohya", "peft")
"""Those that hold an adapter alone; the others hold the whole model."""


@dataclass(frozen=True)
class Config:
    """Write what was trained in the formats that programs read. Each file is loaded back and compared."""

    source: Positional[Path]
    """A run's folder, an adapter file of any format, or a diffusers folder."""
    format: tuple[Form, ...]
    """`kohya`: an adapter for A1111, Forge, ComfyUI, InvokeAI and sd-scripts. `diffusers`: one for diffusers and PEFT.
    `peft`: LoHa, LoKr, OFT and (IA)3 for PEFT. `embedding`: new words, for all of them; an adapter that was trained
    around them brings them with it.
    `merged`: the whole model as a diffusers folder. `single-file`: the whole model as one checkpoint for all of them.
    `all`: each that applies."""
    output: Path
    """Folder to write to. Nothing that is there is written over."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Precision of the files."""
    step: str | None = None
    """A run's checkpoint: its step, `best` or `last`. Default: what the run exported at its end; of an unfinished run
    the last checkpoint."""
    model: str | None = None
    """The base: needed to make a whole model of an adapter file. Default: the one that the run was trained from."""
    revision: str | None = None
    """Branch, tag or commit of a base from the hub."""
    model_config: str | None = None
    """For a base that is a .safetensors checkpoint: folder or hub name of a diffusers model of the same kind."""
    name: str | None = None
    """What the files are called after. Default: the name of the run's folder or of the file."""


def main(config: Config) -> None:
    with swift():
        from finetune import weights
        from finetune.export import trained

    # What can be refused is refused before a model is loaded.
    found = trained.find(config.source, config.step)
    source = _base(config, found)
    forms = _forms(config, found, source)
    words = found.words if {"embedding", *ADAPTERS} & set(forms) else []
    files = {word: config.output / f"{word}.safetensors" for word in words}
    targets = _targets(config, found, [form for form in forms if form != "embedding"])
    _make_room(config.output, [*targets.values(), *files.values()])
    loaded = trained.load(found, source)
    for form, target in targets.items():
        _write(loaded, form, target, config.dtype)
    if words:
        _write_words(loaded, found, source, files)
    print(f"{config.source}: {found.said}, written in {config.dtype}, loaded back and found equal:")
    for target in (*targets.values(), *files.values()):
        size = sum(path.stat().st_size for path in (target, *target.rglob("*")) if path.is_file())
        print(f"  {target}  {weights.said(size)}")


def _base(config: Config, found: Trained) -> Source | None:
    from finetune.families import Source

    if config.model is None:
        if config.revision is not None or config.model_config is not None:
            raise Fault("--revision and --model-config go with --model.")
        own = found.base()
        return replace(own, quantize=None) if own else None  # an adapter goes into whole weights
    if found.folder is not None:
        raise Fault(f"--model {config.model}: {found.folder} is a whole model itself. Leave --model out.")
    return Source(config.model, config.revision, config.model_config)


def _forms(config: Config, found: Trained, source: Source | None) -> list[str]:
    """The formats that are asked for, in their order; `all` leaves out those that do not apply, and says why."""
    if not config.format:
        raise Fault(f"--format: which? {', '.join(FILES)} or all.")
    forms, every = [], "all" in config.format
    for form in FILES:
        if every or form in config.format:
            why = _refusal(form, found, source)
            if why is None:
                forms.append(form)
            elif not every:
                raise Fault(f"--format {form}: {why}")
            else:
                print(f"{form}: not written: {why}")
    return forms


def _refusal(form: str, found: Trained, source: Source | None) -> str | None:
    """Why a format cannot be had."""
    from finetune.export import formats
    from finetune.export.single_file import UNKNOWN

    family = found.family(source)
    if form == "embedding":
        return None if found.words else "no new words were taught."
    if form == "single-file" and found.words:
        return "a checkpoint file has no place for new words. Take merged, or an adapter's format with its embeddings."
    if form == "single-file" and not family.published.single_file:
        return UNKNOWN.format(family.title)
    if form not in ADAPTERS:
        return None if source is not None else "a whole model needs the adapter's base. Name it: --model."
    if not found.adapts and found.words:
        return "new words were taught, and no adapter trained. Take embedding."
    if not found.adapts:
        return "this is a whole model, no adapter. Take merged or single-file."
    refused = formats.refused(found.adapter, form, family) if found.adapter is not None else None
    return None if refused is None else refused.message


def _targets(config: Config, found: Trained, forms: list[str]) -> dict[str, Path]:
    if config.output.exists() and not config.output.is_dir():
        raise Fault(f"{config.output}: a file, where --output names a folder.")
    if config.name is not None and Path(config.name).name != config.name:
        raise Fault(f"--name {config.name}: a name without a folder; --output names the folder.")
    return {form: config.output / FILES[form].format(config.name or found.name) for form in forms}


def _make_room(folder: Path, targets: Sequence[Path]) -> None:
    if there := [str(path) for path in targets if path.exists()]:
        raise Fault("something is there already, and is not written over. Name another --output or --name.", there)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Fault(f"{folder}: cannot be made ({error.strerror}). Name another --output.") from error


def _write_words(loaded: Loaded, found: Trained, source: Source | None, files: Mapping[str, Path]) -> None:
    from finetune import export

    assert loaded.family is not None and source is not None, "words are a run's, and it tells its base"
    settings = {**found.settings, "words": {**found.settings["words"], "word": found.words}}
    export.embeddings(loaded.family, source, files, settings=settings, learned=loaded.words)


def _write(loaded: Loaded, form: str, path: Path, precision: str) -> None:
    from finetune import engine, export

    dtype, family = engine.DTYPES[precision], loaded.family
    if form in ADAPTERS:
        assert loaded.adapter is not None
        live = family if loaded.carries else None
        of = None if family is None else type(family)
        export.convert(loaded.adapter, path, form, metadata=loaded.metadata, dtype=dtype, family=of, live=live)
        return
    assert family is not None
    if form == "merged":
        export.merged(family, path, dtype=dtype)
    else:
        export.single_file(family, path, dtype=dtype, metadata=loaded.metadata)
