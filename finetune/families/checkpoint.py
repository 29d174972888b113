"""A whole model as one file in the original layout: what its tensors are called there, and of which of ours they are.

CompVis ldm and Stability AI sgm for UNet and VAE, transformers or OpenCLIP for the text encoders; the same names that
diffusers' `from_single_file` reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune.families import original
from finetune.families.original import Layout

UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""What the names of these parts begin with, in every family."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """A tensor of the file."""

    name: str
    sources: tuple[str, ...]
    """The tensors that it is joined of along the first axis, by their names in diffusers' files."""
    formed: Callable[[Tensor], Tensor] | None = None
    """What is done to them then."""

    def made(self, load: Callable[[str], Tensor]) -> Tensor:
        joined = load(self.sources[0]) if len(self.sources) == 1 else torch.cat([*map(load, self.sources)])
        return joined if self.formed is None else self.formed(joined)


@dataclass(frozen=True)
class Part:
    """What a part of the pipeline is in the file."""

    prefix: str
    pieces: Callable[[Shapes, Any], Iterator[Piece]]
    """Its tensors, told from the shapes of ours and the module's configuration. KeyError: one has no name there."""


def unet(shapes: Shapes, config: Any) -> Iterator[Piece]:
    attends = frozenset(block for block, kind in enumerate(config.up_block_types) if "Attn" in kind)
    layout = Layout(attends, config.layers_per_block)
    for name in shapes:
        layer, _, leaf = name.rpartition(".")
        yield Piece(f"{original.written(layer, layout)}.{leaf}", (name,))


def vae(shapes: Shapes, config: Any) -> Iterator[Piece]:
    """The decoder's levels are counted from the last one; the attention's layers are convolutions of 1 x 1."""
    last = len(config.up_block_types) - 1
    rules: tuple[tuple[str, Any], ...] = (
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda found: f"up.{last - int(found[1])}.block.{found[2]}"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{last - int(found[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_norm_out", "norm_out"),
        (r"conv_shortcut", "nin_shortcut"),
    )
    for name, shape in shapes.items():
        new = name
        for ours, theirs in rules:
            new = re.sub(ours, theirs, new)
        yield Piece(new, (name,), _convolution if len(shape) == 2 else None)


def clip(shapes: Shapes, config: Any) -> Iterator[Piece]:
    """As transformers writes it, the level `text_model.` included."""
    return (Piece(name, (name,)) for name in shapes)


def open_clip(shapes: Shapes, config: Any) -> Iterator[Piece]:
    """As OpenCLIP has it: q, k and v are one, and the projection is applied from the other side."""
    for name in shapes:
        if name in OPEN_CLIP:
            yield Piece(OPEN_CLIP[name], (name,), torch.t if name == "text_projection.weight" else None)
            continue
        found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if found is None:
            raise KeyError(name)
        block, layer, leaf = f"transformer.resblocks.{found[1]}", found[2], found[3]
        if layer == "self_attn.q_proj":
            fused = tuple(name.replace("q_proj", f"{each}_proj") for each in "qkv")
            yield Piece(f"{block}.attn.in_proj_{leaf}", fused)
        elif layer not in ("self_attn.k_proj", "self_attn.v_proj"):
            yield Piece(f"{block}.{OPEN_CLIP_LAYERS[layer]}.{leaf}", (name,))


OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _convolution(weight: Tensor) -> Tensor:
    return weight[:, :, None, None]
