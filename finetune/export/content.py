"""What an adapter file holds, whatever its format: layers of the model, and what is added to each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from finetune import weights
from finetune.errors import Fault
from finetune.export import change, stream
from finetune.export.change import KINDS, MAGNITUDE, Kind
from finetune.export.stream import Entry


@dataclass(frozen=True)
class Layer:
    """The change to one layer. Its tensors are read when they are asked for: no adapter need be in memory whole."""

    part: str
    """The pipeline's name of the module that it is in: "unet", "text_encoder"."""
    path: str
    """Its own name there, as diffusers has it; in CLIP text encoders it begins with `text_model.`."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of its tensors, by LyCORIS's names: "lora_down.weight", "hada_w1_a", "dora_scale"."""
    load: Callable[[str], Tensor] = field(repr=False, compare=False)
    alpha: float | None = None
    """None where the file says none: every client takes the rank then, that is a scale of 1."""

    @property
    def name(self) -> str:
        return f"{self.part}.{self.path}"

    @cached_property
    def kind(self) -> str:
        """Raises Fault when the tensors are of no kind that is known, or not whole."""
        found = change.kind(frozenset(self.shapes))
        if found is None and (lacking := change.lacking(frozenset(self.shapes))):
            raise Fault(f"{self.name}: {', '.join(sorted(lacking))} is missing beside {', '.join(sorted(self.shapes))}")
        if found is None:
            known = ", ".join(kind.title for kind in KINDS.values())
            raise Fault(f"{self.name}: {', '.join(sorted(self.shapes))}: not whole, or none of {known}.")
        return found

    @cached_property
    def extent(self) -> tuple[int, int]:
        """Shape of the change as a matrix: (out, in * ...). Raises Fault when the tensors do not go together."""
        hollow = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        try:
            rows, columns = self._known.change(hollow).shape
        except (RuntimeError, ValueError) as error:
            shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in sorted(self.shapes.items()))
            raise Fault(f"{self.name}: the shapes of its tensors do not go together: {shapes}") from error
        return rows, columns

    @property
    def rank(self) -> int | None:
        """None for kinds that have none."""
        return self._known.rank(self.shapes)

    @property
    def scale(self) -> float:
        """alpha / rank"""
        rank = self.rank
        return 1.0 if rank is None or self.alpha is None else self.alpha / rank

    def tensors(self) -> dict[str, Tensor]:
        return {name: self.load(name) for name in self.shapes}

    def copied(self) -> Layer:
        """The layer with tensors of its own, in memory."""
        return held(self.part, self.path, {name: tensor.clone() for name, tensor in self.tensors().items()}, self.alpha)

    def change(self, weight: Tensor | None = None) -> Tensor:
        """What is added to the layer's weight: (out, in * ...), float32. DoRA's needs the weight itself."""
        tensors = self.tensors()
        made = self.scale * self._known.change(tensors)
        if MAGNITUDE not in tensors:
            return made
        if weight is None:
            raise Fault(f"{self.name}: DoRA's change depends on the base's weights. Name the base: --model.")
        return change.weighed(weight, made, tensors[MAGNITUDE])

    def entry(self, tensor: str, shape: tuple[int, ...], dtype: torch.dtype | None, times: float = 1.0) -> Entry:
        """One of its tensors to be written: in another shape and precision (default: its own), multiplied."""
        kept = dtype or self.load(tensor).dtype

        def make() -> Tensor:
            made = self.load(tensor)
            return (made if times == 1.0 else made.float() * times).reshape(shape).to(kept)

        return Entry(shape, kept, make)

    @property
    def title(self) -> str:
        """What the kind is called."""
        return self._known.title

    @property
    def _known(self) -> Kind:
        return KINDS[self.kind]


@dataclass(frozen=True)
class Adapter:
    """The layers that an adapter changes, in the order of their names, and what its file says of it."""

    layers: Sequence[Layer]
    metadata: Mapping[str, str] = field(default_factory=dict)
    family: str | None = None
    """The class of the pipelines that it is for; None where the file does not tell."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", sorted(self.layers, key=lambda layer: layer.name))

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def dtypes(self) -> set[torch.dtype]:
        return {tensor.dtype for layer in self for tensor in layer.tensors().values()}

    @property
    def parts(self) -> list[str]:
        return sorted({layer.part for layer in self.layers})


def held(part: str, path: str, tensors: Mapping[str, Tensor], alpha: float | None) -> Layer:
    """A layer whose tensors are in memory."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Layer(part, path, shapes, tensors.__getitem__, alpha)


class File:
    """A safetensors file whose tensors are read one at a time, each refused when it is not finite."""

    def __init__(self, path: Path) -> None:
        """Raises Fault for a file that is not whole, see `weights.check_file`."""
        entries, self.metadata, _ = weights.read_header(path)
        self.path, self.shapes = path, {name: tuple(entry["shape"]) for name, entry in entries.items()}
        self.dtypes = {name: entry["dtype"] for name, entry in entries.items()}

    def precisions(self) -> set[torch.dtype]:
        """Of its tensors, but for single numbers (alphas)."""
        return {stream.DTYPES[kind] for name, kind in self.dtypes.items() if self.shapes[name]}

    @cached_property
    def _handle(self) -> object:
        return safe_open(self.path, framework="pt")

    def load(self, name: str) -> Tensor:
        tensor: Tensor = self._handle.get_tensor(name)  # type: ignore[attr-defined]
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise Fault(f"{self.path}: {name} holds NaN or infinite values: it comes from a run that failed.")
        return tensor

    def layer(self, part: str, path: str, keys: Mapping[str, str], alpha: float | None) -> Layer:
        """`keys`: the file's name of each of the layer's tensors."""
        shapes = {name: self.shapes[key] for name, key in keys.items()}
        return Layer(part, path, shapes, lambda name: self.load(keys[name]), alpha)
