"""Masked loss against its formula, and what the frozen base holds outside the mask."""

from __future__ import annotations

from pathlib import Path

import measured
import pytest
import torch
from PIL import Image

from finetune import adapters, data, families
from finetune.data.encoding import Encodings
from finetune.data.framing import masks
from finetune.families import Family, Source
from finetune.loop import PictureLoss
from finetune.settings import Adapter, Loss

Prepared = tuple[Family, Encodings]


@pytest.fixture
def prepared(tiny_models: dict[str, Path], tmp_path: Path) -> Prepared:
    """Two pictures, the first with a mask of its left half, the second whole; an adapter that has learned something."""
    for name in ("pictures", "masks"):
        (tmp_path / name).mkdir()
    for number, colour in enumerate(["red", "teal"]):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "pictures" / f"{number}.png")
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    half.save(tmp_path / "masks" / "0.png")
    examples, faults = masks.attach(data.read_plain(tmp_path / "pictures", "a dog"), tmp_path / "masks", alpha=False)
    assert len(faults) == 1 and "1.png" in faults[0]  # a folder of masks has one for each picture
    family = families.load(Source(str(tiny_models["sd"])))
    adapters.adapt(family, Adapter(rank=4), 1e-2, None, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in family.pipeline.unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return family, measured.encoded(family, examples)


@pytest.mark.parametrize(("weight", "prior"), [(0.0, 0.0), (0.25, 0.0), (1.0, 0.0), (0.0, 0.5), (0.25, 2.0)])
def test_the_loss_is_the_formula_on_paper(prepared: Prepared, weight: float, prior: float) -> None:
    """mean over all of the picture of m (p - t)^2, m = 1 inside, `unmasked_weight` outside;
    and `unmasked_prior` times the mean of (1 - mask) (p - base)^2."""
    family, encodings = prepared
    (batch,) = measured.batches(encodings, 2)
    with torch.no_grad():
        ours = PictureLoss(family, encodings, Loss(unmasked_weight=weight, unmasked_prior=prior))(batch)
        noised = family.objective().noised(batch.latents, batch.noise, batch.timesteps)
        conditions = {name: value.repeat(2, 1, 1) for name, value in encodings.conditions("a dog").items()}
        predicted = family.predict(noised, batch.timesteps, conditions, batch.sizes)
        family.pipeline.unet.disable_adapters()
        base = family.predict(noised, batch.timesteps, conditions, batch.sizes)
        family.pipeline.unet.enable_adapters()
    for number, masked in enumerate(batch.masked.tolist()):
        mask = torch.zeros(1, 8, 8)
        mask[..., :4] = 1
        mask = mask if masked else torch.ones(1, 8, 8)
        m = mask + weight * (1 - mask)
        expected = (m * (predicted[number] - batch.noise[number]) ** 2).sum() / (4 * 8 * 8)
        if masked:
            expected += prior * ((1 - mask) * (predicted[number] - base[number]) ** 2).sum() / (4 * 8 * 8)
        torch.testing.assert_close(ours[number], expected, rtol=1e-5, atol=1e-8)
    assert not torch.equal(predicted, base)


def test_outside_the_mask_no_gradient_flows(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    family, encodings = prepared
    (batch,) = measured.batches(encodings, 2)
    predicted = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    monkeypatch.setattr(family, "predict", lambda *given: predicted)
    PictureLoss(family, encodings, Loss())(batch).sum().backward()
    assert predicted.grad is not None
    masked = batch.masked.tolist().index(True)
    assert (predicted.grad[masked, :, :, 4:] == 0).all()
    assert (predicted.grad[masked, :, :, :4] != 0).all()
    assert (predicted.grad[1 - masked] != 0).all()


def test_masks_through_the_command_line_reach_the_loss(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from finetune import cli

    for name in ("pictures", "masks"):
        (tmp_path / name).mkdir()
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "pictures" / "a.png")
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    half.save(tmp_path / "masks" / "a.png")
    losses = []
    for number, flags in enumerate([["--unmasked-weight", "0"], ["--unmasked-weight", "1"]]):
        run = tmp_path / f"run{number}"
        cli.main([
            "train", "lora", "--model", str(tiny_models["sd"]), "--data", str(tmp_path / "pictures"), "--prompt", "sks",
            "--masks", str(tmp_path / "masks"), "--no-prior", "--steps", "1", "--output", str(run), "--tracker", "none",
            *flags,
        ])  # fmt: skip
        losses.append((run / "log.jsonl").read_text())
    assert losses[0].partition('"loss": ')[2][:6] < losses[1].partition('"loss": ')[2][:6]
