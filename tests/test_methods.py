"""The methods of adapters: what trains, where, at which rank and rate; and what does not go together."""

from __future__ import annotations

import re
from pathlib import Path

import live
import measured
import pytest
import torch
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import Tensor, nn

from finetune import adapters, cli, families, loop, shelf
from finetune.adapters import INITIAL, NAME
from finetune.data import read_plain
from finetune.errors import Fault
from finetune.export.carried import carried
from finetune.export.compare import encoding, prediction
from finetune.families import Family, Source
from finetune.settings import Adapter, Loss


def adapted(folder: Path, text: float | None = None, dtype: torch.dtype = torch.float32, **settings: object) -> Family:
    family = families.load(Source(str(folder)), dtype)
    adapters.adapt(family, Adapter(**{"rank": 4, **settings}), 1e-3, text, 0)  # type: ignore[arg-type]
    return family


def layers(family: Family) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in family.pipeline.unet.named_modules() if isinstance(layer, LoraLayer)}


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_what_an_initialisation_begins_with_is_taken_off_again(
    kind: str, init: str, tiny_models: dict[str, Path]
) -> None:
    """The base's weights stay as they are, so that the file is for the base and the class is asked of it."""
    base = families.load(Source(str(tiny_models[kind])))
    weights, answers = base.pipeline.unet.state_dict(), (prediction(base), encoding(base))
    family = adapted(tiny_models[kind], 1e-3, init=init, conv_rank=2, alpha=2.0)
    for mine, theirs in zip(answers, (prediction(family), encoding(family)), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    with adapters.off(family):
        assert torch.equal(prediction(family), answers[0])
    for name, layer in layers(family).items():
        assert torch.equal(layer.get_base_layer().weight, weights[f"{name}.weight"])
        begun = layer.get_delta_weight(NAME)
        assert begun.norm() > 0.1 * weights[f"{name}.weight"].norm()
        assert torch.equal(begun, -layer.get_delta_weight(INITIAL))
    trained = {name for name, p in family.pipeline.unet.named_parameters() if p.requires_grad}
    assert trained and all(f".{NAME}." in name for name in trained)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("method", ["lora", "oft", "boft", "ia3"])
def test_gradients_are_those_by_differences(
    kind: str, method: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Along its gradient the loss rises by the gradient's norm, also where so little is heard of it that few steps
    show nothing."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
    settings = Adapter(method, rank=4) if method != "ia3" else Adapter(method)
    family = families.load(Source(str(tiny_models[kind])))
    encodings = measured.encoded(family, read_plain(tmp_path, "a photo of sks dog"))
    adapters.adapt(family, settings, 1e-3, None, 0)
    trained = [p for p in families.denoiser(family).parameters() if p.requires_grad]
    (batch,), measure = measured.batches(encodings, 2), loop.PictureLoss(family, encodings, Loss())

    def loss() -> Tensor:
        return (batch.shares * measure(batch)).sum()

    gradients = torch.autograd.grad(loss(), trained)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    answers = []
    with torch.no_grad():
        for shift in (1e-2, -2e-2):
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.add_(shift * gradient / norm)
            answers.append(loss())
    assert norm > 0
    assert (answers[0] - answers[1]).item() / 2e-2 == pytest.approx(norm.item(), rel=2e-2)


def test_initialisations_are_pefts(tiny_models: dict[str, Path]) -> None:
    """By PEFT's own code, which takes them out of the base's weights."""
    from peft import LoraConfig

    for init in ("pissa", "olora"):
        family, other = adapted(tiny_models["sdxl"], init=init), families.load(Source(str(tiny_models["sdxl"])))
        targets = list(other.adapter_targets)
        config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=init, target_modules=targets)
        other.pipeline.unet.add_adapter(config, NAME)
        theirs = layers(other)
        for name, layer in layers(family).items():
            assert torch.allclose(layer.get_delta_weight(NAME), theirs[name].get_delta_weight(NAME), atol=1e-5), name


def test_the_change_of_an_initialisation_is_what_was_learned(tiny_models: dict[str, Path]) -> None:
    """B A - B0 A0, of twice the rank, on the base as it is; nothing where nothing was learned."""
    family = adapted(tiny_models["sd"], init="pissa", alpha=2.0)
    for layer in carried(family, NAME):
        assert layer.rank == 8 and layer.scale == 0.5
        assert float(layer.change().abs().max()) < 1e-6
    live.randomise(family)
    changes = {layer.path: layer.change() for layer in carried(family, NAME)}
    for name, layer in layers(family).items():
        learned = layer.get_delta_weight(NAME) + layer.get_delta_weight(INITIAL)
        assert torch.allclose(changes[name], learned.detach(), atol=1e-5)


def test_patterns_give_ranks_and_alphas(tiny_models: dict[str, Path]) -> None:
    """Whole names of a path, the last that fits; other ranks keep the scale."""
    family = adapted(
        tiny_models["sd"],
        **{"alpha": 2.0, "rank_pattern": ("attn2=8", "mid_block=2", "attn2.to_k=1"), "alpha_pattern": ("attn1=3",)},
    )
    for name, layer in layers(family).items():
        rank = 1 if "attn2.to_k" in name else 2 if "mid_block" in name else 8 if "attn2" in name else 4
        assert layer.r[NAME] == rank, name
        assert layer.scaling[NAME] == pytest.approx(3 / rank if "attn1" in name else 0.5)


def test_conv_rank_adapts_the_convolutions_of_the_blocks(tiny_models: dict[str, Path]) -> None:
    plain, found = layers(adapted(tiny_models["sd"])), layers(adapted(tiny_models["sd"], conv_rank=2, alpha=8.0))
    spatial = {name for name, layer in found.items() if isinstance(layer.get_base_layer(), nn.Conv2d)}
    assert found.keys() - spatial == plain.keys() and spatial
    kinds = {name.rpartition("attentions.")[2].split(".")[-1] for name in spatial}
    assert kinds == {"conv1", "conv2", "conv", "conv_shortcut", "proj_in", "proj_out"}
    assert {found[name].r[NAME] for name in spatial} == {2}
    assert {layer.scaling[NAME] for layer in found.values()} == {2.0}


def test_rank_stabilised_scale(tiny_models: dict[str, Path]) -> None:
    """alpha / sqrt(rank) (Kalajdzievski 2023, 2312.03732)."""
    family = adapted(tiny_models["sd"], rslora=True, alpha=3.0)
    assert {layer.scaling[NAME] for layer in layers(family).values()} == {1.5}
    assert {layer.scale for layer in carried(family, NAME)} == {1.5}


def test_lora_plus_gives_b_its_own_rate(tiny_models: dict[str, Path]) -> None:
    family = families.load(Source(str(tiny_models["sd"])))
    groups = adapters.adapt(family, Adapter(rank=4, lora_plus_ratio=16.0), 1e-3, 1e-4, 0)
    assert [(group.part, group.lr) for group in groups] == [
        ("unet", 1e-3),
        ("unet", pytest.approx(1.6e-2)),
        ("text_encoder", 1e-4),
        ("text_encoder", pytest.approx(1.6e-3)),
    ]
    for number, group in enumerate(groups):
        names = set(loop.named(family, [group]))
        assert names and all((".lora_B." in name) == (number % 2 == 1) for name in names)


@pytest.mark.parametrize(
    ("parts", "inside"),
    [
        (("kv",), r"attn2\.to_[kv]\.weight"),
        (("attention",), r"\.attn[12]\."),
        (("self-attention", "feed-forward"), r"\.attn1\.|\.ff\."),
        (("norm",), r"norm"),
        (("up", "mid"), r"^(up_blocks|mid_block)\."),
        (("conv",), r"conv|proj_in|proj_out"),
    ],
)
def test_parts_of_the_denoiser_train_alone(parts: tuple[str, ...], inside: str, tiny_models: dict[str, Path]) -> None:
    """Only they have gradients, after a step, and all that they are."""
    family = families.load(Source(str(tiny_models["sd"])))
    groups = adapters.full(family, 1e-3, None, parts=parts)
    prediction_with_gradient(family).square().mean().backward()
    moved = {name for name, p in family.pipeline.unet.named_parameters() if p.grad is not None}
    names = {name for name, _ in family.pipeline.unet.named_parameters()}
    assert moved == {name for name in names if re.search(inside, name)} and moved < names
    assert {id(p) for group in groups for p in group.parameters} == {
        id(p) for name, p in family.pipeline.unet.named_parameters() if name in moved
    }


def prediction_with_gradient(family: Family) -> torch.Tensor:
    conditions = {name: torch.ones(1, *shape) for name, shape in family.condition_shapes().items()}
    return family.predict(torch.ones(1, 4, 16, 16), torch.tensor([500]), conditions, torch.zeros(1, 6))


def test_a_part_that_is_not_there_is_refused(tiny_models: dict[str, Path]) -> None:
    family = families.load(Source(str(tiny_models["sd"])))
    del family.pipeline.unet.mid_block
    with pytest.raises(Fault, match="--parts mid: this model's UNet2DConditionModel has no such part"):
        adapters.full(family, 1e-3, None, parts=("mid",))


@pytest.mark.parametrize("kind", ["sd3", "flux", "klein", "zimage"])
def test_transformers_have_attention_feed_forward_and_norms(kind: str, tiny_models: dict[str, Path]) -> None:
    """They attend to picture and text at once, and have no blocks up or down, nor convolutions in them."""
    family = families.load(Source(str(tiny_models[kind])))
    for part in ("kv", "self-attention", "cross-attention", "conv", "up"):
        with pytest.raises(Fault, match=r"has no such part\. It has: attention, feed-forward, norm\."):
            adapters.full(family, 1e-3, None, parts=(part,))
    for part in ("attention", "feed-forward", "norm"):
        adapters.full(family, 1e-3, None, parts=(part,))
        trained = {name for name, p in families.denoiser(family).named_parameters() if p.requires_grad}
        spelt = {"attention": "attn|attention", "feed-forward": r"ff|feed_forward|mlp", "norm": "norm"}[part]
        assert trained and all(re.search(spelt, name) for name in trained)
    with pytest.raises(Fault, match="--conv-rank 2: this model's blocks have no convolutions"):
        adapted(tiny_models[kind], conv_rank=2)


def test_what_is_no_part_stays_the_bases(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Through the command line, and exported from a checkpoint too."""
    from safetensors.torch import load_file

    pictures = shelf.datasets() / "gizmo" / "pictures"
    given = [
        "--data",
        str(pictures),
        "--model",
        str(tiny_models["sd"]),
        "--output",
        str(tmp_path / "run"),
        "--no-prior",
    ]
    rest = ["--parts", "kv", "--steps", "2", "--lr", "1e-2", "--checkpoint-every", "1", "--tracker", "none"]
    cli.main(["train", "dreambooth", *given, *rest, "--resolution", "64"])
    cli.main(["export", str(tmp_path / "run"), "--step", "2", "--format", "merged", "--dtype", "fp32",
              "--output", str(tmp_path / "out"), "--name", "it"])  # fmt: skip
    file = "unet/diffusion_pytorch_model.safetensors"
    base = load_file(tiny_models["sd"] / file)
    for folder in (tmp_path / "run" / "model", tmp_path / "out" / "it-merged"):
        made = load_file(folder / file)
        moved = {name for name in base if not torch.equal(made[name], base[name])}
        assert moved and all(re.search(r"attn2\.to_[kv]\.", name) for name in moved)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank_pattern": ("attn9=4",)}, "--rank-pattern attn9=4: no layer that is adapted has such a part"),
        ({"alpha_pattern": ("tn2=4",)}, "--alpha-pattern tn2=4: no layer"),
        ({"rank_pattern": ("attn2",)}, "--rank-pattern attn2: say a part of the layers' paths and a number"),
        ({"rank_pattern": ("attn2=1.5",)}, "a whole number"),
        ({"method": "dora", "init": "pissa"}, "--method dora --init: DoRA has no such thing. Methods that do: lora"),
        ({"init": "pissa", "rank": 64}, "has no 64 directions"),
        ({"rank": 0}, "an adapter's rank is at least 1"),
        ({"dropout": 1.0}, "--dropout 1"),
        ({"lora_plus_ratio": 0.0}, "--lora-plus-ratio 0"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    settings: dict[str, object], said: str, tiny_models: dict[str, Path]
) -> None:
    with pytest.raises(Fault) as fault:
        adapted(tiny_models["sd"], **settings)
    assert said in fault.value.message


def test_refusals_come_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = shelf.datasets() / "gizmo" / "pictures"
    given = ["--data", str(pictures), "--output", str(tmp_path / "run"), "--no-prior"]
    for flags, said in (
        (["--method", "dora", "--init", "olora"], "DoRA has no such thing"),
        (["--optimizer", "prodigy", "--lr", "1", "--lora-plus-ratio", "4"], "one rate for all that trains"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "lora", *given, *flags])
        assert stop.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
