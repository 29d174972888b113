"""DeepSpeed's ZeRO, stages 1 and 2 (Rajbhandari et al. 2020, 1910.02054), as the loop drives an engine: gradients add
up, are looked at, and only then it steps; its state is told whole.

Each process holds all weights, in fp32, and of the optimizer's state, and in stage 2 of the gradients, its own part:
a stretch of all weights of a group laid end to end (`flat` below).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune import engine


def prepare(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, max_grad_norm: float
) -> tuple[Any, ZeroOptimizer]:
    """Accelerate's `prepare`, for a model that the loop gives batches of its own making."""
    config = accelerator.deepspeed_plugin.deepspeed_config
    fixed = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": accelerator.num_processes}  # its books, no more
    before = dict(config)
    config.update(fixed, gradient_clipping=max_grad_norm, bf16={"enabled": False})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    prepared, _ = accelerator.prepare(Trained(model, parameters, accelerator), optimizer)
    config["bf16"] = before["bf16"]  # by which Accelerate knows the precision
    stepping = ZeroOptimizer(prepared, accelerator.is_main_process)
    accelerator.deepspeed_engine_wrapped = Backward(prepared)
    return prepared, stepping


@contextmanager
def adding_up(prepared: Any) -> Iterator[None]:
    """Around a forward and backward pass whose gradients are not yet a step's all."""
    prepared.set_gradient_accumulation_boundary(False)
    try:
        yield
    finally:
        prepared.set_gradient_accumulation_boundary(True)


class Trained(nn.Module):
    """What DeepSpeed sees of a model: the weights that train. It takes no frozen ones in another precision, and would
    only send them around. bf16 is computed under autocast, as with all engines; DeepSpeed's own would train other
    numbers.
    """

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters)
        self.whole, self.accelerator = (model,), accelerator  # in a tuple, where no module looks for modules

    def forward(self, *given: Any) -> Tensor:
        with engine.autocast(self.accelerator):
            return self.whole[0](*given)

    def train(self, mode: bool = True) -> Trained:
        self.whole[0].train(mode)
        return super().train(mode)


class Backward:
    """In the place of Accelerate's wrapper, which steps within `backward`, before anyone has seen the gradients."""

    def __init__(self, prepared: Any) -> None:
        self.engine = prepared

    def backward(self, loss: Tensor, **_: Any) -> None:
        self.engine.backward(loss)

    def get_global_grad_norm(self) -> float:
        """Of all processes' gradients, which wait for the step; infinite where one is not finite."""
        return float(self.engine.optimizer.scaled_global_norm())


class ZeroOptimizer:
    """Steps when it is told to, and tells and takes the state that one process would have."""

    def __init__(self, prepared: Any, leads: bool) -> None:
        self.engine, self.zero, self.leads = prepared, prepared.optimizer, leads
        self.inner: torch.optim.Optimizer = self.zero.optimizer
        """The one that was prepared: it steps this process's part"""
        self.groups = list(zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups, strict=True))
        """Of each group its parameters, and this process's part of them laid flat"""
        self.deepspeed = importlib.import_module("deepspeed.utils")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        """A step's gradients go with it. What is left is of a step that was not taken."""
        self.zero.zero_grad()
        for waiting in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
            waiting.update(dict.fromkeys(waiting))

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as one process's optimizer tells it, in the leading process. All processes must ask."""
        numbers, state, groups = count(), dict[int, Any](), []
        for group, (parameters, flat) in zip(self.param_groups, self.groups, strict=True):
            mine = list(islice(numbers, len(parameters)))
            groups.append({**group, "params": mine})
            if own := self.inner.state.get(flat):
                self._link(parameters, flat)
                state |= {number: self._gathered(p, own) for number, p in zip(mine, parameters, strict=True)}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, told: dict[str, Any]) -> None:
        """Take this process's part of a whole state, and of the weights, which are there already."""
        state, groups = told["state"], told["param_groups"]
        firsts = {number: state[group["params"][0]] for number, group in enumerate(groups) if state}
        parts = {number: self._empty(first, self.groups[number][1]) for number, first in firsts.items()}
        held = [{**group, "params": [number]} for number, group in enumerate(groups)]
        self.inner.load_state_dict({"state": parts, "param_groups": held})
        for group, (parameters, flat) in zip(groups, self.groups, strict=True):
            if state:
                self._link(parameters, flat)
                for parameter, number in zip(parameters, group["params"], strict=True):
                    self._set(parameter, state[number])
        self.zero.refresh_fp32_params()

    def _link(self, parameters: list[nn.Parameter], flat: Tensor) -> None:
        """Tell each parameter where its state lies. DeepSpeed does when the first group has stepped, of it alone."""
        self.deepspeed.lazy_init_hp_params_optimizer_state(parameters, flat, self.inner.state)

    def _gathered(self, parameter: nn.Parameter, own: dict[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {}
        for name, value in own.items():
            whole = self.deepspeed.safe_get_full_optimizer_state(parameter, name) if _is_laid_flat(value) else value
            told[name] = whole.cpu() if self.leads else None
        return told

    def _empty(self, of_one: dict[str, Any], flat: Tensor) -> dict[str, Any]:
        return {name: torch.zeros_like(flat) if _is_laid_flat(value) else value for name, value in of_one.items()}

    def _set(self, parameter: nn.Parameter, of_one: dict[str, Any]) -> None:
        for name, value in of_one.items():
            if _is_laid_flat(value):
                self.deepspeed.safe_set_full_optimizer_state(parameter, value, name)


def _is_laid_flat(value: Any) -> bool:
    """Of an optimizer's state: whether it has a number for each of a weight's; the step's number is one for all."""
    return isinstance(value, Tensor) and value.dim() > 0
