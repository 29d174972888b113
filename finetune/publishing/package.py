"""The folder that is published: made whole beside its name, then renamed; `checksums.txt` over all that is in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import disk
from finetune.errors import Fault
from finetune.evaluation import tables
from finetune.publishing.facts import MODEL, Facts

if TYPE_CHECKING:
    from finetune.families import Family, Source
    from finetune.publishing.drawing import Brush, Track
    from finetune.publishing.files import Files
    from finetune.publishing.release import Drawn, Release

CARD, CHECKSUMS, RECORD = "README.md", "checksums.txt", ".publish.json"
"""The record of what the folder was made of stays here."""


@dataclass(frozen=True)
class Wish:
    """What the folder is to be like."""

    repo: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    size: int | None
    dtype: str
    base: str | None
    license: str | None
    title: str | None
    description: str | None
    single_file: bool

    @property
    def name(self) -> str:
        """What its files are called."""
        return self.repo.partition("/")[2]


def is_made(folder: Path, wish: Wish, facts: Facts, overwrite: bool) -> bool:
    """Whether the folder is there, made with the same wish of the same run, and is to stay.

    Raises Fault where something else is there, and where it would have to be written over without being asked.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Fault(f"{folder}: `publish` did not make what is there. Name another --output.") from None
    if not overwrite and record != _record(wish, facts):
        before = record.get("wish", {})
        changed = [f"{name}: {before.get(name)}, now {value}" for name, value in _plain(wish).items()
                   if before.get(name) != value]  # fmt: skip
        raise Fault(
            f"{folder}: was made with other settings, or of another state of the run. --overwrite makes it anew.",
            changed,
        )
    return not overwrite


def make(folder: Path, wish: Wish, facts: Facts, track: Track) -> Mapping[str, str]:
    """Returns the adapter's files that are left out, and why. Raises Failure, and leaves what was at `folder`, when a
    file does not load back equal."""
    from finetune.publishing.card import card

    beside = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        (beside / "images").mkdir(parents=True)
        release = _fill(beside, wish, facts, track)
        disk.write_text(beside / CARD, card(release))
        disk.write_text(beside / RECORD, json.dumps(_record(wish, facts)) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        return release.left
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def files(folder: Path) -> list[Path]:
    """All that would be sent, the checksums renewed: whoever looked at the folder may have changed its card."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in found]
    disk.write_text(folder / CHECKSUMS, "".join(lines))
    return [*found, folder / CHECKSUMS]


def _fill(folder: Path, wish: Wish, facts: Facts, track: Track) -> Release:
    """Weights, pictures and sidecars. Returns what the card is made of."""
    from finetune import engine, families, sampling
    from finetune.publishing import drawing, sidecar

    source = _source(facts)
    family = families.load(source, engine.dtype("auto"), engine.device())
    from_noise = bool(not facts.whole and facts.flat.get("zero_terminal_snr"))
    if from_noise:
        sampling.begin_at_noise(family)
    _word_files(folder, facts, family, source)
    written = _adapter_files(folder, wish, facts, family) if facts.adapter else None
    drawn_with = folder / written.shown if written else None
    brush = drawing.Brush(
        family, wish.repo if facts.whole else facts.model, source.revision, drawn_with,
        wish.steps, wish.guidance, wish.size, from_noise, source.how(),
    )  # fmt: skip
    drawn = drawing.samples(brush, folder, wish.prompts, wish.seeds, track)
    row = wish.prompts[0], wish.seeds[0], facts.strengths
    strength = drawing.strengths(brush, folder, *row, track) if facts.adapter else None
    whole = _model_files(folder, wish, facts, family) if facts.whole else {}
    release = _release(wish, facts, source, written, whole, brush, drawn, strength)
    if written and release.main in written.readers:
        _sidecars(folder, release, release.main, sidecar.ADAPTER, release.words)
    for word, name in zip(release.taught, release.embeddings, strict=True):
        _sidecars(folder, release, name, sidecar.EMBEDDING, [word])
    return release


def _source(facts: Facts) -> Source:
    """What the pictures are drawn with: the base, or the model that was trained."""
    from finetune.families import Source

    if not facts.whole:
        return Source(**facts.settings["model"])
    reads: dict[str, Any] = {name: facts.flat.get(name) for name in ("clip_skip", "text_chunks")}
    return Source(str(facts.run / MODEL), **reads)


def _release(
    wish: Wish, facts: Facts, source: Source, written: Files | None, whole: Mapping[str, tuple[str, ...]],
    brush: Brush, drawn: Sequence[Drawn], strength: str | None,
) -> Release:  # fmt: skip
    """What the card tells. `whole`: the files of a whole model; `strength`: the picture of strengths."""
    from finetune import families
    from finetune.export import embedding_file
    from finetune.families import TakesTokens
    from finetune.publishing.release import Release

    family, given = brush.family, facts.flat
    edition = family.edition()
    known = family.condition_shapes()["text"][-1] == edition.width
    kinds = [*([written.kind] if written else []), *(["textual inversion"] if facts.taught else [])]
    return Release(
        repo=wish.repo,
        title=wish.title or given.get("title") or wish.name,
        kind=" and ".join(kinds) or None,
        base=wish.base or facts.base,
        revision=given.get("revision"),
        family=edition.title,
        tag=edition.tag,
        site=edition.site if known else "Other",
        webui=edition.webui if known else "Unknown",
        words=facts.words,
        license=_license(wish.license or given.get("license"), wish.base or facts.base),
        files=written.readers if written else whole,
        taught=facts.taught,
        encoders=embedding_file.names(family) if facts.taught else {},
        strangers=written.strangers if written else {},
        left=written.left if written else {},
        drawn=drawn,
        drawing={"scheduler": brush.scheduler, "steps": str(wish.steps), "guidance": f"{wish.guidance:g}"},
        strength=strength,
        training=facts.training,
        held_out=facts.held_out,
        measured=facts.measured,
        description=wish.description or given.get("description"),
        author=given.get("author"),
        tags=(*(given.get("tags") or ()), *(["slider"] if facts.slider else [])),
        usage=facts.header.get("modelspec.usage_hint"),
        embedded=facts.embedded,
        from_noise=brush.from_noise,
        inpaints=families.takes_mask(family),
        clip_skip=source.clip_skip,
        skipped=source.clip_skip - family.own_layer if source.clip_skip and isinstance(family, TakesTokens) else 0,
    )


def _sidecars(folder: Path, release: Release, name: str, kind: str, words: Sequence[str]) -> None:
    """Beside the file `name`, with the first picture that says one of its words."""
    from finetune.publishing import sidecar

    said = (one for one in release.drawn if any(word in one.prompt for word in words))
    shutil.copy(folder / next(said, release.drawn[0]).file, (folder / name).with_suffix(".preview.png"))
    sidecar.write(release, folder / name, kind, words)


def _word_files(folder: Path, facts: Facts, family: Family, source: Source) -> None:
    """The run's embeddings, as they are: put on the model, and the copies loaded as diffusers does it and compared."""
    from finetune import embeddings
    from finetune.export import embedding_file

    copies = {word: folder / file.name for word, file in zip(facts.taught, facts.embeddings, strict=True)}
    for copy, file in zip(copies.values(), facts.embeddings, strict=True):
        shutil.copy(file, copy)
        embeddings.put_on(family, embeddings.read(file))
    if copies:
        embedding_file.verify(family, source, copies)


def _adapter_files(folder: Path, wish: Wish, facts: Facts, family: Family) -> Files:
    from finetune import engine
    from finetune.export import formats
    from finetune.publishing import files
    from finetune.publishing.drawing import ADAPTER

    assert facts.adapter is not None
    return files.write(folder, wish.name, formats.read(facts.adapter), family, engine.DTYPES[wish.dtype], ADAPTER)


def _model_files(folder: Path, wish: Wish, facts: Facts, family: Family) -> Mapping[str, tuple[str, ...]]:
    """The diffusers folder as the run wrote and verified it: its weights linked, where the disk can, not copied. Where
    it is wished for, the same as one file."""
    for file in facts.result:
        target = folder / file.relative_to(facts.run / MODEL)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copy(file, target)
    kept = {"model_index.json": ("the whole model, as diffusers loads it",)}
    if not wish.single_file:
        return kept
    from finetune import engine, export
    from finetune.export import metadata

    name = f"{wish.name}.safetensors"
    told = metadata.of_run(family, facts.settings, None)
    export.single_file(family, folder / name, dtype=engine.DTYPES[wish.dtype], metadata=told)
    return {name: ("the whole model as one checkpoint: A1111, ComfyUI, Forge, InvokeAI, diffusers",), **kept}


def _license(given: str | None, base: str | None) -> dict[str, str]:
    """As given, or the base's, where the hub can be asked; else none."""
    if given:
        known = re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", given.lower())
        return {"license": given.lower()} if known else {"license": "other", "license_name": " ".join(given.split())}
    if base is None:
        return {}
    from huggingface_hub import HfApi

    try:
        data = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None).model_info(base, timeout=10).card_data
    except Exception:  # offline, unknown, gated: it is not known then
        return {}
    told = data.to_dict() if data else {}
    return {name: str(told[name]) for name in ("license", "license_name", "license_link") if told.get(name)}


def _record(wish: Wish, facts: Facts) -> dict[str, Any]:
    states = [(path.stat().st_size, path.stat().st_mtime_ns) for path in facts.result]
    told = json.dumps([states, [tables.plain(asdict(state)) for state in facts.measured or ()]])
    return {"wish": _plain(wish), "run": hashlib.sha256(told.encode()).hexdigest()}


def _plain(wish: Wish) -> Mapping[str, Any]:
    return dict(json.loads(json.dumps(vars(wish))))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
