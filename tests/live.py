"""Models as they are after training: adapters that are not zero."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune import adapters, families, keys
from finetune.families import Family, Source
from finetune.settings import Adapter


def adapted(
    folder: Path, *, rank: int = 4, alpha: float = 2.0, text: bool = False, dtype: torch.dtype = torch.float32
) -> Family:
    """A LoRA on the denoiser (and the text encoders), each weight drawn from a key of its own."""
    family = families.load(Source(str(folder)), dtype)
    rate = 1e-4 if text and family.trained_text_encoders else None
    adapters.adapt(family, Adapter(rank=rank, alpha=alpha), 1e-4, rate, seed=0)
    randomise(family)
    return family


def tuned(folder: Path, *, text: bool = False) -> Family:
    """Every weight of the denoiser (and the text encoders) moved a little."""
    family = families.load(Source(str(folder)))
    adapters.full(family, 1e-5, 1e-5 if text and family.trained_text_encoders else None)
    randomise(family, relative=True)
    return family


def randomise(family: Family, relative: bool = False) -> None:
    for part, module in families.modules(family).items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                noise = 0.4 * keys.normal(tuple(parameter.shape), 0, "test", part, name)
                parameter.data = parameter.data + 0.05 * noise if relative else noise


def state(family: Family) -> dict[str, tuple[torch.Tensor, torch.dtype, bool, bool]]:
    """All that an export must not change: values, precisions, flags, and modes."""
    found = {}
    for part, module in families.modules(family).items():
        modes = {name: child.training for name, child in module.named_modules()}
        for name, p in module.named_parameters():
            found[f"{part}.{name}"] = (p.detach().clone(), p.dtype, p.requires_grad, modes[name.rpartition(".")[0]])
    return found


def assert_same_state(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, (value, *rest) in one.items():
        assert torch.equal(value, other[name][0]), name
        assert rest == list(other[name][1:]), name
