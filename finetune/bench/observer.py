"""Writes down what the steps of a training script take, measured where it calls PyTorch and Accelerate.

Needs nothing of this package, see `watched`.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

TIMESTEPS = 1000
"""Of Stable Diffusion"""
ADAPTER = re.compile(r"lora_(?:A|B)(?=\.)|lora_(?:down|up)(?=\.)")
HALVES = {"lora_A": "lora_down", "lora_B": "lora_up"}
STD = 0.02
"""Of the values that adapters begin with, where all are to begin with the same: with B = 0, A would have no gradient"""


class Counted(TorchDispatchMode):
    """How often something is computed, views and empty tensors aside: on a GPU, launches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or any(word in str(func) for word in ("empty", "detach", "unsafe_view")))
        return func(*args, **(kwargs or {}))


class Kept:
    """Bytes that are kept for the backward pass beside the weights, what is shared counted once."""

    def __init__(self) -> None:
        gc.unfreeze()  # what a trainer may have hidden from the collector
        parameters = [one for one in gc.get_objects() if issubclass(type(one), nn.Parameter)]
        self.own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.held: dict[int, Tensor] = {}
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if not self.bytes and place not in self.own:
            self.held[place] = tensor
        return tensor

    def whole(self) -> None:
        """The forward pass is over: what is packed from now on was computed again."""
        self.bytes = self.bytes or sum(tensor.untyped_storage().nbytes() for tensor in self.held.values())
        self.held.clear()


class Observer:
    """What is seen of one training: in each of its steps the time; where it is asked for, once what a step does."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan, self.done = plan, 0
        self.cuda = torch.cuda.is_available()
        self.steps: list[dict[str, float]] = []
        self.events: list[Any] = []
        self.found: dict[str, Any] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.kept: Kept | None = None
        self.counted = Counted()
        self._begin, self._prepare, self._backward = Accelerator.__init__, Accelerator.prepare, Accelerator.backward

    def install(self) -> None:
        register_optimizer_step_post_hook(self._stepped)
        known: Any = Accelerator
        known.__init__ = lambda accelerator, *given, **named: self._begun(accelerator, given, named)
        if self.plan["seed"] is None:
            return
        known.prepare = lambda accelerator, *given, **named: self._prepared(accelerator, given, named)
        known.backward = lambda accelerator, loss, **named: self._passed(accelerator, loss, named)
        _inject_torch(self)
        if self.plan["module"]:
            _inject_finetune(self)

    def draw(self, *key: Any, shape: tuple[int, ...]) -> np.ndarray:
        return _rng(self.plan["seed"], *key).standard_normal(shape, dtype=np.float32)

    def timestep(self, row: int) -> int:
        return int(_rng(self.plan["seed"], "timestep", self.done, row).integers(TIMESTEPS))

    def _begun(self, accelerator: Accelerator, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Trainers make one before they load a model."""
        self.found.setdefault("before", 0 if self.cuda else _held("VmRSS"))
        self._begin(accelerator, *given, **named)

    def _prepared(self, accelerator: Accelerator, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What the parameters are called; adapters begin with the same values in all trainers."""
        for model in (one for one in given if isinstance(one, nn.Module)):
            for name, parameter in model.named_parameters():
                self.parameters[plain(name)] = parameter
                if parameter.requires_grad and ADAPTER.search(name):
                    values = STD * self.draw("initial", plain(name), shape=tuple(parameter.shape))
                    parameter.data.copy_(torch.from_numpy(values))
        return self._prepare(accelerator, *given, **named)

    def _passed(self, accelerator: Accelerator, loss: Tensor, named: dict[str, Any]) -> None:
        """A forward pass is over: its loss; then the gradients, before anything is done to them."""
        if self.kept:
            self.kept.whole()
        self._backward(accelerator, loss, **named)
        if "loss" not in self.found:
            self.found["loss"] = loss.item()
            given = {name: one.grad for name, one in self.parameters.items() if one.grad is not None}
            arrays: dict[str, Any] = {name: grad.float().cpu().numpy() for name, grad in given.items()}
            np.savez(self.plan["gradients"], **arrays)

    def _stepped(self, optimizer: Optimizer, *given: Any) -> None:
        self.done += 1
        self.steps.append({"wall": time.time(), "process": time.process_time()})
        if self.cuda:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        if self.done == 1:
            every = [one for group in optimizer.param_groups for one in group["params"]]
            self.found["trained"] = sum(one.numel() for one in every if one.requires_grad)
        if self.done == self.plan["steps"]:
            self.found["peak"] = self._peak()
        if self.plan["seed"] is not None:
            self._count()

    def _count(self) -> None:
        """From the end of the first step to the end of the second."""
        if self.done == 1:
            self.kept = Kept()
            self.kept.hooks.__enter__()
            self.counted.__enter__()
        elif self.done == 2 and self.kept:
            self.counted.__exit__(None, None, None)
            self.kept.hooks.__exit__(None, None, None)
            self.found |= {"kept": self.kept.bytes, "computed": self.counted.count}
            self.kept = None

    def _peak(self) -> int:
        """Bytes: the most that was held at once, on the GPU where there is one."""
        return torch.cuda.max_memory_allocated() if self.cuda else _held("VmHWM")

    def report(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            for step, event in zip(self.steps, self.events, strict=True):
                step["device"] = self.events[0].elapsed_time(event) / 1000
        versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in VERSIONS}
        told = {**self.found, "steps": self.steps, "versions": {n: str(v) for n, v in versions.items() if v}}
        device = torch.cuda.get_device_name() if self.cuda else None
        Path(self.plan["report"]).write_text(json.dumps({**told, "device": device}), encoding="utf-8")


VERSIONS = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "finetune")


def _held(which: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most; where Linux does not tell, at most."""
    status = Path("/proc/self/status")
    told = re.search(rf"{which}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if told:
        return int(told[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plain(name: str) -> str:
    """A parameter's name, as PEFT, diffusers and kohya all have it but for dots and prefixes."""
    name = ADAPTER.sub(lambda found: HALVES.get(found[0], found[0]), name).replace(".default.", ".")
    return re.sub(r"^(parts_)?(lora_)?(unet_)?", "", name.replace(".", "_"))


def _rng(*key: Any) -> np.random.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _inject_torch(seen: Observer) -> None:
    """Noise and timesteps of scripts that draw them from PyTorch; latents are the VAE's mean."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    randn_like, randint = torch.randn_like, torch.randint

    def noise(like: Tensor, **named: Any) -> Tensor:
        if like.dim() != 4:
            return randn_like(like, **named)
        rows = [seen.draw("noise", seen.done, row, shape=tuple(like.shape[1:])) for row in range(len(like))]
        return torch.from_numpy(np.stack(rows)).to(like)

    def timesteps(*given: Any, **named: Any) -> Tensor:
        drawn: Tensor = randint(*given, **named)
        if TIMESTEPS not in given or drawn.dim() != 1:
            return drawn
        return drawn.new_tensor([seen.timestep(row) for row in range(len(drawn))])

    for owner, name, instead in (
        (torch, "randn_like", noise),
        (torch, "randint", timesteps),
        (DiagonalGaussianDistribution, "sample", lambda distribution, generator=None: distribution.mean),
    ):
        setattr(owner, name, instead)


def _inject_finetune(seen: Observer) -> None:
    """The same of this package, which draws each picture's by its place in the step."""
    keys: Any = importlib.import_module("finetune.keys")
    normal, integer = keys.normal, keys.integer

    def drawn(shape: tuple[int, ...], seed: int, purpose: str, *place: Any) -> Tensor:
        if purpose == "latents":
            return torch.zeros(shape)
        if purpose == "noise":
            return torch.from_numpy(seen.draw("noise", *place, shape=tuple(shape)))
        made: Tensor = normal(shape, seed, purpose, *place)
        return made

    def number(low: int, high: int, seed: int, purpose: str, *place: Any) -> int:
        return seen.timestep(place[1]) if purpose == "timestep" else integer(low, high, seed, purpose, *place)

    keys.normal, keys.integer = drawn, number
