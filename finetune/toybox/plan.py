"""What the toybox is made with: the settings of its training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Config:
    """How the embedded base model is made. The defaults made the shipped one."""

    output: Path = Path("toybox-run")
    """Working folder: drawn pictures, checkpoints, sample sheets, log. A later run goes on from what is there."""
    weights: Path | None = None
    """Where the finished pipeline and judge are written. Default: `export` in the working folder."""
    seed: int = 0
    """Seed of the world, the weights and every batch."""
    pictures: int = 40_000
    """World pictures drawn once, before training."""
    vae_pictures: int = 41_600
    """Training pictures that the autoencoder sees."""
    vae_batch: int = 32
    """Pictures a step for the autoencoder."""
    vae_lr: float = 2e-3
    """Peak learning rate of the autoencoder."""
    vae_kl: float = 3e-4
    """Weight of the latents' divergence from the unit Gaussian."""
    decoder_pictures: int = 64_000
    """Training pictures that the decoder sees alone afterwards. More of them spoil nothing."""
    judge_pictures: int = 48_000
    """Captioned pictures that the judge and the text encoder see (and as many views of things)."""
    judge_batch: int = 128
    """Captioned pictures a step for the judge."""
    judge_lr: float = 2e-3
    """Peak learning rate of the judge and of the text encoder's first training."""
    noise_pictures: int = 300_000
    """Training pictures that the noise predictor sees. A larger number makes a finished training go on."""
    batch: int = 48
    """Pictures a step for the noise predictor."""
    lr: float = 1.4e-3
    """Peak learning rate of the noise predictor; its text encoder has a third of it."""
    caption_dropout: float = 0.1
    """Share of captions left out, so that guidance has something to push away from."""
    snr_gamma: float = 5.0
    """Cap on a timestep's weight in terms of clean latents."""
    threads: int = 2
    """CPU threads."""
