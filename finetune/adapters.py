"""What trains: a method put on a family's denoiser and text encoders, as groups of parameters with their rates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import cast_training_params
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from torch import nn

from finetune import butterfly, engine, families, keys, methods, words
from finetune.errors import Fault
from finetune.families import Family
from finetune.quiet import quiet
from finetune.settings import Adapter, Model, Optim, Pivot, Words

NAME = "default"
"""PEFT's name of the adapter that trains."""
INITIAL = "initial"
"""Of what `--init` began with, which is taken off by a second adapter that does not train."""
LIVE = [NAME, INITIAL]
"""Both are active together. Layers without the second one go without it."""


@dataclass(frozen=True)
class Group:
    """The parameters of one part of the pipeline, trained at one learning rate."""

    part: str
    """The pipeline's name of the module: "unet", "text_encoder"."""
    parameters: list[nn.Parameter]
    lr: float
    start: int = 0
    """The first step in which it trains, 0 being the run's"""
    stop: int | None = None
    """The first one in which it does not any more; None: it trains to the end"""

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def when(self) -> str:
        """The steps in which it trains, where these are not all."""
        said = f" after step {self.start}" if self.start else ""
        return said + (f" up to step {self.stop}" if self.stop is not None else "")

    def trains(self, step: int) -> bool:
        """Whether it does in this step, 0 being the run's first."""
        return self.start <= step and (self.stop is None or step < self.stop)


def check(adapter: Adapter, optim: Optim, model: Model, accelerator: Accelerator) -> None:
    """Refuse what a method cannot do as it was asked, on that base and engine. Needs no model."""
    methods.check(adapter)
    if model.quantize:
        methods.require_base(adapter, model.quantize)
        if engine.is_sharding(accelerator):
            raise Fault(
                f"--quantize {model.quantize}: {engine.running(accelerator)} takes weights apart or casts them, which "
                "these are not made for. Take several processes without it (torchrun): each holds the whole base."
            )
    if optim.optimizer == "prodigy" and adapter.lora_plus_ratio != 1:
        raise Fault(
            f"--optimizer prodigy --lora-plus-ratio {adapter.lora_plus_ratio:g}: it finds one rate for all that "
            "trains. Leave the ratio out, or take another optimizer."
        )


def check_pivot(pivot: Pivot, optim: Optim) -> None:
    """Refuse parts of a run that cannot be. Needs no model."""
    told = f"--word-until {pivot.word_until:g} --adapter-from {pivot.adapter_from:g}"
    if not (0 < pivot.word_until <= 1 and 0 <= pivot.adapter_from < 1):
        raise Fault(f"{told}: shares of the steps, the first more than 0 and at most 1, the second from 0 to below 1.")
    if pivot.adapter_from > pivot.word_until:
        raise Fault(f"{told}: nothing would train in between. Let the adapter begin where the word is held, or before.")
    if optim.optimizer == "prodigy" and pivot.word_lr != optim.lr:
        raise Fault(
            f"--optimizer prodigy --lr {optim.lr:g} --word-lr {pivot.word_lr:g}: it finds one rate for all that trains "
            f"together. Say --word-lr {optim.lr:g}."
        )


def in_turn(adapted: Sequence[Group], taught: Sequence[Group], pivot: Pivot, steps: int) -> list[Group]:
    """The groups of an adapter and of new words, each in its part of the steps; both have one at least."""
    stop = max(1, round(pivot.word_until * steps))
    start = min(round(pivot.adapter_from * steps), steps - 1)
    words_stop = None if stop >= steps else stop
    return [replace(g, start=start) for g in adapted] + [replace(g, stop=words_stop) for g in taught]


def require_whole(model: Model) -> None:
    """Refuse a base that is held otherwise where its own weights train."""
    if model.quantize:
        raise Fault(
            f"--quantize {model.quantize}: the base's own weights train here, and codes of {model.quantize} have no "
            "gradient. Train an adapter, the recipe lora; or take --weights bf16 --precision bf16 to save memory."
        )
    if model.offload_blocks:
        raise Fault(
            "--offload-blocks: the base's own weights train here, which stay where they are stepped. Train an adapter, "
            "the recipe lora; or take --optimizer-in-backward --max-grad-norm 0 to save memory."
        )


def adapt(family: Family, adapter: Adapter, lr: float, text_encoder_lr: float | None, seed: int) -> list[Group]:
    """Put an adapter on through PEFT, by its method; nothing else of the pipeline trains.

    What trains is float32 whatever the base's precision: its steps are smaller than bf16 can add up. Raises Fault where
    a pattern fits no layer.
    """
    methods.check(adapter)
    families.freeze(family)
    targets = {family.denoiser_name: family.adapter_targets}
    targets |= dict.fromkeys(family.text_encoder_names, family.text_adapter_targets)
    chosen: dict[str, methods.Places] = {}
    for part in _rates(family, lr, text_encoder_lr):
        module = getattr(family.pipeline, part)
        spatial = part == family.denoiser_name and adapter.conv_rank is not None
        chosen[part] = methods.places(module, adapter, targets[part], spatial)
    _require_used(adapter, chosen)
    for part, places in chosen.items():
        module, config = getattr(family.pipeline, part), methods.METHODS[adapter.method].config(adapter, places)
        with keys.seeded(seed, "adapter", part):
            module.add_adapter(config, NAME)
        butterfly.share(module)
        if adapter.init != "default":
            _begin(module, adapter, config)
        cast_training_params(module, torch.float32)
    for parameter in beside(family).values():
        parameter.requires_grad_(False)
    return groups(family, lr, text_encoder_lr, adapter.lora_plus_ratio)


def teach(
    family: Family, new: Sequence[str], settings: Words, lr: float, seed: int, captions: Sequence[str] = ()
) -> list[Group]:
    """Teach the text encoders new words, whose vectors train: a group for each encoder. See `finetune.words`."""
    return [Group(part, [rows], lr) for part, rows in words.teach(family, new, settings, seed, captions).items()]


def taught(family: Family, lr: float) -> list[Group]:
    """The groups of a family that was taught words."""
    return [Group(part, [layer.rows], lr) for part, layer in words.taught(family).items()]


def adapted(family: Family) -> list[Any]:
    """The parts that carry an adapter."""
    return [part for part in families.modules(family).values() if getattr(part, "peft_config", None)]


def knows_base(family: Family) -> bool:
    """Whether all that was trained can be switched `off`."""
    return bool(adapted(family) or words.taught(family))


def beside(family: Family) -> dict[str, nn.Parameter]:
    """What an adapter consists of besides what trains, by part and name: what `--init` began with."""
    return {
        f"{part}.{name}": parameter
        for part, module in families.modules(family).items()
        for name, parameter in module.named_parameters()
        if INITIAL in name.split(".")
    }


def _begin(module: Any, adapter: Adapter, config: PeftConfig) -> None:
    """Begin with a part of each weight, B A, and take it off again by the second adapter, -B A."""
    with quiet():  # that it is the second one
        module.add_adapter(config, INITIAL)
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            weight = families.quantized.weight(layer.get_base_layer())
            rank, scale = layer.r[NAME], layer.scaling[NAME]
            if rank > min(weight.flatten(1).shape):
                shape = tuple(weight.shape)
                raise Fault(f"--init {adapter.init}: a weight of shape {shape} has no {rank} directions. Lower --rank.")
            up, down = methods.INITIAL[adapter.init](weight.float() / scale, rank)
            for name, sign in zip(LIVE, (1, -1), strict=True):
                halves: Any = layer.lora_B[name], layer.lora_A[name]
                for half, value in zip(halves, (sign * up, down), strict=True):
                    half.weight.data = value.reshape(half.weight.shape).to(torch.float32, copy=True).contiguous()
            layer.set_adapter(LIVE)
            layer.lora_dropout[INITIAL] = nn.Identity()


def _require_used(adapter: Adapter, chosen: dict[str, methods.Places]) -> None:
    """Every pattern fits some layer, and there are convolutions where they are asked for."""
    paths = [path for places in chosen.values() for path in places]
    for flag, patterns in (("rank-pattern", methods.ranks(adapter)), ("alpha-pattern", methods.alphas(adapter))):
        for part, value in patterns:
            if not any(methods.fits(part, path) for path in paths):
                raise Fault(
                    f"--{flag} {part}={value:g}: no layer that is adapted has such a part in its path. One of them: "
                    f"{paths[0]}. The parts are whole names between dots."
                )
    if adapter.conv_rank is not None and not any(
        isinstance(place.module, nn.Conv2d) for places in chosen.values() for place in places.values()
    ):
        raise Fault(f"--conv-rank {adapter.conv_rank}: this model's blocks have no convolutions. Leave it out.")


@contextmanager
def off(family: Family) -> Iterator[None]:
    """Inside, the adapter does nothing and new words are what they began as: the model is the frozen base."""
    with unadapted(family), words.off(family):
        yield


@contextmanager
def unadapted(family: Family) -> Iterator[None]:
    """Inside, the adapter does nothing."""
    parts, kept = adapted(family), beside(family).values()
    for part in parts:
        part.disable_adapters()
    try:
        yield
    finally:
        for part in parts:
            part.enable_adapters()  # all that is active trains again
        for parameter in kept:
            parameter.requires_grad_(False)


@contextmanager
def at(family: Family, strength: float) -> Iterator[None]:
    """Inside, the adapter's change is so many times as strong; of a method that is `methods.Method.linear`."""
    parts = adapted(family) if strength != 1 else []
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, LoraLayer | LycorisLayer)]
    before = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling = {name: strength * scale for name, scale in layer.scaling.items()}
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling


PARTS = {
    "attention": r"\.(attn\d*|attention)\.",
    "self-attention": r"\.attentions\..*\.attn1\.",
    "cross-attention": r"\.attentions\..*\.attn2\.",
    "kv": r"\.attentions\..*\.attn2\.to_[kv]\.",
    "feed-forward": r"\.(ff|ff_context|feed_forward|proj_mlp)\.",
    "norm": r"(^|[._])norm[^.]*\.(weight|bias)$",
    "conv": r"(^|\.)conv|\.attentions\.\d+\.proj_(in|out)\.",
    "down": r"^down_blocks\.",
    "mid": r"^mid_block\.",
    "up": r"^up_blocks\.",
}
"""Parts of a denoiser, by what stands in the names of their weights. (Transformers attend to picture and text at once;
SD 3.5's `attn2` is none that attends to the text.)"""


def full(
    family: Family, lr: float, text_encoder_lr: float | None, weights: str = "fp32", parts: Sequence[str] = ()
) -> list[Group]:
    """Train all weights of the denoiser (Ruiz et al. 2022, 2208.12242), and of the text encoders where asked.

    `weights`: the precision that they are held in, fp32 or bf16. `parts`: of the denoiser these alone; the rest stays
    frozen. Raises Fault where the denoiser has no such part.
    """
    families.freeze(family)
    for part in _rates(family, lr, text_encoder_lr):
        module: nn.Module = getattr(family.pipeline, part)
        module.to(engine.DTYPES[weights])
        for parameter in _chosen(module, parts if part == family.denoiser_name else ()):
            parameter.requires_grad_(True)
    return groups(family, lr, text_encoder_lr)


def _chosen(module: nn.Module, parts: Sequence[str]) -> list[nn.Parameter]:
    """The parameters of any of the parts; without parts all."""
    named = dict(module.named_parameters())
    there = [part for part, spelling in PARTS.items() if any(re.search(spelling, name) for name in named)]
    if missing := [part for part in parts if part not in there]:
        raise Fault(
            f"--parts {missing[0]}: this model's {type(module).__name__} has no such part. It has: {', '.join(there)}."
        )
    return [p for name, p in named.items() if not parts or any(re.search(PARTS[part], name) for part in parts)]


def _rates(family: Family, lr: float, text_encoder_lr: float | None) -> dict[str, float]:
    """The parts of the pipeline that train, with their rates."""
    rates = {family.denoiser_name: lr}
    if text_encoder_lr is not None:
        if not family.trained_text_encoders:
            raise Fault(f"--text-encoder-lr: the text encoders of {family.title} are not trained. Leave it out.")
        rates |= dict.fromkeys(family.trained_text_encoders, text_encoder_lr)
    return rates


def groups(family: Family, lr: float, text_encoder_lr: float | None, plus: float = 1.0) -> list[Group]:
    """What trains of a family that was prepared by one of these: a group for each part.

    `plus`: that of LoRA+; with another one than 1 there is one more group each, of the matrices B at so many times the
    rate.
    """
    made = []
    for part, rate in _rates(family, lr, text_encoder_lr).items():
        trained = {name: p for name, p in getattr(family.pipeline, part).named_parameters() if p.requires_grad}
        trained = {name: p for name, p in trained.items() if not name.endswith(f".{words.ROWS}")}  # see `taught`
        fast = [p for name, p in trained.items() if plus != 1 and ".lora_B." in name]
        slow = [p for name, p in trained.items() if plus == 1 or ".lora_B." not in name]
        made += [Group(part, own, times) for own, times in ((slow, rate), (fast, rate * plus)) if own]
    return made
