"""Each setting of the loss against its paper's formula or diffusers' own function, and that it reaches the loss."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import measured
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from finetune import adapters, cli, families, keys, objective
from finetune.batches import drawn
from finetune.data import read_plain
from finetune.data.encoding import Encodings
from finetune.errors import Fault
from finetune.families import Family, Source
from finetune.loop import PictureLoss
from finetune.settings import Adapter, Loss

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SETTINGS = [
    Loss(debiased=True),
    Loss(error="huber", huber_delta=0.3),
    Loss(error="smooth_l1"),
    Loss(noise_offset=0.1),
    Loss(input_perturbation=0.1),
    Loss(timesteps="logit_normal"),
    Loss(timestep_shift=3.0),
]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(["red", "orange", "brown"]):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
    return folder


def prepared(model: Path, pictures: Path) -> tuple[Family, Encodings]:
    family = families.load(Source(str(model)))
    adapters.adapt(family, Adapter(rank=4), 1e-2, None, 0)
    return family, measured.encoded(family, read_plain(pictures, "a photo of sks dog"))


@given(seed=st.integers(0, 10_000), delta=st.floats(0.01, 3))
@hypothesis(max_examples=25, deadline=None)
def test_huber_and_smooth_l1_are_their_formulas(seed: int, delta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 3, 4, 8, 8, generator=generator)
    e = (p - q).abs()
    huber = torch.where(e <= delta, e**2, delta * (2 * e - delta)).flatten(1).mean(1)
    torch.testing.assert_close(objective.loss_per_picture(p, q, kind="huber", delta=delta), huber)
    torch.testing.assert_close(objective.loss_per_picture(p, q, kind="smooth_l1", delta=delta), huber / delta)
    torch.testing.assert_close(
        objective.loss_per_picture(p, q, kind="huber", delta=99.0),
        F.mse_loss(p, q, reduction="none").flatten(1).mean(1),
    )


def test_debiased_weights_are_the_papers_and_mean_the_same_for_noise_and_velocity() -> None:
    """Of the same x0 the noise's squared error is SNR times x0's, the velocity's SNR + 1 times."""
    snr = torch.logspace(-3, 3, 20)
    noise, velocity = (objective.debiased_weight(snr, kind) for kind in ("epsilon", "v_prediction"))
    torch.testing.assert_close(noise, snr**-0.5)
    torch.testing.assert_close(noise * snr, velocity * (snr + 1))


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    ours = objective.Diffusion(SCHEDULER.alphas_cumprod, "v_prediction").zero_terminal().alphas_cumprod
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(SCHEDULER.betas.double()), 0).float()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert ours[-1] == 0


def test_zero_terminal_snr_reaches_the_loss_and_needs_velocity(tiny_models: dict[str, Path], pictures: Path) -> None:
    family, data = prepared(tiny_models["sd-v"], pictures)
    (batch,) = measured.batches(data, 3)
    batch = replace(batch, timesteps=torch.tensor([999, 600, 3]))
    with torch.no_grad():
        ours = PictureLoss(family, data, Loss(zero_terminal_snr=True))(batch)
        plain = PictureLoss(family, data, Loss())(batch)
        conditions = {"text": data.conditions("a photo of sks dog")["text"].repeat(3, 1, 1)}
        changed = family.objective().zero_terminal()
        x_t = changed.noised(batch.latents, batch.noise, batch.timesteps)
        predicted = family.predict(x_t, batch.timesteps, conditions, batch.sizes)
        v = changed.target(batch.latents, batch.noise, batch.timesteps)
    assert torch.equal(x_t[0], batch.noise[0])
    assert torch.equal(v[0], -batch.latents[0])
    torch.testing.assert_close(ours, objective.loss_per_picture(predicted, v))
    assert not torch.equal(ours, plain)
    family, data = prepared(tiny_models["sd"], pictures)
    with pytest.raises(Fault, match=r"predicts epsilon.*v_prediction"):
        PictureLoss(family, data, Loss(zero_terminal_snr=True))(batch)


def test_noise_offset_and_perturbation_are_their_formulas(tiny_models: dict[str, Path], pictures: Path) -> None:
    _, data = prepared(tiny_models["sd"], pictures)
    (batch,) = measured.batches(data, 3, seed=7)
    got = drawn(batch, Loss(noise_offset=0.1, input_perturbation=0.2), 1000)
    for slot, place in enumerate(batch.places):
        n = keys.normal((4, 1, 1), 7, "noise offset", *place)
        xi = keys.normal((4, 8, 8), 7, "input perturbation", *place)
        torch.testing.assert_close(got.noise[slot], batch.noise[slot] + 0.1 * n)
        torch.testing.assert_close(got.input_noise[slot], batch.noise[slot] + 0.1 * n + 0.2 * xi)
    assert drawn(batch, Loss(), 1000) is batch
    lesson = replace(batch, places=[("lesson", number) for number in range(3)])
    same = drawn(lesson, Loss(noise_offset=0.1, input_perturbation=0.2, timestep_shift=3.0), 1000)
    assert torch.equal(same.input_noise, batch.noise) and torch.equal(same.timesteps, batch.timesteps)


@pytest.mark.parametrize(
    ("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.5, 0.7, 1.0), (0.0, 1.0, 3.0), (None, None, 3.0)]
)
def test_timesteps_follow_their_distribution(
    mean: float | None, std: float | None, shift: float, tiny_models: dict[str, Path], pictures: Path
) -> None:
    """Shares of draws below a timestep against the distribution's own: P(t < c) for the unshifted c."""
    _, data = prepared(tiny_models["sd"], pictures)
    (batch,) = measured.batches(data, 1)
    count = 4000
    many = replace(batch, places=[(0, slot) for slot in range(count)], timesteps=torch.zeros(count, dtype=torch.int64))
    loss = Loss(timestep_shift=shift)
    if mean is not None and std is not None:
        loss = replace(loss, timesteps="logit_normal", logit_mean=mean, logit_std=std)
    t = drawn(many, loss, 1000).timesteps
    assert t.min() >= 0 and t.max() < 1000
    for cut in (0.2, 0.5, 0.8):
        before = cut / (shift - (shift - 1) * cut)
        known = torch.tensor(before)
        expected = known if mean is None or std is None else torch.distributions.Normal(mean, std).cdf(known.logit())
        assert float((t < 1000 * cut).float().mean()) == pytest.approx(float(expected), abs=0.03)
    assert max(Counter(t.tolist()).values()) < 40


@pytest.mark.parametrize("loss", SETTINGS, ids=str)
def test_every_setting_changes_the_loss(loss: Loss, tiny_models: dict[str, Path], pictures: Path) -> None:
    family, data = prepared(tiny_models["sd"], pictures)
    assert measured.loss(family, data, loss, 6) != measured.loss(family, data, Loss(), 6)


def test_debiased_weighs_the_loss(tiny_models: dict[str, Path], pictures: Path) -> None:
    family, data = prepared(tiny_models["sd"], pictures)
    (batch,) = measured.batches(data, 3)
    with torch.no_grad():
        plain, weighed = (PictureLoss(family, data, Loss(debiased=on))(batch) for on in (False, True))
    torch.testing.assert_close(weighed, plain * family.objective().snr(batch.timesteps) ** -0.5)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (Loss(min_snr_gamma=5, debiased=True), "--min-snr-gamma and --debiased.*Choose one"),
        (Loss(huber_delta=0), "--huber-delta 0: more than 0"),
        (Loss(noise_offset=-1), "--noise-offset -1: 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(loss: Loss, said: str) -> None:
    with pytest.raises(Fault, match=said):
        objective.check(loss)


def test_the_flags_reach_the_loss(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    given = ["--data", pictures, "--prompt", "a photo of sks dog", "--no-prior", "--tracker", "none", "--steps", "1"]
    flags = [
        [],
        ["--debiased"],
        ["--error", "huber", "--huber-delta", "0.3"],
        ["--error", "smooth_l1"],
        ["--noise-offset", "0.1"],
        ["--input-perturbation", "0.1"],
        ["--timesteps", "logit_normal"],
        ["--timesteps", "logit_normal", "--logit-mean", "1", "--logit-std", "0.5"],
        ["--timestep-shift", "3"],
        ["--zero-terminal-snr"],
    ]
    losses = []
    for number, words in enumerate(flags):
        run = tmp_path / str(number)
        words = ["--model", str(tiny_models["sd-v"]), "--output", str(run), *words]
        cli.main(["train", "lora", *map(str, given), *words])
        losses.append(json.loads((run / "log.jsonl").read_text().splitlines()[0])["loss"])
    assert len(set(losses)) == len(flags)
