"""The one loop: its loss against the papers' formulas, what it changes and what it leaves."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import measured
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from PIL import Image
from torch.nn import functional as F

from finetune import adapters, families, keys, loop
from finetune.adapters import Group
from finetune.data import read_plain
from finetune.data.cache import Memory, Store
from finetune.data.encoding import Encodings
from finetune.errors import Failure
from finetune.families import Family, Source
from finetune.settings import Adapter, Loss, Optim, Train


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, colour in enumerate(["red", "orange", "brown"]):
        Image.new("RGB", (80, 64), colour).save(folder / f"{number}.png")
    return folder


def prepared(
    model: Path, pictures: Path, method: str = "lora", prior: float | None = None, **rates: float
) -> tuple[Family, list[Group], Encodings]:
    family = families.load(Source(str(model)))
    if method == "lora":
        groups = adapters.adapt(family, Adapter(rank=4, alpha=8), 1e-2, rates.get("text"), 0)
    else:
        groups = adapters.full(family, 1e-3, rates.get("text"))
    companions = [] if prior is None else read_plain(pictures, "a photo of a dog", prior)
    return family, groups, measured.encoded(family, read_plain(pictures, "a photo of sks dog"), companions)


def fit(family: Family, groups: list[Group], data: Encodings, **train: object) -> list[loop.Report]:
    AcceleratorState._reset_state()
    settings = Train(**{"steps": 3, "batch_size": 2, **train})  # type: ignore[arg-type]
    return list(loop.Training(family, groups, data, settings, Optim(max_grad_norm=0), Loss(), Accelerator(cpu=True)))


def state(family: Family) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.detach().clone()
        for name, module in families.modules(family).items()
        for key, value in module.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["sd", "sd-v", "sdxl"])
def test_the_dreambooth_loss_equals_the_reference(kind: str, tiny_models: dict[str, Path], pictures: Path) -> None:
    """diffusers' train_dreambooth.py: chunk the batch, mse(instance) + prior_loss_weight * mse(prior)."""
    family, _, data = prepared(tiny_models[kind], pictures, prior=0.3)
    scheduler = DDPMScheduler.from_pretrained(tiny_models[kind], subfolder="scheduler")
    (batch,) = measured.batches(data, 2, seed=7)
    with torch.no_grad():
        ours = (batch.shares * loop.PictureLoss(family, data, Loss())(batch)).sum()
        noised = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        known = [data.conditions(caption) for caption in batch.captions]
        conditions = {name: torch.cat([each[name] for each in known]) for name in known[0]}
        prediction = family.predict(noised, batch.timesteps, conditions, batch.sizes)
        v = kind == "sd-v"
        target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps) if v else batch.noise
        (instance, prior), (instance_target, prior_target) = prediction.chunk(2), target.chunk(2)
        reference = F.mse_loss(instance, instance_target) + 0.3 * F.mse_loss(prior, prior_target)
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_only_what_trains_changes(kind: str, method: str, tiny_models: dict[str, Path], pictures: Path) -> None:
    family, groups, data = prepared(tiny_models[kind], pictures, method, prior=1.0)
    before = state(family)
    trained = {id(p) for group in groups for p in group.parameters}
    names = {f"unet.{name}" for name, p in family.pipeline.unet.named_parameters() if id(p) in trained}
    assert names and (method == "full" or all(".lora_" in name for name in names))
    fit(family, groups, data)
    after = state(family)
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed <= names
    assert len(changed) > 0.9 * len(names)


def test_the_text_encoders_train_where_a_rate_is_given(tiny_models: dict[str, Path], pictures: Path) -> None:
    family, groups, data = prepared(tiny_models["sdxl"], pictures, text=1e-3)
    assert [group.part for group in groups] == ["unet", "text_encoder", "text_encoder_2"]
    assert data.texts is None
    before = state(family)
    fit(family, groups, data)
    changed = {name.split(".")[0] for name, value in state(family).items() if not torch.equal(before[name], value)}
    assert changed == {"unet", "text_encoder", "text_encoder_2"}


def test_the_vae_and_the_text_encoder_are_out_of_memory(tiny_models: dict[str, Path], pictures: Path) -> None:
    family = families.load(Source(str(tiny_models["sd"])))
    frozen = [weakref.ref(family.pipeline.vae), weakref.ref(family.pipeline.text_encoder)]
    groups = adapters.adapt(family, Adapter(rank=4), 1e-2, None, 0)
    data = measured.encoded(family, read_plain(pictures, "a dog"))
    gc.collect()
    assert [ref() for ref in frozen] == [None, None]
    assert len(fit(family, groups, data)) == 3


@pytest.mark.parametrize("accumulation", [2, 4])
def test_passes_add_up_to_the_whole_step(accumulation: int, tiny_models: dict[str, Path], pictures: Path) -> None:
    whole = fit(*prepared(tiny_models["sd"], pictures, prior=0.5), batch_size=4)
    split = fit(
        *prepared(tiny_models["sd"], pictures, prior=0.5), batch_size=4 // accumulation, accumulation=accumulation
    )
    for one, other in zip(whole, split, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-6)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


def test_two_runs_are_equal_to_the_bit_whatever_was_drawn_before(tiny_models: dict[str, Path], pictures: Path) -> None:
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        family, groups, data = prepared(tiny_models["sd"], pictures)
        fit(family, groups, data)
        ends.append(state(family))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_gradient_checkpointing_changes_no_number(tiny_models: dict[str, Path], pictures: Path) -> None:
    plain = fit(*prepared(tiny_models["sd"], pictures))
    recomputed = fit(*prepared(tiny_models["sd"], pictures), gradient_checkpointing=True)
    assert [r.loss for r in plain] == pytest.approx([r.loss for r in recomputed], abs=1e-6)


def test_min_snr_weighs_the_loss(tiny_models: dict[str, Path], pictures: Path) -> None:
    family, _, data = prepared(tiny_models["sd"], pictures)
    (batch,) = measured.batches(data, 3)
    with torch.no_grad():
        plain = loop.PictureLoss(family, data, Loss())(batch)
        weighed = loop.PictureLoss(family, data, Loss(min_snr_gamma=5.0))(batch)
    torch.testing.assert_close(weighed, plain * family.objective().min_snr(batch.timesteps, 5.0))


def test_a_loss_that_is_not_finite_stops_before_the_step(
    tiny_models: dict[str, Path], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, groups, data = prepared(tiny_models["sd"], pictures)
    before = state(family)
    broken = replace(data, pictures=Nan(data.pictures))
    with pytest.raises(Failure, match="step 1: the loss is nan") as fault:
        fit(family, groups, broken, batch_size=3)
    assert set(fault.value.details) == {f'{number}.png: "a photo of sks dog"' for number in range(3)}
    assert all(torch.equal(value, before[name]) for name, value in state(family).items())


class Nan(Memory):
    """A store whose latents are broken."""

    def __init__(self, whole: Store) -> None:
        self.whole = whole

    def get(self, key: str) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(value, float("nan")) for name, value in self.whole.get(key).items()}


def test_noise_belongs_to_step_and_slot() -> None:
    draws = {(step, slot): keys.normal((4,), 0, "noise", step, slot) for step in range(3) for slot in range(3)}
    assert len({tuple(value.tolist()) for value in draws.values()}) == 9


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_optimizers_lower_the_loss(name: str, tiny_models: dict[str, Path], pictures: Path) -> None:
    family, groups, data = prepared(tiny_models["sd"], pictures, "full")
    before = measured.loss(family, data)
    AcceleratorState._reset_state()
    settings = Optim(optimizer=name)  # type: ignore[arg-type]
    for _ in loop.Training(
        family, groups, data, Train(steps=12, batch_size=3), settings, Loss(), Accelerator(cpu=True)
    ):
        pass
    assert measured.loss(family, data) < 0.9 * before
