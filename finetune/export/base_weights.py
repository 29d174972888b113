"""A base model's weights, read one at a time: of a diffusers folder, a hub model, or a single checkpoint file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from finetune import families, weights
from finetune.errors import Fault
from finetune.export.content import File
from finetune.export.naming import LEVEL
from finetune.families import Family, Source, checkpoint, original
from finetune.families.original import Layout
from finetune.families.source import STEMS

CLIP = {"cond_stage_model.transformer.": "text_encoder", "conditioner.embedders.0.transformer.": "text_encoder"}
OPEN_CLIP = {"cond_stage_model.model.": "text_encoder", "conditioner.embedders.1.model.": "text_encoder_2"}
"""Where the parts are in a single file (CompVis ldm, Stability AI sgm)."""
OPEN_CLIP_LAYERS = {theirs: ours for ours, theirs in checkpoint.OPEN_CLIP_LAYERS.items()}
OPEN_CLIP_ENDS = {theirs: ours for ours, theirs in checkpoint.OPEN_CLIP.items()}


@dataclass(frozen=True)
class Place:
    """A tensor in a file, or a third of its rows, or it turned."""

    file: File
    key: str
    third: int | None = None
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.file.shapes[self.key]
        if self.third is not None:
            return (shape[0] // 3, *shape[1:])
        return shape[::-1] if self.turned else shape

    def load(self) -> Tensor:
        tensor = self.file.load(self.key)
        if self.third is not None:
            return tensor.chunk(3)[self.third]
        return tensor.T if self.turned else tensor


class BaseWeights:
    """The tensors of the denoiser and the text encoders, by part and diffusers' name: `unet.conv_in.weight`."""

    def __init__(self, source: Source) -> None:
        """Reads headers alone. Raises Fault when the model is of no known family, or cannot be found or read."""
        self.title = source.model
        self.family: type[Family] = families.known(source.pipeline_class())
        self._parts = (self.family.denoiser_name, *self.family.text_encoder_names)
        self._places = dict(_in_file(source.file) if source.file else self._in_folder(source.local(self._parts)))
        self.shapes = {name: place.shape for name, place in self._places.items()}

    def load(self, name: str) -> Tensor:
        """In the precision that it has in the file."""
        return self._places[name].load()

    def layers(self) -> list[str]:
        """The linear and convolutional layers, as an adapter names them: `unet.conv_in`."""
        return [
            name.removesuffix(".weight")
            for name, shape in self.shapes.items()
            if name.endswith(".weight") and len(shape) in (2, 4) and ".embeddings." not in name
        ]

    def _in_folder(self, folder: Path) -> Iterator[tuple[str, Place]]:
        weights.check_folder(folder)
        for part in self._parts:
            for file in map(File, _files(folder / part)):
                for key in file.shapes:
                    own = LEVEL if part.startswith("text_encoder") and not key.startswith((LEVEL, "text_proj")) else ""
                    yield f"{part}.{own}{key}", Place(file, key)


def _files(folder: Path) -> list[Path]:
    """A part's file, or its shards. Raises Fault when there is none."""
    for stem in STEMS:
        whole, index = folder / f"{stem}{weights.SUFFIX}", folder / f"{stem}{weights.SUFFIX}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [folder / name for name in sorted(named)]
    raise Fault(f"{folder}: no weights there: neither {' nor '.join(f'{stem}{weights.SUFFIX}' for stem in STEMS)}.")


def _in_file(path: Path) -> Iterator[tuple[str, Place]]:
    file = File(path)
    for key in file.shapes:
        if key.startswith(checkpoint.UNET):
            layer, _, leaf = key.removeprefix(checkpoint.UNET).rpartition(".")
            try:
                yield f"unet.{original.read(layer, Layout(frozenset()))}.{leaf}", Place(file, key)
            except KeyError as error:
                raise Fault(f"{path}: {key}: no layer of a model that is known.") from error
        for prefix, part in CLIP.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix).removeprefix(LEVEL)
                yield f"{part}.{LEVEL}{name}", Place(file, key)
        for prefix, part in OPEN_CLIP.items():
            if key.startswith(prefix):
                for name, place in _open_clip(file, key, key.removeprefix(prefix)):
                    yield f"{part}.{name}", place


def _open_clip(file: File, key: str, name: str) -> Iterator[tuple[str, Place]]:
    """OpenCLIP's names as transformers has them: its attention holds q, k and v in one matrix."""
    if name in OPEN_CLIP_ENDS:
        yield OPEN_CLIP_ENDS[name], Place(file, key, turned=name == "text_projection")
    elif found := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(?:(.+)\.|attn\.in_proj_)(weight|bias)", name):
        layer = f"{LEVEL}encoder.layers.{found[1]}"
        if found[2]:
            yield f"{layer}.{OPEN_CLIP_LAYERS[found[2]]}.{found[3]}", Place(file, key)
        else:
            for third, which in enumerate("qkv"):
                yield f"{layer}.self_attn.{which}_proj.{found[3]}", Place(file, key, third)
