"""The mathematics of diffusion training, once, in the papers' symbols.

x0: clean latents, eps: Gaussian noise, x_t: noised latents, all (B, C, H, W); t: timesteps (B,), integers in [0, T),
the larger the noisier; alpha_bar: the cumulative product of the noise schedule, (T,); sigma: a flow's shares of noise,
(T,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from finetune.errors import Fault
from finetune.settings import Loss

Prediction = Literal["epsilon", "v_prediction"]
FLOW = "flow"


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

    def told(self, t: Tensor) -> Tensor:
        """What the denoiser is told of timesteps, (B,)."""
        ...

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...

    def weights(self, t: Tensor, settings: Loss) -> Tensor | None:
        """What the settings weigh the loss of each picture by, (B,); None: all alike."""
        ...

    def zero_terminal(self) -> Objective:
        """The same with pure noise at the last timestep."""
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

    def told(self, t: Tensor) -> Tensor:
        return t

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

    def weights(self, t: Tensor, settings: Loss) -> Tensor | None:
        if settings.min_snr_gamma is not None:
            return self.min_snr(t, settings.min_snr_gamma)
        return self.debiased(t) if settings.debiased else None

    def min_snr(self, t: Tensor, gamma: float) -> Tensor:
        """Weight per picture, (B,)."""
        return min_snr_weight(self.snr(t), gamma, self.prediction)

    def debiased(self, t: Tensor) -> Tensor:
        """Weight per picture, (B,)."""
        return debiased_weight(self.snr(t), self.prediction)

    def zero_terminal(self) -> Diffusion:
        """The same with pure noise at the last timestep."""
        return replace(self, alphas_cumprod=rescale_zero_terminal_snr(self.alphas_cumprod))


@dataclass(frozen=True)
class Flow:
    """Rectified flow (Liu et al. 2022, 2209.03003): straight lines from pictures to noise, predicting their slope."""

    sigmas: Tensor
    """Share of noise at each timestep, (T,), rising to 1, float32"""
    prediction: str = FLOW

    @property
    def timesteps(self) -> int:
        return len(self.sigmas)

    def told(self, t: Tensor) -> Tensor:
        """sigma_t T, as diffusers' FlowMatchEulerDiscreteScheduler tells it: float32."""
        return self.sigmas.to(t.device)[t] * self.timesteps

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 - sigma_t) x0 + sigma_t eps (Esser et al. 2024, 2403.03206, eq. 13)."""
        sigma = self.sigmas.to(x0.device)[t].to(x0.dtype).view(-1, *[1] * (x0.ndim - 1))
        return sigma * eps + (1 - sigma) * x0

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """dx_t / dsigma = eps - x0."""
        return eps - x0

    def weights(self, t: Tensor, settings: Loss) -> None:
        """All alike: how often each timestep is drawn is what weighs them (Esser et al. 2024, section 3.1)."""

    def zero_terminal(self) -> Flow:
        """It ends at pure noise as it is."""
        return self


def min_snr_weight(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Min-SNR-gamma (Hang et al. 2023, 2303.09556): weights w of the loss on x0 are min(SNR, gamma).

    In terms of the predicted quantity that is min(SNR, gamma) / SNR for the noise (section 3.4)
    and min(SNR, gamma) / (SNR + 1) for the velocity (appendix).
    """
    clipped = snr.clamp(max=gamma)
    return clipped / snr if prediction == "epsilon" else clipped / (snr + 1)


def debiased_weight(snr: Tensor, prediction: Prediction) -> Tensor:
    """Debiased estimation (Yu et al. 2023, 2310.08442): 1 / sqrt(SNR) for the noise's loss.

    That is sqrt(SNR) for the loss on x0, and so sqrt(SNR) / (SNR + 1) for the velocity.
    """
    return 1 / snr.sqrt() if prediction == "epsilon" else snr.sqrt() / (snr + 1)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """alpha_bar with alpha_bar_T = 0: its root shifted, then scaled at the start (Lin et al. 2305.08891, alg. 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def logit_normal(normal: float, mean: float, std: float) -> float:
    """A share of T whose logit is normal (Esser et al. 2024, 2403.03206, eq. 19)."""
    return 1 / (1 + math.exp(-(mean + std * normal)))


Share = TypeVar("Share", float, Tensor)


def shifted(t: Share, shift: float) -> Share:
    """s t / (1 + (s - 1) t), t a share of T (Esser et al. 2024, 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


UNWEIGHED = (
    "The weights are for diffusion's noise schedules; a flow is weighed by how its timesteps are drawn: "
    "--timesteps logit_normal."
)
SENSELESS: dict[str, dict[str, str]] = {
    "epsilon": {
        "zero_terminal_snr": "At the last timestep its input would be pure noise and what it must tell the same: it "
        "learns nothing. Take a model that predicts the velocity (v_prediction).",
    },
    FLOW: {
        "min_snr_gamma": UNWEIGHED,
        "debiased": UNWEIGHED,
        "noise_offset": "It begins at pure noise, and so learns how dark or light a picture is as it is.",
        "zero_terminal_snr": "Its last timestep is pure noise as it is.",
    },
}
"""By what a model predicts: the settings that make no sense for it, and why"""


def check(settings: Loss, prediction: str | None = None) -> None:
    """Refuse settings that make no sense together, or, where it is known, not with what the model predicts."""
    if settings.min_snr_gamma is not None and settings.debiased:
        raise Fault("--min-snr-gamma and --debiased: both weigh the timesteps. Choose one of them.")
    for name in ("huber_delta", "timestep_shift", "logit_std"):
        if getattr(settings, name) <= 0:
            raise Fault(f"--{name.replace('_', '-')} {getattr(settings, name):g}: more than 0.")
    for name in ("noise_offset", "input_perturbation"):
        if getattr(settings, name) < 0:
            raise Fault(f"--{name.replace('_', '-')} {getattr(settings, name):g}: 0 or more.")
    for name, why in SENSELESS.get(prediction or "", {}).items():
        if getattr(settings, name) not in (None, False, 0):
            raise Fault(f"--{name.replace('_', '-')}: the model predicts {prediction}. {why}")


def loss_per_picture(
    prediction: Tensor, target: Tensor, weights: Tensor | None = None, kind: str = "l2", delta: float = 0.1
) -> Tensor:
    """Mean error of each picture, (B,), in float32 whatever the inputs' precision.

    The error is the square e^2, or Huber's (1964): e^2 up to delta, then delta (2 |e| - delta); smooth_l1 is that by
    delta. Both are twice PyTorch's, so that a small error counts as much as by its square.

    With weights (B, 1, H, W), a mask: mean(m * (prediction - target)^2), the mean over all of the picture, so that a
    small mask means a small loss and the area inside is learned at the same rate whatever lies around it.
    """
    error = _error(prediction.float(), target.float(), kind, delta)
    return (error if weights is None else error * weights).flatten(1).mean(1)


def _error(prediction: Tensor, target: Tensor, kind: str, delta: float) -> Tensor:
    match kind:
        case "l2":
            return torch.nn.functional.mse_loss(prediction, target, reduction="none")
        case "huber":
            return 2 * torch.nn.functional.huber_loss(prediction, target, reduction="none", delta=delta)
        case "smooth_l1":
            return 2 * torch.nn.functional.smooth_l1_loss(prediction, target, reduction="none", beta=delta)
        case _:
            raise ValueError(f"unknown error {kind!r}")
