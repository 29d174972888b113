"""The fast path against the plain one: the same loss and gradients, with less kept and less done."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import live
import measured
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners import lora
from PIL import Image
from torch import Tensor, nn

from finetune import adapters, cli, families, fast, keys
from finetune.batches import Batch
from finetune.bench import model as sd15
from finetune.bench.observer import Counted
from finetune.data import read_plain
from finetune.families import Source
from finetune.fast import attention
from finetune.fast.lora import _LowRank
from finetune.loop import PictureLoss, Training
from finetune.settings import Adapter, Loss, Optim, Train

KINDS = ["sd", "sdxl", "sd3", "flux", "klein", "zimage"]
ADAPTERS = {
    "plain": Adapter(rank=4, alpha=2),
    "dropout": Adapter(rank=4, alpha=2, rslora=True, dropout=0.3),
    "two": Adapter(rank=4, alpha=2, init="olora", dropout=0.3),
    "convolutions": Adapter(rank=4, alpha=2, conv_rank=2, dropout=0.3),
    "dora": Adapter(rank=4, method="dora"),
}
CASES = [(kind, "dropout") for kind in KINDS]
CASES += [("sd", "two"), ("sd", "dora"), ("sdxl", "convolutions"), ("sdxl", "text encoders")]
SD15: dict[str, Any] = {"attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 4),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
}
"""Where they are not the classes' defaults"""
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def prepared(folder: Path, pictures: Path, adapter: Adapter, text: bool = False) -> tuple[PictureLoss, Batch]:
    family = families.load(Source(str(folder)))
    adapters.adapt(family, adapter, 1e-4, 1e-4 if text else None, seed=0)
    live.randomise(family)
    for parameter in (p for part in families.modules(family).values() for p in part.parameters() if p.requires_grad):
        parameter.data /= 2  # so that an error does not grow on its way through the layers
    data = measured.encoded(family, read_plain(pictures, "a photo of sks dog"))
    (batch,) = measured.batches(data, 2)
    return PictureLoss(family, data, Loss()).train(), batch


def step(model: PictureLoss, batch: Batch, autocast: bool = False) -> tuple[float, Gradients]:
    """The loss, and the gradients by name. Dropout draws the same each time."""
    model.zero_grad()
    with keys.seeded(0, "forward"):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = model(batch).mean()
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(one: Gradients, other: Gradients) -> float:
    """|one - other| / |other| over all of them"""
    assert one.keys() == other.keys() and other
    return float(sum((one[name] - other[name]).square().sum() for name in one) ** 0.5) / norm(other)


def norm(gradients: Gradients) -> float:
    return float(sum(gradient.square().sum() for gradient in gradients.values()) ** 0.5)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_loss_and_gradients_are_those_of_the_plain_path(
    kind: str, name: str, tiny_models: dict[str, Path], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout and without it, which a model in evaluation mode is."""
    monkeypatch.setattr(attention, "LONG", 1)
    adapter = ADAPTERS.get(name, ADAPTERS["dropout"])
    model, batch = prepared(tiny_models[kind], pictures, adapter, text=name == "text encoders")
    dropping, whole = step(model.train(), batch), step(model.eval(), batch)
    assert (dropping[0] != whole[0]) == (adapter.dropout > 0)
    fast.put_on(model.family)
    for (loss, gradients), training in ((dropping, True), (whole, False)):
        again, other = step(model.train(training), batch)
        assert again == pytest.approx(loss, rel=1e-6)
        assert error(other, gradients) < 1e-5
    ours = [layer for layer in model.modules() if isinstance(layer, fast.lora.Linear | fast.lora.Conv2d)]
    theirs = [layer for layer in model.modules() if isinstance(layer, lora.LoraLayer)]
    assert len(ours) == (0 if name == "dora" else len(theirs))


@pytest.mark.parametrize(
    ("kind", "name", "long"),
    [
        ("sd", "plain", 1),
        ("sd", "plain", 512),
        ("sd", "convolutions", 512),
        ("sdxl", "plain", 512),
        ("sd3", "plain", 512),
        ("flux", "plain", 512),
    ],
)
def test_in_bf16_the_error_is_no_more_than_the_plain_path_has(
    kind: str, name: str, long: int, tiny_models: dict[str, Path], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each against the same bf16 weights computed with in fp32."""
    monkeypatch.setattr(attention, "LONG", long)
    model, batch = prepared(tiny_models[kind], pictures, ADAPTERS[name])
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.data = parameter.data.bfloat16().float()
    loss, exact = step(model, batch)
    for parameter in frozen:
        parameter.data = parameter.data.bfloat16()
    theirs, plain = step(model, batch, autocast=True)
    fast.put_on(model.family)
    ours, quick = step(model, batch, autocast=True)
    assert {gradient.dtype for gradient in quick.values()} == {torch.float32}
    assert 0 < error(quick, exact) < 1.25 * error(plain, exact) < 0.1
    assert abs(ours - loss) < max(2 * abs(theirs - loss), 2e-3 * loss)


def test_what_peft_switches_stays_switched(tiny_models: dict[str, Path], pictures: Path) -> None:
    """Off, another strength (a negative one too), merged, two adapters at once, without gradients."""
    model, batch = prepared(tiny_models["sd"], pictures, ADAPTERS["plain"])
    unet: Any = model.family.pipeline.unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"]), "second")
    live.randomise(model.family)
    layers = [layer for layer in unet.modules() if isinstance(layer, lora.Linear)]

    def merged() -> None:
        for layer in layers:
            layer.merge(adapter_names=["default"])

    states: list[Callable[[], None]] = [
        lambda: unet.set_adapters(["default", "second"], [0.5, -1.5]),
        lambda: unet.set_adapters(["second"]),
        unet.disable_adapters,
        unet.enable_adapters,
        merged,
    ]

    def told() -> list[tuple[Tensor, Tensor]]:
        found = []
        for state in states:
            state()
            with torch.no_grad():
                found.append((model(batch), model.eval()(batch)))
            model.train()
        for layer in layers:
            layer.unmerge()
        return found

    before = told()
    fast.put_on(model.family)
    torch.testing.assert_close(told(), before, rtol=1e-6, atol=1e-6)
    assert len({round(float(one.sum()), 5) for one, _ in before}) > 3


def test_the_layers_keep_their_names_and_types(tiny_models: dict[str, Path], pictures: Path) -> None:
    model, _ = prepared(tiny_models["sd"], pictures, ADAPTERS["convolutions"])
    before = {name: (type(layer).__name__, type(layer)) for name, layer in model.named_modules()}
    weights = set(model.state_dict())
    fast.put_on(model.family)
    fast.put_on(model.family)
    now = dict(model.named_modules())
    assert set(model.state_dict()) == weights and now.keys() == before.keys()
    for name, (known, kind) in before.items():
        assert type(now[name]).__name__ == known and isinstance(now[name], kind)
    assert sum(type(layer) is not before[name][1] for name, layer in now.items()) > 50


def narrow(config: dict[str, Any], widths: tuple[int, ...], adapter: Adapter, dtype: torch.dtype) -> nn.Module:
    """A UNet, an eighth as wide as it is published, that predicts in training mode."""
    unet = UNet2DConditionModel(**config, block_out_channels=widths, cross_attention_dim=96, norm_num_groups=4)
    unet.requires_grad_(False).to(dtype).train()
    how = {"r": adapter.rank, "lora_alpha": adapter.rank, "lora_dropout": adapter.dropout}
    unet.add_adapter(LoraConfig(**how, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    cast_training_params(unet, torch.float32)
    return unet


def kept(unet: Any, autocast: bool) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass beside the weights, what is shared counted once; and how
    much is computed in both."""
    own = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    given = torch.ones(1, 4, 32, 32), torch.tensor([7]), torch.ones(1, 77, 96)
    noised, time, text = (one.to(unet.dtype) for one in given)
    with Counted() as counted, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            predicted = unet(noised, time, text).sample
        predicted.float().square().mean().backward()
    unet.zero_grad()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values()), counted.count


@pytest.mark.parametrize(
    ("config", "widths", "dtype", "dropout", "bytes_left", "launches_left"),
    [
        (SD15, (40, 80, 160, 160), torch.bfloat16, 0.0, 0.56, 0.63),
        (SD15, (40, 80, 160, 160), torch.bfloat16, 0.1, 0.55, 0.71),
        (SD15, (40, 80, 160, 160), torch.float32, 0.0, 0.63, 0.85),
        (SDXL, (40, 80, 160), torch.bfloat16, 0.0, 0.61, 0.57),
        (SDXL, (40, 80, 160), torch.float32, 0.0, 0.70, 0.82),
    ],
    ids=["sd15-bf16", "sd15-bf16-dropout", "sd15-fp32", "sdxl-bf16", "sdxl-fp32"],
)
def test_less_is_kept_and_less_is_done(
    config: dict[str, Any],
    widths: tuple[int, ...],
    dtype: torch.dtype,
    dropout: float,
    bytes_left: float,
    launches_left: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Widths and rank an eighth of what is usual, so that they are to one another as there. Launches are a GPU's, which
    attention is PyTorch's on."""
    monkeypatch.setattr(attention, "pays", lambda x, width: False)
    unet = narrow(config, widths, Adapter(rank=2, dropout=dropout), dtype)
    before = kept(unet, dtype == torch.bfloat16)
    fast.faster(unet)
    after = kept(unet, dtype == torch.bfloat16)
    assert after[0] < bytes_left * before[0]
    assert after[1] < launches_left * before[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of Stable Diffusion 1.5's topology: as many layers, an eighth as wide."""
    return sd15.save(tmp_path_factory.mktemp("whole") / "model", replace(sd15.MODELS["quarter"], divisor=8))


def ours(folder: Path, pictures: Path, dtype: torch.dtype) -> Callable[[], object]:
    """A step of a training, all that goes with it."""
    family = families.load(Source(str(folder)), dtype)
    groups = adapters.adapt(family, Adapter(rank=4), 1e-4, None, seed=0)
    data = measured.encoded(family, read_plain(pictures, "sks dog"))
    assert family.pipeline.vae is None and family.pipeline.text_encoder is None  # no step can call them
    AcceleratorState._reset_state()
    precision: Any = "bf16" if dtype == torch.bfloat16 else "fp32"
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if dtype == torch.bfloat16 else "no")
    settings = Train(steps=2, batch_size=2, precision=precision), Optim(optimizer="adamw")
    taken = iter(Training(family, groups, data, *settings, Loss(), accelerator))
    return lambda: next(taken)


SCRIPT = {torch.float32: 5570, torch.bfloat16: 5578}
"""What a step of diffusers' train_dreambooth_lora.py (0.42) computes of this topology with prior preservation, encoding
included, as `finetune bench` counts it"""


@pytest.mark.parametrize(("dtype", "left"), [(torch.float32, 0.41), (torch.bfloat16, 0.41)], ids=["fp32", "bf16"])
def test_a_step_computes_half_as_often_as_a_script(
    dtype: torch.dtype, left: float, whole: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How often follows from the number of layers, not from their width. Attention is PyTorch's, as on a GPU."""
    monkeypatch.setattr(attention, "pays", lambda x, width: False)
    step = ours(whole, pictures, dtype)
    step()
    with Counted() as counted:
        step()
    assert 1000 < counted.count < left * SCRIPT[dtype]


def train(model: Path, pictures: Path, output: Path, *flags: str) -> list[float]:
    """Through the command line; the losses."""
    given = ["--model", str(model), "--data", str(pictures), "--prompt", "sks dog", "--output", str(output)]
    how = ["--no-prior", "--resolution", "64", "--tracker", "none", "--steps", "3", "--lr", "1e-4", "--dropout", "0.2"]
    cli.main(["train", "lora", *given, *how, *flags])
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


def test_no_fast_trains_the_same(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[bool] = []
    compute = _LowRank.forward
    monkeypatch.setattr(_LowRank, "forward", lambda *given: (passed.append(True), compute(*given))[1])
    plain = train(tiny_models["sd"], pictures, tmp_path / "plain", "--text-encoder-lr", "1e-4", "--no-fast")
    assert not passed
    quick = train(tiny_models["sd"], pictures, tmp_path / "fast", "--text-encoder-lr", "1e-4")
    assert passed and len(quick) == 3
    assert quick == pytest.approx(plain, rel=1e-6)
