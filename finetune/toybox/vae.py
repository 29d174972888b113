"""The toybox's autoencoder: an AutoencoderKL of three levels, 64 x 64 pixels <-> 4 x 16 x 16 latents.

Kingma & Welling 2013 (1312.6114) for the variational part, Rombach et al. 2022 (2112.10752) for its use. Instead of a
perceptual and an adversarial loss, which would need networks of their own: absolute and squared error, the error of the
picture's differences between neighbours (edges) and of its low-resolution colours.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from finetune import keys
from finetune.toybox import parallel, pictures, stages
from finetune.toybox.plan import Config


def new(seed: int = 0) -> AutoencoderKL:
    """An untrained autoencoder, about 0.8 M parameters."""
    with keys.seeded(seed, "toybox/vae/weights"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 48, 64),
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=64,
        )


def as_tensor(batch: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.array(batch)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def reconstruction_loss(output: Tensor, picture: Tensor) -> Tensor:
    """L1 + 4 MSE + 0.7 edges + 2 low-resolution colours; both (B, 3, H, W)."""
    error = output - picture
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + 0.7 * edges + 2 * F.avg_pool2d(error, 8).abs().mean()


def psnr(output: Tensor, picture: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, for values in -1..1."""
    error = (output.clamp(-1, 1) - picture).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error)).mean())


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, batch: Tensor, size: int = 100) -> Tensor:
    """Pictures through the autoencoder (posterior's mean), float32."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in batch.split(size)])


class Mixture:
    """A step's training pictures: half the world, a quarter two-coloured toys, a quarter clutter; any colours."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.seed, self.batch = config.seed, config.vae_batch
        count = config.pictures
        self.world = pictures.drawn(folder / "world.npy", pictures.draw_world, config.seed, count)
        self.motley = pictures.drawn(folder / "motley.npy", pictures.draw_motley, config.seed, count // 5)
        self.clutter = pictures.drawn(folder / "clutter.npy", pictures.draw_clutter, config.seed, count // 4)

    def at(self, step: int) -> Tensor:
        random = keys.rng(self.seed, "toybox/vae/batch", step)
        quarter = self.batch // 4
        sources = ((self.world, self.batch - 2 * quarter), (self.motley, quarter), (self.clutter, quarter))
        batch = as_tensor(np.concatenate([s[np.sort(random.integers(len(s), size=n))] for s, n in sources]))
        # Swapped colour channels and mirror images: shapes of the world in colours that it has not.
        for i in range(self.batch - 2 * quarter, self.batch):
            batch[i] = batch[i, torch.from_numpy(random.permutation(3))]
        return batch.flip(3) if random.random() < 0.5 else batch


def train(config: Config, folder: Path) -> AutoencoderKL:
    """The stage: train, then whiten the latents."""
    vae = new(config.seed)
    mixture = Mixture(folder, config)
    held_out = as_tensor(np.stack([pictures.draw_world(config.seed + 1, i) for i in range(64)]))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = mixture.at(step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            noise = keys.normal(tuple(posterior.mean.shape), config.seed, "toybox/vae/sample", step)
            output = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error = reconstruction_loss(output, batch)
        figures = {"error": float(error.detach()), "kl": float(kl.detach()), "psnr": psnr(output.detach(), batch)}
        return error + config.vae_kl * kl, figures

    def show(model: AutoencoderKL, step: int) -> None:
        output = reconstruct(model, held_out)
        print(f"vae {step}: {psnr(output, held_out):.2f} dB on held-out world pictures", flush=True)
        pairs = torch.cat([held_out[:8], output[:8]])
        pictures.sheet(as_pictures(pairs), 8).save(folder / "vae.png")

    stage = stages.Stage(
        name="vae",
        folder=folder,
        model=vae,
        groups=[(vae, config.vae_lr)],
        steps=config.vae_pictures // config.vae_batch,
        loss=loss,
        average=0.998,
        show=show,
    )
    trained = stages.run(stage)
    whiten(trained, as_tensor(mixture.world[:1000]))
    return trained


def train_decoder(config: Config, folder: Path, vae: AutoencoderKL) -> AutoencoderKL:
    """The stage after: only the decoder goes on, so that latents, and all that learns from them, stay as they are."""
    mixture = Mixture(folder, config)
    held_out = as_tensor(np.stack([pictures.draw_world(config.seed + 1, i) for i in range(64)]))
    vae = copy.deepcopy(vae).requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = mixture.at(step + config.vae_pictures)[parallel.mine()]
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(batch).latent_dist.mode()
            output = vae.decode(latents).sample.float()
        return reconstruction_loss(output, batch), {"psnr": psnr(output.detach(), batch)}

    def show(model: AutoencoderKL, step: int) -> None:
        print(f"decoder {step}: {psnr(reconstruct(model, held_out), held_out):.2f} dB on held-out pictures", flush=True)

    stage = stages.Stage(
        name="decoder",
        folder=folder,
        model=vae,
        groups=[(vae.decoder, config.vae_lr / 2), (vae.post_quant_conv, config.vae_lr / 2)],
        steps=config.decoder_pictures // config.vae_batch,
        loss=loss,
        average=0.998,
        show=show,
    )
    return stages.run(stage)


def as_pictures(batch: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in -1..1 -> Pillow pictures."""
    array = batch.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in array]


@torch.no_grad()
def whiten(vae: AutoencoderKL, batch: Tensor) -> None:
    """Give each latent channel mean 0 and deviation 1, by folding it into the convolutions on both sides.

    Afterwards `scaling_factor` is honestly 1: a client that multiplies by it (all do) sees unit-variance latents.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in batch.split(100)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    out = vae.quant_conv  # (2C, 2C, 1, 1): means first, then log-variances
    out.weight[:channels] /= std.view(-1, 1, 1, 1)
    out.bias[:channels] = (out.bias[:channels] - mean) / std
    out.bias[channels:] -= 2 * std.log()
    into = vae.post_quant_conv  # (C, C, 1, 1)
    into.bias += into.weight[:, :, 0, 0] @ mean
    into.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)
