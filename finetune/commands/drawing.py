"""What the commands that draw pictures have in common: the settings, and a model made ready by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import Fault
from finetune.schedulers import Name
from finetune.settings import Model

if TYPE_CHECKING:
    from finetune.families import Family
    from finetune.initial import Initial


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn."""

    model: Model = field(default_factory=Model)
    adapter: tuple[Path, ...] = ()
    """Adapter files (.safetensors) that are put on the model together."""
    embedding: tuple[Path, ...] = ()
    """Textual-inversion embeddings (.safetensors). Prompts call each by the name in its file, or else by its file's."""
    negative: str = ""
    """What the pictures should not show."""
    scheduler: Name | None = None
    """What steps from noise to picture. Default: the model's own."""
    init: Path | None = None
    """A picture to draw from (image-to-image), in its shape and about --size large."""
    mask: Path | None = None
    """What of --init is drawn anew (inpainting): a picture of its shape, white where it is, black where it stays."""
    picture_guidance: float | None = None
    """How strictly an instruct-pix2pix checkpoint keeps to --init. Default: 1.5."""
    extend: tuple[int, ...] = ()
    """Draw more around --init (outpainting): its own pixels to add to the left, top, right and bottom. The whole is
    then about --size large."""
    size: int | None = None
    """Side in pixels. Default: what the model was made for."""
    output: Path = Path("pictures")
    """Folder for the pictures."""
    overwrite: bool = False
    """Write over pictures of the same names."""
    batch: int = 4
    """Pictures drawn at a time: fewer need less memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the model. `auto`: bf16 on a GPU, else fp32."""


def require_sense(config: Drawing, prompts: Sequence[str], scales: Sequence[float]) -> None:
    """Raises Fault for what can be refused without the files."""
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise Fault('--prompt: say what to draw, e.g. --prompt "a photo of a dog on a beach".')
    if config.batch < 1:
        raise Fault(f"--batch {config.batch}: at least 1.")
    if len(scales) not in (1, len(config.adapter)):
        raise Fault(
            f"--scale: {len(scales)} numbers for {len(config.adapter)} adapters. Give one for all, or one each."
        )
    if config.init is None and (config.mask is not None or config.extend):
        raise Fault("--mask and --extend say what of a picture is drawn anew: name the picture too, with --init.")
    if config.picture_guidance is not None and (config.init is None or config.picture_guidance < 1):
        raise Fault(f"--picture-guidance {config.picture_guidance:g}: 1 or more, and with --init, which it keeps to.")


def initial(config: Drawing, strength: float | None) -> Initial | None:
    """The picture to draw from. Raises Fault when it cannot be read."""
    if config.init is None:
        if strength is not None:
            raise Fault("--strength says how much of a picture is drawn anew: name the picture too, with --init.")
        return None
    from finetune.initial import read

    return replace(read(config.init, config.mask, strength, config.extend), guidance=config.picture_guidance)


def told(paths: Sequence[Path], scales: Sequence[float]) -> list[dict[str, Any]]:
    """What is told of adapters. The files are read here already, whole, so that a broken one is refused at once."""
    import hashlib

    from finetune import weights

    facts = []
    for path, scale in zip(paths, scales, strict=True):
        weights.load_tensors(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        facts.append({"name": path.name, "sha256": digest, "scale": scale})
    return facts


def require_words(config: Drawing, prompts: Sequence[str]) -> None:
    """Raises Fault for prompts that cannot be read, and for embeddings that cannot, or that no prompt names."""
    from finetune import embeddings, prompting

    for text in (*prompts, config.negative):
        prompting.parse(text)
    embeddings.require_used([embeddings.read(path) for path in config.embedding], (*prompts, config.negative))


def load(config: Drawing) -> Family:
    """The model, made ready."""
    from finetune import engine, families

    source = families.Source(**vars(as_trained(config)))
    family = families.load(source, engine.dtype(config.precision), engine.device())
    return ready(family, config)


def as_trained(config: Drawing) -> Model:
    """The model, read as the headers of adapters and embeddings say that it was, where the settings say nothing.

    Raises Fault when they say different things.
    """
    from finetune import weights
    from finetune.export import metadata

    model, files = config.model, (*config.adapter, *config.embedding)
    headers = [metadata.own(weights.read_metadata(path)) for path in files]
    for name in ("clip_skip", "text_chunks"):
        told = {header[name] for header in headers if isinstance(header.get(name), int)}
        if len(told) > 1 and getattr(model, name) is None:
            flag = f"--{name.replace('_', '-')}"
            raise Fault(f"the files were trained with {flag} {' and '.join(map(str, sorted(told)))}: say which.")
        if told and getattr(model, name) is None:
            model = replace(model, **{name: told.pop()})
    return model


def ready(family: Family, config: Drawing) -> Family:
    """The same model with the scheduler, the embeddings, and the adapters at strength 1."""
    from finetune import embeddings, export, schedulers
    from finetune.sampling import begin_at_noise

    for path in config.embedding:
        embeddings.put_on(family, embeddings.read(path))
    for number, path in enumerate(config.adapter):
        export.attach(family, path, f"adapter_{number}")
    set_scales(family, [1.0] * len(config.adapter))
    if config.scheduler is not None:
        schedulers.choose(family, config.scheduler)
    if from_noise(config):
        begin_at_noise(family)
    if config.scheduler is not None:
        schedulers.require(family, config.scheduler)
    return family


def from_noise(config: Drawing) -> bool:
    """Whether one of the adapters was trained with --zero-terminal-snr."""
    from finetune import weights
    from finetune.export import metadata

    return any(metadata.own(weights.read_metadata(path)).get("zero_terminal_snr") for path in config.adapter)


def set_scales(family: Family, scales: Sequence[float]) -> None:
    """Strengths of the adapters, in their order."""
    if scales:
        from finetune import export

        export.set_strengths(family, {f"adapter_{number}": scale for number, scale in enumerate(scales)})


def facts(config: Drawing, family: Family) -> dict[str, Any]:
    """What pictures say of how all of them were drawn."""
    from finetune import families

    return {
        "negative": config.negative or None,
        "scheduler": config.scheduler or type(family.pipeline.scheduler).__name__,
        "zero_terminal_snr": from_noise(config) or None,
        "model": config.model.model,
        "revision": config.model.revision,
        **families.Source(**vars(as_trained(config))).how(),
    }


def title(config: Drawing, scales: Sequence[float] | None) -> str:
    """The model and its adapters, with their strengths where all pictures have the same."""
    from finetune.provenance import public_model

    strengths = [f" x {scale:g}" for scale in scales] if scales is not None else [""] * len(config.adapter)
    files = [f"{path.stem}{said}" for path, said in zip(config.adapter, strengths, strict=True)]
    return " + ".join([public_model(config.model.model), *files])


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Fault(f"{folder}: cannot be made ({error.strerror}). Name another --output.") from error


def require_room(folder: Path, files: Sequence[Path], overwrite: bool) -> None:
    """Raises Fault when something is there and is not to be written over."""
    if folder.exists() and not folder.is_dir():
        raise Fault(f"{folder}: a file, where --output names a folder.")
    there = [path for path in files if path.exists()]
    if there and not overwrite:
        raise Fault(
            f"{folder}: {len(there)} of the pictures are there already. "
            "Name another --output, or give --overwrite to write over them.",
            [path.name for path in there],
        )
