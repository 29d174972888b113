"""Where a base model comes from: embedded, hub, diffusers folder or single checkpoint file -> diffusers pipeline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors import safe_open

from finetune import weights
from finetune.errors import Fault
from finetune.families import straight
from finetune.quiet import quiet

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
EMBEDDED = "toybox"
STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call the weights of a part."""
CHANGED = "its files were changed while it was trained"
"""Instead of a model's identity"""


@dataclass(frozen=True)
class Source:
    """A base model by name, how it is held, and how it reads. Fields as in `finetune.settings.Model`.

    `model_config` serves single-file checkpoints, which hold neither configuration nor tokenizer: the folder or hub
    name of a diffusers model of the same kind.
    """

    model: str
    revision: str | None = None
    model_config: str | None = None
    quantize: str | None = None
    offload_blocks: bool = False
    cache_kv: bool = False
    clip_skip: int | None = None
    text_chunks: int | None = None

    def flags(self) -> str:
        """The same as flags of a command that draws."""
        return "".join(f" --{name.replace('_', '-')} {value}" for name, value in self.how().items())

    def how(self) -> dict[str, Any]:
        """How it is held and read, where that is not as the checkpoint has it."""
        told = {"quantize": self.quantize, "clip_skip": self.clip_skip, "text_chunks": self.text_chunks}
        return {name: value for name, value in told.items() if value is not None}

    @property
    def folder(self) -> Path | None:
        """The diffusers folder on this machine, if it is one."""
        if self.model == EMBEDDED:
            from finetune import toybox

            return toybox.path()
        path = Path(self.model)
        return path if path.is_dir() else None

    @property
    def file(self) -> Path | None:
        """The single-file checkpoint, if it is one. A pickled checkpoint is refused."""
        path = Path(self.model)
        if path.suffix in PICKLES:
            raise Fault(
                f"{self.model}: a pickled checkpoint can run code when it is loaded, so only .safetensors is read. "
                "Convert it first, or take the model's .safetensors file."
            )
        if path.suffix != ".safetensors":
            return None
        if not path.is_file():
            raise Fault(f"{self.model}: there is no such checkpoint file.")
        return path

    def pipeline_class(self) -> str:
        """The name of the checkpoint's own pipeline class. Reads configuration or header only, no weights."""
        if self.folder is not None:
            return _class_in_folder(self.folder)
        if self.file is not None:
            weights.check_file(self.file)
            _check_layout(self.file)
            return Source(self.model_config).pipeline_class() if self.model_config else _class_in_file(self.file)
        with _hub_faults(self):
            config: Mapping[str, Any] = DiffusionPipeline.load_config(self.model, revision=self.revision)
        return str(config["_class_name"])

    def load(self, dtype: torch.dtype, components: Mapping[str, Any] | None = None) -> DiffusionPipeline:
        """The pipeline, in evaluation mode; `components` are taken as they are instead of being loaded again.

        The VAE stays float32 whatever `dtype` says: it encodes each picture once, and half-precision VAEs overflow.
        Only safetensors are read, each checked first; remote code is never run; weights must be finite.
        """
        components = dict(components or {})
        with quiet():
            pipeline = self._load(dtype, components)
        pipeline.set_progress_bar_config(disable=True)
        loaded = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        weights.check_finite({name: part for name, part in loaded.items() if name not in components})
        return pipeline

    def local(self, parts: Sequence[str]) -> Path:
        """The diffusers folder of a model that is no single file; of a hub model, with the weights of these parts."""
        if self.folder is not None:
            return self.folder
        from huggingface_hub import snapshot_download

        files = [f"{stem}{end}" for stem in STEMS for end in (weights.SUFFIX, f"-*-of-*{weights.SUFFIX}")]
        wanted = [f"{part}/{file}" for part in parts for file in ("config.json", "*.index.json", *files)]
        with _hub_faults(self):
            found = snapshot_download(self.model, revision=self.revision, allow_patterns=["model_index.json", *wanted])
        return Path(found)

    def identity(self) -> str:
        """A name for exactly this model: a hash of its weights, configuration and tokenizer, or the hub's commit."""
        if root := self.folder or (self.file and self.file.parent):
            return _hash(self._files(), root)
        from huggingface_hub import model_info

        with _hub_faults(self):
            return f"{self.model}@{model_info(self.model, revision=self.revision).sha}"

    def identity_later(self) -> Callable[[], str]:
        """The same, found out when it is asked for; `CHANGED` where the files that are there now were changed by then,
        so that what was made with them is not taken for made with the others."""
        if self.folder is None and self.file is None:
            now = self.identity()  # the hub's latest may be another one then
            return lambda: now
        before = self._stamps()

        def told_then() -> str:
            with suppress(Fault, OSError):  # where they are gone
                if self._stamps() == before:
                    return self.identity()
            return CHANGED

        return told_then

    def _files(self) -> list[Path]:
        """Those on this machine that make the model."""
        if self.folder is not None:
            return sorted(path for path in self.folder.rglob("*") if path.suffix in (".safetensors", ".json", ".txt"))
        return [self.file] if self.file is not None else []

    def _stamps(self) -> list[tuple[Path, int, int, int]]:
        """By which a file that was written anew is known."""
        stats = [(path, path.stat()) for path in self._files()]
        return [(path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats]

    def _load(self, dtype: torch.dtype, components: dict[str, Any]) -> DiffusionPipeline:
        dtypes = {"default": dtype, "vae": torch.float32}
        if self.file is not None:
            pipeline_class = getattr(diffusers, self.pipeline_class())
            with _hub_faults(self):
                pipeline = pipeline_class.from_single_file(str(self.file), config=self.model_config, **components)
            for name, part in pipeline.components.items():
                if isinstance(part, torch.nn.Module) and part.dtype != (wanted := dtypes.get(name, dtype)):
                    part.to(wanted)
            return pipeline
        if self.folder is not None:
            weights.check_folder(self.folder)
        folder = self.folder or self._downloaded(components)
        read = straight.parts(folder, lambda name: dtypes.get(name, dtype), components)
        given = {**without(folder), **read, **components}
        return DiffusionPipeline.from_pretrained(
            folder, dtype=dtypes, use_safetensors=True, local_files_only=True, **given
        )

    def _downloaded(self, components: Mapping[str, Any]) -> Path:
        """The diffusers folder of a hub model with all but these components."""
        with _hub_faults(self):
            found = DiffusionPipeline.download(self.model, revision=self.revision, use_safetensors=True, **components)
        return Path(found)


def without(folder: Path) -> dict[str, None]:
    """The parts that a diffusers folder says it does without, to be told when it is loaded: diffusers misses those
    that its pipeline has no default for (SD 3's T5)."""
    index = json.loads((folder / "model_index.json").read_text())
    return {name: None for name, made in index.items() if made == [None, None]}


def _class_in_folder(folder: Path) -> str:
    index = folder / "model_index.json"
    if not index.is_file():
        raise Fault(
            f"{folder}: not a diffusers model: it has no model_index.json. "
            "Give a diffusers folder, a .safetensors checkpoint, a hub name or `toybox`."
        )
    try:
        return str(json.loads(index.read_text())["_class_name"])
    except (ValueError, KeyError) as error:
        raise Fault(f"{index}: cannot be read as a pipeline's index ({error}).") from error


def _check_layout(file: Path) -> None:
    with safe_open(file, framework="pt") as handle:
        names = list(handle.keys())
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise Fault(
            f"{file}: not a checkpoint in the original layout: no key begins with `model.diffusion_model.`. "
            "An adapter file goes with --adapter; a diffusers model is given by its folder."
        )


def _class_in_file(file: Path) -> str:
    """The pipeline class of the model that diffusers infers from names and shapes in an original-layout checkpoint."""
    with safe_open(file, framework="pt") as handle:
        names = list(handle.keys())
        shapes = {name: torch.empty(handle.get_slice(name).get_shape(), device="meta") for name in names}
    kind = infer_diffusers_model_type(shapes)
    classes = {
        "v1": "StableDiffusionPipeline",
        "v2": "StableDiffusionPipeline",
        "xl_base": "StableDiffusionXLPipeline",
        "inpainting": "StableDiffusionInpaintPipeline",
        "inpainting_v2": "StableDiffusionInpaintPipeline",
        "xl_inpaint": "StableDiffusionXLInpaintPipeline",
        "instruct-pix2pix": "StableDiffusionInstructPix2PixPipeline",
    }
    return classes.get(kind, f"checkpoint of kind {kind!r}")


def _hash(files: list[Path], root: Path) -> str:
    """Content of the files, by name. Hashing reads each once: a second for each two gigabytes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _hub_faults(source: Source) -> Iterator[None]:
    """Inside, what the hub answers becomes a Fault that says what to do."""
    try:
        yield
    except (OSError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        answer = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if source.file is not None:
            raise Fault(
                f"{source.model}: the configuration and the tokenizer of this checkpoint could not be had from the hub "
                f"({answer}). Name a diffusers model of the same kind that is here: --model-config FOLDER."
            ) from error
        what = source.model + (f" at revision {source.revision}" if source.revision else "")
        raise Fault(
            f"{what}: neither a folder nor a .safetensors file here, and the hub gave no such model ({answer}). Check "
            "the name, the revision, the network, and, for a gated model, that you are logged in (`hf auth login`)."
        ) from error
