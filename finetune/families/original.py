"""A denoiser's layers as its original code names them: a UNet's blocks counted through, a transformer's layers joined.

(CompVis ldm, Stability AI sgm and sd3.5, Black Forest Labs flux.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@dataclass(frozen=True)
class Layout:
    """What of a UNet its original names depend on."""

    attends: frozenset[int]
    """The up blocks with attention: their upsampler comes third, that of the others second."""
    layers: int = 2
    """Resnets in a down block; an up block has one more."""


@dataclass(frozen=True)
class Joined:
    """A transformer whose original code has some of our layers as one, their outputs one behind the other."""

    rules: Mapping[str, tuple[str, ...]]
    """`joint_blocks.{}.x_block.attn.qkv` -> `transformer_blocks.{}.attn.to_q` and so on, `{}` being a number"""
    shares: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the outputs, where they are not equal."""

    def written(self, path: str) -> tuple[str, int]:
        """The name, and the place in it. Raises KeyError for a layer that it does not have."""
        number = next(iter(re.findall(r"\.(\d+)\.", path)), "")
        pattern = path.replace(f".{number}.", ".{}.", 1)
        for name, paths in self.rules.items():
            if pattern in paths:
                return name.replace("{}", number), paths.index(pattern)
        raise KeyError(path)

    def read(self, name: str) -> tuple[list[str], tuple[int, ...]]:
        """The other way, of a name with `_` for its dots: all the layers that it joins, and their shares."""
        for known, paths in self.rules.items():
            if found := re.fullmatch(known.replace(".", "_").replace("{}", r"(\d+)"), name):
                shares = self.shares.get(known, (1,) * len(paths))
                return [path.replace("{}", found[1]) for path in paths], shares
        raise KeyError(name)


def written(path: str, layout: Layout) -> str:
    """`down_blocks.1.attentions.0.proj_in` -> `input_blocks.4.1.proj_in`. Raises KeyError for a layer of no UNet."""
    if path in ENDS:
        return ENDS[path]
    if middle := re.fullmatch(r"mid_block\.(\w+\.\d)\.(.+)", path):
        return f"middle_block.{MIDDLE[middle[1]]}.{_inside(middle[1], middle[2], RESNET)}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", path)
    if found is None:
        raise KeyError(path)
    way, block, kind, place, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    first = block * (layout.layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layout.layers + 1}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + layout.layers}.{2 if block in layout.attends else 1}.conv"
    number = f"input_blocks.{first + place + 1}" if way == "down" else f"output_blocks.{first + place}"
    return f"{number}.{0 if kind == 'resnets' else 1}.{_inside(kind, rest, RESNET)}"


def read(name: str, layout: Layout) -> str:
    """The other way. Raises KeyError for what is no layer of a UNet."""
    if name in (ends := _turned(ENDS)):
        return ends[name]
    if middle := re.fullmatch(r"middle_block\.(\d)\.(.+)", name):
        kind = _turned(MIDDLE)[middle[1]]
        return f"mid_block.{kind}.{_inside(kind, middle[2], _turned(RESNET))}"
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name)
    if found is None:
        raise KeyError(name)
    way, rest = "down" if found[1] == "input" else "up", found[4]
    block, place = divmod(int(found[2]) - (way == "down"), layout.layers + 1)
    if rest == "op":
        return f"down_blocks.{block}.downsamplers.0.conv"
    if rest == "conv":
        return f"up_blocks.{block}.upsamplers.0.conv"
    kind = "resnets" if found[3] == "0" else "attentions"
    return f"{way}_blocks.{block}.{kind}.{place}.{_inside(kind, rest, _turned(RESNET))}"


def _inside(kind: str, rest: str, resnet: Mapping[str, str]) -> str:
    """Within a resnet the layers have names of their own, within attention the same ones."""
    return resnet[rest] if kind.startswith("resnets") else rest


def _turned(table: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}
