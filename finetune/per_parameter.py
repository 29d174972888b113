"""An optimizer for each parameter: where memory is short, one parameter steps at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from finetune.adapters import Group


class PerParameter(Optimizer):
    """Steps each parameter by an optimizer of its own, at the rate of its group; seen from outside, it is one.

    Weights, state and `state_dict` are those of one optimizer over all groups, to the bit, where a parameter's step
    follows from its own gradient and state (`optim.Known.separable`). A parameter in bfloat16 is widened to float32,
    which its optimizer's state stays in, for the time of its step alone, and then rounded.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        make: Callable[[list[Group]], Optimizer],
        rounded: Callable[[nn.Parameter, Tensor], Tensor],
    ) -> None:
        """`rounded`: a parameter that is not float32, and its new value in float32 -> the value in its own precision"""
        super().__init__([{"params": group.parameters, "lr": group.lr} for group in groups], {})
        self.rounded = rounded
        self.wide = {p: _stand_in(p) for group in groups for p in group.parameters}
        self.own = {
            p: make([Group(group.part, [self.wide[p]], group.lr)]) for group in groups for p in group.parameters
        }
        self.group_of = {p: group for group in self.param_groups for p in group["params"]}
        self.stepped: set[nn.Parameter] = set()
        """Those that are ahead of the others in this step"""

    @property
    def parts(self) -> list[Optimizer]:
        return list(self.own.values())

    @torch.no_grad()
    def step_one(self, parameter: nn.Parameter) -> None:
        """Step a parameter before the others."""
        own, wide = self.own[parameter], self.wide[parameter]
        own.param_groups[0]["lr"] = self.group_of[parameter]["lr"]
        self.stepped.add(parameter)
        if wide is parameter or parameter.grad is None:
            own.step()
            return
        wide.data, wide.grad = parameter.float(), parameter.grad.float()
        own.step()
        parameter.copy_(self.rounded(parameter, wide.data))
        wide.grad, wide.data = None, wide.data.new_empty(0)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step those that have not stepped yet, which ends the step of all."""
        for parameter in self.own:
            if parameter not in self.stepped:
                self.step_one(parameter)
        self.stepped.clear()

    def state_dict(self) -> dict[str, Any]:
        """As one optimizer over all groups tells it."""
        state: dict[int, Any] = {}
        groups, numbers = [], {parameter: number for number, parameter in enumerate(self.own)}
        for group in self.param_groups:
            parts = {numbers[p]: self.own[p].state_dict() for p in group["params"]}
            state |= {number: part["state"][0] for number, part in parts.items() if 0 in part["state"]}
            shared = next(iter(parts.values()))["param_groups"][0]
            groups.append({**shared, **group, "params": list(parts)})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError when the state is one of other groups."""
        for group, told in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group |= {name: told[name] for name in ("lr", "initial_lr") if name in told}
            for parameter, number in zip(group["params"], told["params"], strict=True):
                own = {0: state_dict["state"][number]} if number in state_dict["state"] else {}
                self.own[parameter].load_state_dict({"state": own, "param_groups": [{**told, "params": [0]}]})
        self.stepped.clear()


class InBackward:
    """Steps each parameter as soon as the backward pass has its gradient, which is freed at once (Lv et al. 2023,
    LOMO, 2306.09782, section 3.2): the gradients of a whole model are never held together.
    """

    def __init__(self, optimizer: PerParameter) -> None:
        self.optimizer, self.norms = optimizer, dict[nn.Parameter, Tensor]()
        self.finite, self.completing = True, False
        for parameter in optimizer.own:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    @contextmanager
    def last_pass(self, loss: Tensor) -> Iterator[None]:
        """Around the backward pass that completes a step's gradients; those of passes before it add up.

        From the first gradient on that is not finite, and at all when the step's loss is not, nothing steps.
        """
        self.norms, self.finite, self.completing = {}, bool(loss.isfinite()), True
        try:
            yield
        finally:
            self.completing = False
        for parameter in self.optimizer.own:
            if parameter.grad is not None:  # of an earlier pass alone
                self._take(parameter)

    def norm(self, parameters: Iterable[nn.Parameter]) -> float:
        """Of the gradients of the last step, added up in the order of the parameters."""
        return float(get_total_norm([self.norms[p] for p in parameters if p in self.norms]))

    def _arrived(self, parameter: Tensor) -> None:
        if self.completing:
            self._take(parameter)  # type: ignore[arg-type]

    def _take(self, parameter: nn.Parameter) -> None:
        if parameter in self.norms:
            raise RuntimeError("a gradient came in two parts: --optimizer-in-backward cannot train this model")
        self.norms[parameter] = norm = get_total_norm([parameter.grad])  # type: ignore[list-item]
        self.finite = self.finite and bool(norm.isfinite())
        if self.finite:
            self.optimizer.step_one(parameter)
        parameter.grad = None


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """What the parameter's optimizer steps: the parameter, or an empty one in float32 that is filled when it does."""
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(torch.empty(0, device=parameter.device))
