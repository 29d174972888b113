"""Trains the judge and, by the same contrast with pictures, the base model's text encoder for the first time.

A batch has captioned pictures (the world, motley toys, neon pictures) and pairs of views of one thing. Some of both go
through the autoencoder, with noise on the latents, or are blurred: the judge must read generated pictures, which are
never as clean as drawn ones.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from finetune import keys
from finetune.toybox import pictures, stages, text, world
from finetune.toybox.judge import DIMENSIONS, Network, bags
from finetune.toybox.plan import Config
from finetune.toybox.things import EYES, LIMBS, PATTERNS, TOPS
from finetune.toybox.vae import as_tensor

VIEWS = 4
FAMILY = 4


class Contrast(nn.Module):
    """What trains together: the judge, the text encoder, and the latter's way into the judge's space."""

    def __init__(self, vocabulary_size: int, seed: int) -> None:
        super().__init__()
        with keys.seeded(seed, "toybox/judge/weights"):
            self.judge = Network()
            self.projection = nn.Linear(text.WIDTH, DIMENSIONS)
        self.encoder = text.new_encoder(vocabulary_size, seed)

    def sentences(self, ids: Tensor) -> Tensor:
        """(B, 77) -> (B, 64) of length 1, from the hidden state at the end token."""
        return F.normalize(self.projection(self.encoder(ids).pooler_output).float(), dim=1)


def identity_spec(seed: int, index: int) -> world.Spec:
    """View `index % VIEWS` of thing `index // VIEWS`. Things come in families that differ in one trait each."""
    thing, view = divmod(index, VIEWS)
    family, member = divmod(thing, FAMILY)
    random = np.random.default_rng([seed, family, 3])
    # Most are motley toys, as users' subjects are; some are things that the base model knows.
    spec = world.motley_spec(random) if family % 4 else world.random_spec(random)
    for _ in range(member):
        spec = _mutated(spec, random)
    random = np.random.default_rng([seed, thing, view, 4])
    scene, style = str(random.choice(world.ALL_SCENES)), str(random.choice(world.STYLES))
    return world.placed(replace(spec, shade=float(random.uniform(-1, 1)), scene=scene, style=style), random)


def _mutated(spec: world.Spec, random: np.random.Generator) -> world.Spec:
    """The same thing but for one trait."""
    while True:
        trait = str(random.choice(["colour", "second", "eyes", "top", "limbs", "pattern"]))
        if trait == "colour" or spec.build is None:
            changed = replace(spec, colour=str(random.choice(tuple(world.COLOURS))))
        elif trait == "second":
            changed = replace(spec, second=str(random.choice(tuple(world.COLOURS))))
        else:
            kinds = {"eyes": EYES, "top": TOPS, "limbs": LIMBS, "pattern": PATTERNS[1:]}[trait]
            changed = replace(spec, build=replace(spec.build, **{trait: str(random.choice(kinds))}))
        held_out = changed.build is not None and world.is_held_out(changed.build)
        if changed != spec and changed.colour != changed.second and not held_out:
            return changed


def draw_identity(seed: int, index: int) -> np.ndarray:
    return np.asarray(world.render(identity_spec(seed, index)))


def neon_spec(seed: int, index: int) -> world.Spec:
    return replace(world.random_spec(np.random.default_rng([seed, index, 5])), style="neon")


def draw_neon(seed: int, index: int) -> np.ndarray:
    return np.asarray(world.render(neon_spec(seed, index)))


def motley_spec(seed: int, index: int) -> world.Spec:
    """As `pictures.draw_motley` draws it; its caption names no colour, since it has two."""
    return replace(world.motley_spec(np.random.default_rng([seed, index, 1])), says_colour=False)


def agreement(specs: list[world.Spec]) -> Tensor:
    """(B, B): 1 where picture i shows all that caption j says."""

    def shows(picture: world.Spec, said: world.Spec) -> bool:
        return (
            picture.noun == said.noun
            and picture.style == said.style
            and (not said.says_scene or picture.scene == said.scene)
            and (not said.says_colour or (picture.second is None and picture.colour == said.colour))
        )

    return torch.tensor([[float(shows(picture, said)) for said in specs] for picture in specs])


def contrast(rows: Tensor, columns: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of the similarities against all that agrees; rows, columns (B, D); same (B, B)."""
    logits = rows @ columns.T * scale
    across = -(logits.log_softmax(1) * same / same.sum(1, keepdim=True)).sum(1).mean()
    down = -(logits.log_softmax(0) * same / same.sum(0, keepdim=True)).sum(0).mean()
    return (across + down) / 2


def worn(batch: Tensor, vae: AutoencoderKL, random: np.random.Generator) -> Tensor:
    """An eighth through the autoencoder with noise on the latents, an eighth blurred, an eighth noisy."""
    batch = batch.clone()
    count = len(batch) // 8
    chosen = torch.from_numpy(random.permutation(len(batch)))
    decoded, blurred, noisy = chosen[:count], chosen[count : 2 * count], chosen[2 * count : 3 * count]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(batch[decoded]).latent_dist.mode()
        strength = torch.from_numpy(random.uniform(0, 0.5, (count, 1, 1, 1)).astype(np.float32))
        noise = torch.from_numpy(random.standard_normal(latents.shape).astype(np.float32))
        batch[decoded] = vae.decode(latents + strength * noise).sample.float().clamp(-1, 1)
    small = F.avg_pool2d(batch[blurred], 2)
    batch[blurred] = F.interpolate(small, scale_factor=2, mode="bilinear")
    batch[noisy] += 0.15 * torch.from_numpy(random.standard_normal(batch[noisy].shape).astype(np.float32))
    return batch


class Batches:
    """A step's pictures, specs and token ids."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.config = config
        seed, count = config.seed, config.pictures
        self.world = pictures.drawn(folder / "world.npy", pictures.draw_world, seed, count)
        self.motley = pictures.drawn(folder / "motley.npy", pictures.draw_motley, seed, count // 5)
        self.neon = pictures.drawn(folder / "neon.npy", draw_neon, seed, count // 16)
        self.things = pictures.drawn(folder / "things.npy", draw_identity, seed, count // 2)

    def captioned(self, step: int) -> tuple[np.ndarray, list[world.Spec]]:
        """(B, 64, 64, 3) pictures and what they show; captions leave words out half the time."""
        seed, size = self.config.seed, self.config.judge_batch
        random = keys.rng(seed, "toybox/judge/batch", step)
        kinds = ((self.world, world.spec_at, size - 2 * (size // 8)), (self.motley, motley_spec, size // 8),
                 (self.neon, neon_spec, size // 8))  # fmt: skip
        chosen, specs = [], []
        for source, spec, share in kinds:
            indices = np.sort(random.integers(len(source), size=share))
            chosen.append(source[indices])
            specs += [spec(seed, int(index)) for index in indices]
        specs = [replace(s, says_colour=s.says_colour and random.random() < 0.7, says_scene=random.random() < 0.7)
                 for s in specs]  # fmt: skip
        return np.concatenate(chosen), specs

    def views(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Two views of each thing of some families: (2N, 64, 64, 3)."""
        random = keys.rng(self.config.seed, "toybox/judge/things", step)
        families = len(self.things) // (FAMILY * VIEWS)
        chosen = random.choice(families, min(families, self.config.judge_batch // (2 * FAMILY)), replace=False)
        things = (chosen[:, None] * FAMILY + np.arange(FAMILY)).ravel()
        first = random.integers(VIEWS, size=len(things))
        second = (first + random.integers(1, VIEWS, size=len(things))) % VIEWS
        return self.things[things * VIEWS + first], self.things[things * VIEWS + second]


def train(config: Config, folder: Path, vae: AutoencoderKL) -> Contrast:
    """The stage; returns the averaged judge and text encoder."""
    tokenizer = text.new_tokenizer()
    model = Contrast(len(tokenizer), config.seed)
    batches = Batches(folder, config)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        random = keys.rng(config.seed, "toybox/judge/wear", step)
        shown, specs = batches.captioned(step)
        first, second = batches.views(step)
        everything = worn(as_tensor(np.concatenate([shown, first, second])), vae, random)
        captions = [world.caption(spec) for spec in specs]
        with torch.autocast("cpu", torch.bfloat16):
            prompts, identities = model.judge.pictures(everything)
            sentences = model.sentences(text.token_ids(tokenizer, captions))
            meant = model.judge.texts(bags(captions))
        prompts, (one, other) = prompts[: len(shown)], identities[len(shown) :].chunk(2)
        scale = model.judge.log_scale.clamp(max=3.7).exp()
        same = agreement(specs)
        judged = contrast(prompts, meant, same, scale[0])
        spoken = contrast(prompts, sentences, same, scale[0])
        alike = contrast(one, other, torch.eye(len(one)), scale[1])
        hits = (one @ other.T).argmax(1).eq(torch.arange(len(one))).float().mean()
        figures = {"judge": judged, "text": spoken, "identity": alike, "recall": hits}
        return judged + spoken + alike, {name: float(value.detach()) for name, value in figures.items()}

    stage = stages.Stage(
        name="judge",
        folder=folder,
        model=model,
        groups=[(model, config.judge_lr)],
        steps=config.judge_pictures // config.judge_batch,
        loss=loss,
        average=0.995,
        weight_decay=1e-3,
    )
    return stages.run(stage)
