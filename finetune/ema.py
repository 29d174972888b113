"""An exponential moving average of the weights that train, kept on any device (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import Fault
from finetune.settings import Optim, Train
from finetune.sharding import like


def check(train: Train, optim: Optim) -> None:
    """Refuse, before a model is loaded, an average that cannot be kept."""
    if not 0 <= train.ema < 1:
        raise Fault(f"--ema {train.ema:g}: from 0 to less than 1; 0.999 is usual, 0.99 for less than a thousand steps.")
    if train.ema and optim.optimizer == "schedulefree":
        raise Fault("--ema: --optimizer schedulefree averages the weights itself. Leave one of them out.")


class Average:
    """shadow <- decay * shadow + (1 - decay) * weight after each step, in float32."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], decay: float, device: torch.device | str | None = None
    ) -> None:
        """`device`: where the average is kept; "cpu" spares the GPU's memory. Default: beside the parameters."""
        self.parameters, self.limit, self.steps = dict(parameters), decay, 0
        self.shadow = {
            name: p.detach().to(device or p.device, torch.float32, copy=True) for name, p in self.parameters.items()
        }

    def decay(self) -> float:
        """With n steps done min(decay, n / (9 + n)), which forgets the beginning soon; the first step is copied."""
        return 0.0 if self.steps <= 1 else min(self.limit, self.steps / (9 + self.steps))

    @torch.no_grad()
    def update(self) -> None:
        """After each step."""
        self.steps += 1
        for name, shadow in self.shadow.items():
            shadow.lerp_(self.parameters[name].detach().to(shadow), 1 - self.decay())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again, to the bit."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self.apply()
            yield
        finally:
            self._set(own)

    def apply(self) -> None:
        """The model takes the averaged weights, for good."""
        self._set(self.shadow)

    def state(self) -> dict[str, Any]:
        """The average by the parameters' names, and of how many steps it is."""
        return {"steps": self.steps, "average": dict(self.shadow)}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a state; without one the average begins with the weights as they are.

        Raises Fault when it is of other weights.
        """
        self.steps, values = (state["steps"], state["average"]) if state else (0, self.parameters)
        if values.keys() != self.shadow.keys():
            raise Fault("the average is of other weights than are trained now. Resume with the run's own settings.")
        with torch.no_grad():
            for name, shadow in self.shadow.items():
                shadow.copy_(like(values[name], shadow))

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
