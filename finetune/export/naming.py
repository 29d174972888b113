"""Names in files. transformers 5 dropped the `text_model.` level of CLIPTextModel; every other reader expects it."""

from __future__ import annotations

from torch import nn

LEVEL = "text_model."


def written(module: nn.Module, name: str) -> str:
    """The name that a parameter or layer of the module has in files."""
    if type(module).__name__.startswith("CLIPText") and not name.startswith((LEVEL, "text_projection")):
        return LEVEL + name
    return name


def held(module: nn.Module, name: str) -> str:
    """The other way: the name in this module of what a file calls `name`."""
    if type(module).__name__.startswith("CLIPText") and not hasattr(module, LEVEL.rstrip(".")):
        return name.removeprefix(LEVEL)
    return name
