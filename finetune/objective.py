"""The mathematics of diffusion training, once, in the papers' symbols.

x0: clean latents, eps: Gaussian noise, x_t: noised latents, all (B, C, H, W); t: timesteps (B,), integers in [0, T);
alpha_bar: the cumulative product of the noise schedule, (T,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]


class Objective(Protocol):
    """What a denoiser was trained to do: how latents are noised, and what it must predict from them."""

    @property
    def prediction(self) -> str:
        """The name of what is predicted."""
        ...

    @property
    def timesteps(self) -> int:
        """T, the number of training timesteps."""
        ...

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...

    def min_snr(self, t: Tensor, gamma: float) -> Tensor:
        """Weight per picture, (B,)."""
        ...


@dataclass(frozen=True)
class Diffusion:
    """Discrete-time diffusion (Ho et al. 2020, 2006.11239), predicting the noise or the velocity."""

    alphas_cumprod: Tensor
    """alpha_bar, (T,), float32"""
    prediction: Prediction

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"prediction type {self.prediction!r}: known are {', '.join(get_args(Prediction))}")

    @property
    def timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def _alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each (B, 1, 1, 1)."""
        alpha_bar = self.alphas_cumprod.to(like.device)[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps (Ho et al. 2020, eq. 4)."""
        alpha, sigma = self._alpha_sigma(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """eps, or v = alpha_t eps - sigma_t x0 (Salimans & Ho 2022, 2202.00512, section 4)."""
        if self.prediction == "epsilon":
            return eps
        alpha, sigma = self._alpha_sigma(t, x0)
        return alpha * eps - sigma * x0

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2, (B,)."""
        alpha_bar = self.alphas_cumprod.to(t.device)[t]
        return alpha_bar / (1 - alpha_bar)

    def min_snr(self, t: Tensor, gamma: float) -> Tensor:
        """Weight per picture, (B,)."""
        return min_snr_weight(self.snr(t), gamma, self.prediction)


def min_snr_weight(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Min-SNR-gamma (Hang et al. 2023, 2303.09556): weights w of the loss on x0 are min(SNR, gamma).

    In terms of the predicted quantity that is min(SNR, gamma) / SNR for the noise (section 3.4)
    and min(SNR, gamma) / (SNR + 1) for the velocity (appendix).
    """
    clipped = snr.clamp(max=gamma)
    return clipped / snr if prediction == "epsilon" else clipped / (snr + 1)


def loss_per_picture(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of each picture, (B,), in float32 whatever the inputs' precision.

    With weights (B, 1, H, W), a mask: mean(m * (prediction - target)^2), the mean over all of the picture, so that a
    small mask means a small loss and the area inside is learned at the same rate whatever lies around it.
    """
    error = torch.nn.functional.mse_loss(prediction.float(), target.float(), reduction="none")
    return (error if weights is None else error * weights).flatten(1).mean(1)
