"""The mathematics against diffusers' own functions and the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.objective import Diffusion, Flow, Prediction, loss_per_picture, min_snr_weight
from finetune.settings import Loss

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def random_step(seed: int, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(batch, 4, 8, 8, generator=generator)
    eps = torch.randn(batch, 4, 8, 8, generator=generator)
    return x0, eps, torch.randint(0, 1000, (batch,), generator=generator)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_noising_and_targets_equal_diffusers(seed: int) -> None:
    x0, eps, t = random_step(seed)
    noise, velocity = (Diffusion(SCHEDULER.alphas_cumprod, kind) for kind in ("epsilon", "v_prediction"))
    assert torch.equal(noise.noised(x0, eps, t), SCHEDULER.add_noise(x0, eps, t))
    assert torch.equal(noise.target(x0, eps, t), eps)
    assert torch.equal(velocity.target(x0, eps, t), SCHEDULER.get_velocity(x0, eps, t))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.floats(0.5, 20))
def test_min_snr_weights_equal_those_of_diffusers_training_scripts(kind: Prediction, seed: int, gamma: float) -> None:
    """The formula as diffusers' train_text_to_image.py states it, on its own compute_snr."""
    t = random_step(seed)[2]
    snr = compute_snr(SCHEDULER, t)
    weight = torch.stack([snr, gamma * torch.ones_like(t)], dim=1).min(dim=1)[0]
    expected = weight / snr if kind == "epsilon" else weight / (snr + 1)
    objective = Diffusion(SCHEDULER.alphas_cumprod, kind)
    torch.testing.assert_close(objective.snr(t), snr, rtol=1e-5, atol=0)
    torch.testing.assert_close(objective.min_snr(t, gamma), expected, rtol=1e-5, atol=1e-7)


def test_min_snr_is_one_for_noisy_steps_and_falls_for_clean_ones() -> None:
    weights = min_snr_weight(torch.tensor([0.01, 5.0, 500.0]), 5.0, "epsilon")
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 0.01]))


def test_velocity_and_noise_describe_the_same_latents() -> None:
    """x0 = alpha x_t - sigma v (Salimans & Ho 2022)."""
    x0, eps, t = random_step(0)
    objective = Diffusion(SCHEDULER.alphas_cumprod, "v_prediction")
    alpha_bar = SCHEDULER.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t, v = objective.noised(x0, eps, t), objective.target(x0, eps, t)
    torch.testing.assert_close(alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v, x0, rtol=1e-4, atol=1e-4)


def test_loss_per_picture_is_the_mean_squared_error_of_each() -> None:
    prediction, target, _ = random_step(1)
    expected = torch.stack([((p - q) ** 2).mean() for p, q in zip(prediction, target, strict=True)])
    torch.testing.assert_close(loss_per_picture(prediction, target), expected)
    assert loss_per_picture(prediction.bfloat16(), target).dtype == torch.float32


def test_unknown_prediction_type_is_named() -> None:
    with pytest.raises(ValueError, match=r"'sample'.*epsilon, v_prediction"):
        Diffusion(SCHEDULER.alphas_cumprod, "sample")  # type: ignore[arg-type]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_flow_is_that_of_diffusers_scheduler_and_training_scripts(shift: float, seed: int) -> None:
    """As in train_dreambooth_lora_sd3.py: (1 - sigma) x + sigma eps, told sigma T, learning eps - x."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    x0, eps, t = random_step(seed)
    flow, index = Flow(scheduler.sigmas.flip(0)), 999 - t
    assert torch.equal(flow.told(t), scheduler.timesteps[index])
    assert torch.equal(flow.noised(x0, eps, t), scheduler.scale_noise(x0, scheduler.timesteps[index], eps))
    sigma = scheduler.sigmas[index].view(-1, 1, 1, 1)
    step = flow.noised(x0, eps, t) - sigma * flow.target(x0, eps, t)
    torch.testing.assert_close(step, x0, rtol=1e-4, atol=1e-4)  # the way back is one straight line
    assert flow.weights(t, Loss()) is None and flow.zero_terminal() is flow


def test_a_flow_ends_at_pure_noise() -> None:
    flow = Flow(FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.flip(0))
    x0, eps, _ = random_step(0)
    assert torch.equal(flow.noised(x0, eps, torch.full((3,), 999)), eps)
    assert flow.told(torch.tensor([999])).item() == 1000
    assert (flow.sigmas.diff() > 0).all()
