"""The whole making of the base model at tiny size: interrupted after every step, it makes the same weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.toybox import noise, stages, text, train, vae

TINY = {
    "pictures": 64, "vae_pictures": 16, "vae_batch": 8, "decoder_pictures": 8, "judge_pictures": 32, "judge_batch": 16,
    "noise_pictures": 8, "batch": 4, "threads": 1,
}  # fmt: skip


class Interrupted(Exception):
    pass


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_interrupted_training_is_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(noise, "SHEET_PROMPTS", noise.SHEET_PROMPTS[:2])
    train.main(train.Config(output=tmp_path / "whole", **TINY))
    monkeypatch.setattr(stages, "SECONDS_BETWEEN_SAVES", -1.0)
    write = stages.write

    def write_and_stop(path: Path, state: object) -> None:
        write(path, state)
        raise Interrupted

    monkeypatch.setattr(stages, "write", write_and_stop)
    starts = 0
    while True:
        starts += 1
        try:
            train.main(train.Config(output=tmp_path / "parts", **TINY))
            break
        except Interrupted:
            continue
    assert starts == 8  # three stages of two steps, one of one, and the run that finds them finished
    for file in (tmp_path / "whole" / "export").rglob("*.safetensors"):
        ours = load_file(tmp_path / "parts" / "export" / file.relative_to(tmp_path / "whole" / "export"))
        for name, value in load_file(file).items():
            assert torch.equal(value, ours[name]), f"{file.name}: {name}"


def test_rate_rises_stays_and_falls():
    rates = [stages.rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[100:750] == [1.0] * 650 and rates[-1] < 0.02
    assert all(b <= a for a, b in pairwise(rates[750:]))


def test_more_steps_move_only_the_descent():
    assert [stages.rate(s, 1000) for s in range(700)] == [stages.rate(s, 2000) for s in range(700)]


def test_whitening_keeps_the_pictures():
    torch.manual_seed(0)
    autoencoder, batch = vae.new().eval(), torch.rand(8, 3, 64, 64) * 2 - 1
    before = vae.reconstruct(autoencoder, batch)
    vae.whiten(autoencoder, batch)
    with torch.no_grad():
        latents = autoencoder.encode(batch).latent_dist.mean
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    assert torch.allclose(vae.reconstruct(autoencoder, batch), before, atol=1e-3)


def test_tokenizer_writes_every_word_of_the_world_as_one_token():
    tokenizer = text.new_tokenizer()
    for word in text.words():
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    assert tokenizer.decode(tokenizer("a photo of sks toy").input_ids, skip_special_tokens=True) == "a photo of sks toy"


def test_velocity_weight_is_one_until_the_cap():
    from finetune.objective import Diffusion

    diffusion = Diffusion(noise.scheduler().alphas_cumprod, "v_prediction")
    t = torch.arange(1000)
    weight, snr = noise.velocity_weight(diffusion, t, 5.0), diffusion.snr(t)
    assert torch.allclose(weight, (5 / (snr + 1)).clamp(max=1))
