"""What an adapter file holds, whatever its format: layers of the model, and what is added to each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
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
    def extent(self) -> tuple[int | None, int | None]:
        """Shape of the change as a matrix: (out, in * ...), None where the tensors do not tell it.

        Raises Fault when they do not go together.
        """
        if self._known.sides is not None:
            return self._known.sides(self.shapes)
        assert self._known.change is not None
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
        """What is added to the layer's weight: (out, in * ...), float32. Kinds that act on the weight need it."""
        tensors = self.tensors()
        if not self.acts and self._known.change is not None:
            return self.scale * self._known.change(tensors)
        if weight is None:
            self.require_free()
            raise AssertionError
        if self._known.act is not None:
            made = self._known.act(tensors, weight.float().flatten(1))
        elif self._known.change is not None:
            made = self.scale * self._known.change(tensors)
        return change.weighed(weight, made, tensors[MAGNITUDE]) if MAGNITUDE in tensors else made

    @property
    def acts(self) -> bool:
        """Whether the change depends on the base's weights."""
        return MAGNITUDE in self.shapes or self._known.act is not None

    def require_free(self) -> None:
        """Raises Fault where the change depends on the base's weights."""
        if self.acts:
            said = f"the change of {self.said} depends on the base's weights. Name the base: --model."
            raise Fault(f"{self.name}: {said}")

    @property
    def said(self) -> str:
        """What it is called, with DoRA."""
        return "DoRA" if MAGNITUDE in self.shapes else self.title

    def entry(self, tensor: str, shape: tuple[int, ...], dtype: torch.dtype | None, times: float = 1.0) -> Entry:
        """One of its tensors to be written: in another shape and precision (default: its own), multiplied."""
        kept = dtype
        if kept is None or not shape:  # a flag is a scalar, and stays what it is
            own = self.load(tensor).dtype
            kept = kept if kept is not None and own.is_floating_point else own

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
    """A safetensors file whose tensors are read one at a time, each refused when it is not finite.

    They are read, not mapped: a file that has been gone through does not count as memory.
    """

    def __init__(self, path: Path) -> None:
        """Raises Fault for a file that is not whole, see `weights.check_file`, or of types that are not read."""
        self._entries, self.metadata, self._start = weights.read_header(path)
        self.path = path
        self.shapes = {name: tuple(entry["shape"]) for name, entry in self._entries.items()}
        self.dtypes = {name: entry["dtype"] for name, entry in self._entries.items()}
        if unknown := sorted({*self.dtypes.values()} - {*stream.DTYPES}):
            raise Fault(f"{path}: numbers of type {', '.join(unknown)}; read are {', '.join(stream.DTYPES)}.")

    def precisions(self) -> set[torch.dtype]:
        """Of its tensors, but for single numbers (alphas)."""
        return {stream.DTYPES[kind] for name, kind in self.dtypes.items() if self.shapes[name]}

    def load(self, name: str) -> Tensor:
        begin, end = self._entries[name]["data_offsets"]
        data = bytearray(end - begin)
        with self.path.open("rb") as file:
            file.seek(self._start + begin)
            file.readinto(data)
        dtype, shape = stream.DTYPES[self.dtypes[name]], self.shapes[name]
        tensor = torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise Fault(f"{self.path}: {name} holds NaN or infinite values: it comes from a run that failed.")
        return tensor

    def layer(self, part: str, path: str, keys: Mapping[str, str], alpha: float | None) -> Layer:
        """`keys`: the file's name of each of the layer's tensors."""
        shapes = {name: self.shapes[key] for name, key in keys.items()}
        return Layer(part, path, shapes, lambda name: self.load(keys[name]), alpha)
