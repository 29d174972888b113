"""Keys and values of captions, kept in place of the weights that make them (`--cache-kv`).

Cross-attention makes keys and values of the prompt alone. Where neither text encoders nor these layers train, what a
layer makes of a caption is the same at every step, timestep and picture: it is computed once, and what an adapter adds
to it is added in each step as always. The layers' weights are in the CPU's memory (`offload.Resting`), and so are all
captions' keys and values; those that a pass asks for are sent in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from finetune import engine, families, offload
from finetune.errors import Fault
from finetune.families import Conditions, Family, Source
from finetune.methods import METHODS
from finetune.settings import Optim

MOST = 2 * 2**30
"""Bytes of captions that are kept. Of what is beyond the oldest goes, and is computed again when it is asked for"""


def check(config: Any, accelerator: Accelerator) -> None:
    """Refuse a run whose keys and values cannot be kept. Needs no weights."""
    if not (hasattr(config, "model") and config.model.cache_kv):
        return
    if (why := hindrance(config)) is not None:
        raise Fault(f"--cache-kv: {why}")
    if (running := engine.running(accelerator)) != "single":
        raise Fault(f"--cache-kv: in one process, not with {running}, which it was not tested with. Leave it out.")


def hindrance(config: Any) -> str | None:
    """What in a run's settings is in the way of it, and what to do; None: nothing. Needs no weights."""
    model, rate = config.model, getattr(config, "optim", Optim()).text_encoder_lr
    if not hasattr(config, "adapter"):
        return (
            "under an adapter alone: the recipes lora and slider. Here the base's own weights train, or words that "
            "captions are made of. Leave it out."
        )
    if hasattr(config, "words"):
        return "new words train here, so that a caption is another one after each step. Leave it out."
    if rate is not None:
        return f"--text-encoder-lr {rate:g}: a caption is another one after each step. Leave out the one or the other."
    method = METHODS[config.adapter.method]
    if not method.outside:
        fitting = ", ".join(name for name, other in METHODS.items() if other.outside)
        return (
            f"--method {config.adapter.method}: {method.title} changes the layers themselves, or what goes into them. "
            f"Methods that leave them as they are: {fitting}."
        )
    if model.quantize:
        return f"--quantize {model.quantize}: bitsandbytes' weights are not sent to and fro. Take one of both."
    if model.offload_blocks:
        return "--offload-blocks: by that these weights are out of the GPU's memory too. Take one of both."
    if config.train.compile != "off":
        return f"--compile {config.train.compile}: not tried with it. Leave out the one or the other."
    family = families.known(Source(**vars(model)).pipeline_class())
    if family.attends_to is None:
        return (
            f"{family.title} attends to prompt and picture together: it makes another thing of a prompt in each step. "
            "Stable Diffusion 1.x, 2.x and XL have cross-attention. Leave it out, or take --offload-blocks."
        )
    return None


class Known:
    """Inside, the layers answer the captions that they were last told of, without their weights."""

    def __init__(self, family: Family) -> None:
        self.layers = offload.resting(families.denoiser(family))
        """None where a run does not ask for it: then nothing is done"""
        self.condition = family.attends_to or ""
        self.made: dict[str, Tensor] = {}
        """By caption: keys and values of all layers behind one another, in the CPU's memory"""
        self._here: tuple[list[str], list[Tensor]] = [], []
        """Captions whose keys and values are on the device: of each layer (captions, n, out)"""
        self._inside = False

    def __enter__(self) -> None:
        self._inside = True

    def __exit__(self, *_: object) -> None:
        self._inside = False
        self._answer(None)

    @property
    def held(self) -> list[Tensor]:
        """All that is kept."""
        return [*self.made.values(), *self._here[1]]

    def tell(self, captions: Sequence[str], conditions: Conditions) -> None:
        """Which captions the denoiser is told of from now on, row by row, and as what. What is computed again for the
        backward pass is so until the next time."""
        if not self._inside or not self.layers:
            return
        texts, asked = conditions[self.condition], list(dict.fromkeys(captions))
        if asked != self._here[0]:
            self._answer(None)
            self._here = asked, self._brought([self._caption(one, texts[captions.index(one)]) for one in asked], texts)
        self._answer(torch.tensor([asked.index(caption) for caption in captions], device=texts.device))

    def _answer(self, rows: Tensor | None) -> None:
        for number, layer in enumerate(self.layers):
            layer.answer = None if rows is None else (self._here[1][number], rows)

    @torch.no_grad()
    def _caption(self, caption: str, text: Tensor) -> Tensor:
        """(n, D) -> what all layers make of it, one behind the other. By itself, so that it is the same whatever it is
        told beside."""
        if caption not in self.made:
            each = [layer(text[None].to(layer.weight.dtype)).flatten() for layer in self.layers]
            made = offload.rested(torch.cat(each), text.device)
            while self.made and (len(self.made) + 1) * made.nbytes > MOST:
                del self.made[next(iter(self.made))]
            self.made[caption] = made
        return self.made[caption]

    def _brought(self, captions: Sequence[Tensor], texts: Tensor) -> list[Tensor]:
        """On the device of the texts, (B, n, D): of each layer (captions, n, out)"""
        here = torch.empty(len(captions), len(captions[0]), dtype=captions[0].dtype, device=texts.device)
        for row, made in zip(here, captions, strict=True):
            row.copy_(made, non_blocking=True)
        length = texts.shape[1]
        parts = here.split([length * layer.out_features for layer in self.layers], dim=1)
        return [part.unflatten(1, (length, -1)) for part in parts]
