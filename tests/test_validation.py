"""The loss on held-out pictures depends on the weights, and on nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import measured
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.nn import functional as F

from finetune import adapters, families
from finetune.batches import Batches
from finetune.data import read_plain
from finetune.data.encoding import Encodings
from finetune.data.order import Order
from finetune.families import Family, Source
from finetune.loop import PictureLoss
from finetune.settings import Adapter, Loss
from finetune.validation import TIMESTEPS, Validation


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five, the last two to be held out."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def prepared(model: Path, pictures: Path, trained: int = 3, dropout: float = 0.0) -> tuple[Family, Encodings]:
    family = families.load(Source(str(model)))
    adapters.adapt(family, Adapter(rank=4, dropout=dropout), 1e-2, None, 0)
    every = read_plain(pictures, "a photo of sks dog")
    return family, measured.encoded(family, every[:trained], held=every[3:])


def measure(data: Encodings, model: PictureLoss, size: int = 1, seed: int = 0) -> float:
    batches = Batches(data, Order(data.subjects, data.companions, 1, seed), 1000, torch.device("cpu"))
    return Validation(batches, size, Accelerator(cpu=True)).measure(model)


def test_the_same_weights_give_the_same_to_the_bit(tiny_models: dict[str, Path], pictures: Path) -> None:
    """With dropout in the adapter, which must not act, and while training, which goes on."""
    family, data = prepared(tiny_models["sd"], pictures, dropout=0.5)
    model = PictureLoss(family, data, Loss()).train()
    first = measure(data, model)
    assert first == measure(data, model)
    assert model.training and first > 0
    family.pipeline.unet.conv_in.weight.data.mul_(1.1)
    assert measure(data, model) != first


@pytest.mark.parametrize("size", [2, 3, 16])
def test_the_size_of_the_batch_makes_no_difference(size: int, tiny_models: dict[str, Path], pictures: Path) -> None:
    family, data = prepared(tiny_models["sd"], pictures)
    model = PictureLoss(family, data, Loss())
    assert measure(data, model, size) == pytest.approx(measure(data, model), rel=1e-6)


def test_neither_the_loss_settings_nor_the_trained_pictures_matter(
    tiny_models: dict[str, Path], pictures: Path
) -> None:
    family, data = prepared(tiny_models["sd"], pictures)
    plain = measure(data, PictureLoss(family, data, Loss()))
    odd = Loss(min_snr_gamma=5, noise_offset=0.1, input_perturbation=0.1, error="huber", timesteps="logit_normal")
    assert measure(data, PictureLoss(family, data, odd)) == plain
    fewer = replace(data, subjects=data.subjects[:1], caption_dropout=0.9)
    assert measure(fewer, PictureLoss(family, fewer, Loss())) == plain


def test_it_is_the_mean_over_pictures_and_timesteps(tiny_models: dict[str, Path], pictures: Path) -> None:
    """Written out: eight timesteps, each in the middle of its eighth, the error's mean square."""
    family, data = prepared(tiny_models["sd"], pictures)
    batches = Batches(data, Order(data.subjects, (), 1, 0), 1000, torch.device("cpu"))
    losses = []
    for item in data.held:
        for time in (62, 187, 312, 437, 562, 687, 812, 937):
            batch = batches.held([(item, time)])
            assert batch.timesteps.tolist() == [time] and batch.captions == ["a photo of sks dog"]
            noised = family.objective().noised(batch.latents, batch.noise, batch.timesteps)
            with torch.no_grad():
                predicted = family.predict(noised, batch.timesteps, data.conditions(batch.captions[0]), batch.sizes)
            losses.append(float(F.mse_loss(predicted, batch.noise)))
    assert len(losses) == 2 * TIMESTEPS
    assert measure(data, PictureLoss(family, data, Loss())) == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_the_work_and_predict_equally_often(
    world: int, tiny_models: dict[str, Path], pictures: Path
) -> None:
    """Each process's part is a sum; together they are what one measures."""
    family, data = prepared(tiny_models["sd"], pictures)
    batches = Batches(data, Order(data.subjects, (), 1, 0), 1000, torch.device("cpu"))
    model, parts, counts = PictureLoss(family, data, Loss()), [], []

    class Part:
        num_processes, device = world, torch.device("cpu")

        def __init__(self, rank: int) -> None:
            self.process_index = rank

        def reduce(self, total: torch.Tensor, how: str) -> torch.Tensor:
            return total

    for rank in range(world):
        made: list[int] = []
        with model_watched(model, made):
            parts.append(Validation(batches, 3, Part(rank)).measure(model))  # type: ignore[arg-type]
        counts.append(len(made))
    assert len(set(counts)) == 1
    assert sum(parts) == pytest.approx(measure(data, model), rel=1e-6)


class model_watched:
    """Counts the model's predictions."""

    def __init__(self, model: PictureLoss, made: list[int]) -> None:
        self.handle = model.register_forward_pre_hook(lambda *given: made.append(1))

    def __enter__(self) -> None: ...

    def __exit__(self, *raised: object) -> None:
        self.handle.remove()
