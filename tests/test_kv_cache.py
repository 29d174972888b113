"""Keys and values of captions in place of the weights that make them: the same training, and what is refused.

Without a GPU the weights are sent in as copies beside those that stay."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import live
import measured
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from finetune import adapters, checkpointing, checkpoints, cli, families, fast, keys, kv_cache, offload
from finetune.data import read_plain
from finetune.families import Family, Source
from finetune.loop import PictureLoss
from finetune.settings import Adapter, Captions, Loss


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a caption of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(["red", "orange", "blue"]):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
    (folder / "1.txt").write_text("sks dog in a garden")
    return folder


CASES: list[tuple[str, Adapter, dict[str, Any]]] = [
    ("sd", Adapter(rank=4, dropout=0.3), {"checkpointed": True}),
    ("sdxl", Adapter(rank=4), {}),
    ("sdxl", Adapter(rank=4), {"dtype": torch.bfloat16}),
    ("sdxl", Adapter(rank=4, dropout=0.3), {"quick": False}),
    ("sd", Adapter(rank=2, method="lokr"), {}),
    ("sd", Adapter(method="ia3"), {"checkpointed": True}),
]


def learned(
    source: Source,
    pictures: Path,
    adapter: Adapter,
    dtype: torch.dtype = torch.float32,
    quick: bool = True,
    checkpointed: bool = False,
) -> list[Tensor]:
    """Loss and gradients of a step, and of one whose target the base is asked for: of captions one of which is there
    twice, and the empty one."""
    family = families.load(source, dtype)
    adapters.adapt(family, adapter, 1e-4, None, seed=0)
    live.randomise(family)
    data = measured.encoded(family, read_plain(pictures, "sks dog"), captions=Captions(caption_dropout=0.3))
    model = PictureLoss(family, data, Loss()).train()
    if quick:
        fast.put_on(family)
    if checkpointed:
        checkpointing.put_on(family)
    (batch,) = measured.batches(data, 4)
    assert 1 < len(set(batch.captions)) < 4
    told = []
    for taught in (False, True):
        batch.taught.fill_(taught)
        with model.keys_values, keys.seeded(0, "forward"):
            loss = model(batch).mean()
            for weight in kept(family):  # it is not needed any more
                weight.data.fill_(torch.nan)
            loss.backward()
        told += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    assert all(layer.answer is None for layer in offload.resting(families.denoiser(family)))
    return told


def kept(family: Family) -> list[Tensor]:
    """The weights that are kept in the CPU's memory."""
    return [weight for layer in offload.resting(families.denoiser(family)) for weight in layer.parameters()]


@pytest.mark.parametrize(("kind", "adapter", "how"), CASES)
def test_loss_and_gradients_are_the_same(
    kind: str, adapter: Adapter, how: dict[str, Any], tiny_models: dict[str, Path], pictures: Path
) -> None:
    plain, own = (
        learned(Source(str(tiny_models[kind]), cache_kv=cached), pictures, adapter, **how) for cached in (False, True)
    )
    assert len(plain) == len(own) > 10
    error = 5e-6 if how.get("dtype") is None else 2e-2
    assert all((one - other).norm() <= error * other.norm() for one, other in zip(own, plain, strict=True))


def test_weights_are_kept_where_the_prompt_alone_is_attended_to(tiny_models: dict[str, Path]) -> None:
    """And stay when the pipeline is moved."""
    family = families.load(Source(str(tiny_models["sdxl"]), cache_kv=True))
    denoiser = families.denoiser(family)
    names = {name for name, layer in denoiser.named_modules() if isinstance(layer, offload.Resting)}
    ends = "attn2.to_k", "attn2.to_v"
    assert names == {name for name, _ in denoiser.named_modules() if name.endswith(ends)} != set()
    family.pipeline.to("meta")
    assert {weight.device.type for weight in kept(family)} == {"cpu"}
    assert {p.device.type for name, p in denoiser.named_parameters() if "attn1" in name} == {"meta"}


class OneDevice(TorchDispatchMode):
    """Inside, operators but copies are given tensors of one device, single numbers aside."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.device.type for x in tree_iter((args, kwargs)) if isinstance(x, Tensor) and x.dim()}
        assert len(given) < 2 or "copy" in func.__name__, func
        return func(*args, **(kwargs or {}))


def test_all_is_computed_on_the_device(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One without data stands for a GPU. Of captions that are known, and of prompts that are not."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it has none
    family = families.load(Source(str(tiny_models["sd"]), cache_kv=True), device="meta")
    adapters.adapt(family, Adapter(rank=4), 1e-4, None, seed=0)
    denoiser, known = families.denoiser(family).to("meta").train(), kv_cache.Known(family)
    fast.put_on(family)
    told = {name: torch.zeros(2, *shape, device="meta") for name, shape in family.condition_shapes().items()}
    noised, times, sizes = (torch.zeros(2, *shape, device="meta") for shape in ((4, 8, 8), (), (6,)))
    for context in (known, nullcontext()):
        with context, OneDevice():
            known.tell(["a", "b"], told)
            family.predict(noised, times, told, sizes).square().mean().backward()
        trained = [p for p in denoiser.parameters() if p.requires_grad]
        assert (
            {p.device.type for p in trained} == {p.grad.device.type for p in trained if p.grad is not None} == {"meta"}
        )
    assert {tensor.device.type for tensor in kept(family)} == {"cpu"} and len(known.made) == 2
    with OneDevice(), pytest.raises(AssertionError):
        torch.nn.functional.linear(told["text"], kept(family)[0])


def test_captions_beyond_the_room_are_made_again(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    family = families.load(Source(str(tiny_models["sd"]), cache_kv=True))
    known, texts = kv_cache.Known(family), {name: torch.randn(1, 77, 16) for name in "abc"}
    tell = lambda *names: known.tell(names, {"text": torch.cat([texts[name] for name in names])})  # noqa: E731
    tell("a")
    assert not known.made  # outside
    layer = offload.resting(families.denoiser(family))[-1]
    with known:
        tell("a")
        monkeypatch.setattr(kv_cache, "MOST", 2 * known.made["a"].nbytes)
        tell("b", "a", "b", "c")
        assert list(known.made) == ["b", "c"]
        expected = torch.nn.functional.linear(torch.cat([texts[name] for name in "babc"]), layer.weight)
        torch.testing.assert_close(layer(torch.empty(0)), expected)
    assert layer(torch.ones(1, 16)).shape == (1, layer.out_features)


def train(model: Path, pictures: Path, output: Path, *flags: str) -> Path:
    given = ["--model", str(model), "--data", str(pictures), "--output", str(output), "--tracker", "none"]
    given += ["--resolution", "64", "--prompt", "sks dog", "--no-report", "--rank", "2", "--optimizer", "adamw"]
    given += ["--prior-from", "base", "--class-prompt", "dog", "--validation", "0.3", "--caption-dropout", "0.3"]
    cli.main(["train", "lora", *given, "--steps", "2", "--lr", "1e-3", "--checkpoint-every", "1", *flags])
    return output


def test_a_run_is_the_same_and_resumes_to_the_bit(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """With pictures drawn on the way, of prompts that are no captions."""
    drawn = ["--sample-every", "1", "--sample-steps", "1", "--sample-prompts", "a cat"]
    plain, own = (
        train(tiny_models["sd"], pictures, tmp_path / name, *drawn, *flags)
        for name, flags in (("plain", ()), ("own", ("--cache-kv",)))
    )
    expected, weights = (load_file(run / "adapter.safetensors") for run in (plain, own))
    assert expected.keys() == weights.keys()
    assert all((weights[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() for name in weights)
    told, other = ([json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (own, plain))
    for name in ("loss", "validation", "grad_norm"):
        assert [one[name] for one in told] == pytest.approx([one[name] for one in other], rel=5e-6)
    picture = "samples/step-000002-0.png"
    one, another = (np.asarray(Image.open(run / picture), dtype=int) for run in (own, plain))
    assert abs(one - another).max() <= 1
    shutil.rmtree(own / checkpoints.name(2))
    (own / "adapter.safetensors").unlink()
    entry = json.loads((own / "run.json").read_text())
    (own / "run.json").write_text(json.dumps({**entry, "state": "stopped", "step": 1}))
    cli.main(["train", "--output", str(own), "--resume"])
    again = load_file(own / "adapter.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        (
            "sd",
            ["lora", "--no-prior", "--text-encoder-lr", "1e-4"],
            "--text-encoder-lr 0.0001: a caption is",
        ),
        (
            "sd",
            ["lora", "--no-prior", "--method", "dora"],
            "leave them as they are: lora, loha, lokr, ia3.",
        ),
        ("sd", ["lora", "--no-prior", "--method", "oft"], "--method oft: OFT changes"),
        ("sd", ["lora", "--no-prior", "--quantize", "nf4"], "--quantize nf4: bitsandbytes'"),
        ("sd", ["lora", "--no-prior", "--offload-blocks"], "--offload-blocks: by that"),
        ("sd", ["lora", "--no-prior", "--compile", "blocks"], "--compile blocks: not tried"),
        ("sd", ["dreambooth", "--no-prior"], "the base's own weights train"),
        ("sd", ["textual_inversion", "--word", "sks"], "words that captions are made of"),
        ("sd", ["pivotal", "--no-prior", "--word", "sks"], "new words train here"),
        ("flux", ["lora", "--no-prior"], "attends to prompt and picture together"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    kind: str,
    words: list[str],
    said: str,
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--model", str(tiny_models[kind]), "--data", str(pictures), "--prompt", "sks dog", "--tracker", "none"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *words, *given, "--output", str(tmp_path / "run"), "--cache-kv"])
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
