"""Quantised bases: what is quantised, that it is diffusers' own, what trains on it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import live
import numpy as np
import pytest
import tiny
import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from PIL import Image
from safetensors import safe_open
from torch import nn

from finetune import adapters, checkpoints, cli, export, families
from finetune.data.encoding import _encoders_fingerprint, _vae_fingerprint
from finetune.errors import Fault
from finetune.export import in_weights
from finetune.export.carried import carried
from finetune.export.compare import difference, prediction
from finetune.families import Family, Source, quantized
from finetune.methods import METHODS
from finetune.settings import Adapter

FITTING = [(method, base) for method, known in METHODS.items() for base in sorted(known.bases)]


def load(folder: Path, base: str | None = "nf4") -> Family:
    return families.load(Source(str(folder), quantize=base))


def adapted(folder: Path, base: str, **settings: Any) -> Family:
    family = load(folder, base)
    adapters.adapt(family, Adapter(**{"rank": 4, **settings}), 1e-3, None, 0)
    return family


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_blocks_and_the_frozen_text_encoders_are_quantised(kind: str, tiny_models: dict[str, Path]) -> None:
    """All linear layers that carry adapters are; what leads in and out, CLIP and T5's `wo` are not."""
    family = load(tiny_models[kind])
    there = {
        part: [name for name, layer in module.named_modules() if quantized.is_quantized(layer)]
        for part, module in families.modules(family).items()
    }
    able = {family.denoiser_name, *family.text_encoder_names} - set(family.trained_text_encoders)
    assert {part for part, names in there.items() if names} == able
    denoiser = families.denoiser(family)
    carrying = {name for name, _ in denoiser.named_modules() if name.endswith(family.adapter_targets)}
    assert carrying <= set(there[family.denoiser_name])
    assert not [name for names in there.values() for name in names if name.endswith(".wo") or name.startswith("proj")]
    plain = load(tiny_models[kind], None)
    assert quantized.size(denoiser) == sum(p.numel() for p in families.denoiser(plain).parameters())
    assert _vae_fingerprint(family) == _vae_fingerprint(plain)
    assert (_encoders_fingerprint(family) == _encoders_fingerprint(plain)) == (able == {family.denoiser_name})


@pytest.mark.parametrize(("method", "base"), FITTING)
def test_only_the_adapter_has_gradients(method: str, base: str, tiny_models: dict[str, Path]) -> None:
    """And what it learned is the same beside codes as in the weights that they stand for."""
    family = adapted(tiny_models["sd"], base, method=method)
    denoiser = families.denoiser(family).train()
    start = load(tiny_models["sd"], base)
    begun = prediction(start)
    if method != "oft":  # with Cayley's formula it begins at a rotation by nothing, to rounding
        assert difference(begun, prediction(family)) < (1e-6 if base == "nf4" else 0.02)
    conditions = {name: torch.ones(2, *shape) for name, shape in family.condition_shapes().items()}
    answer = family.predict(torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), conditions, torch.zeros(2, 6))
    answer.square().mean().backward()
    trained = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    assert trained and trained == {name for name, p in denoiser.named_parameters() if p.grad is not None}
    live.randomise(family)
    learned = carried(family, adapters.NAME)
    in_weights.put(start, learned, "learned", Path("file"))
    allowed = 1e-3 if base == "nf4" else 0.05  # int8 rounds what goes into the layers, anew where they are plain
    tuned = prediction(start)
    assert difference(prediction(family), tuned) < allowed and difference(begun, tuned) > 2 * allowed


def test_initialisations_begin_with_what_the_codes_stand_for(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Taken off again, they leave the quantised base as it is."""
    family = adapted(tiny_models["sdxl"], "nf4", init="pissa")
    assert difference(prediction(load(tiny_models["sdxl"])), prediction(family)) < 1e-4
    export.adapter(family, tmp_path / "pissa.safetensors", settings={})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(["red", "orange"]):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
    return folder


def train(recipe: str, model: Path | str, pictures: Path, output: Path, *flags: str) -> Path:
    given = ["--model", str(model), "--data", str(pictures), "--output", str(output), "--tracker", "none"]
    given += ["--resolution", "64", "--prompt", "sks dog", "--class-prompt", "dog", "--no-report"]
    cli.main(["train", recipe, *given, *flags])
    return output


def diffusers_own(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> DiffusionPipeline:
    """The base as diffusers quantises it; on the CPU, which it does not offer, and without the weights that
    bitsandbytes packs there for drawing alone."""
    quantizer = bnb_quantizer.BnB4BitDiffusersQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda *given, **told: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda self, given: {"": torch.device("cpu")})
    plain = getattr(DiffusionPipeline.from_pretrained(folder), name)
    linear = [path for path, layer in plain.named_modules() if isinstance(layer, nn.Linear)]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=[path for path in linear if path not in quantized.chosen(plain)],
    )
    made = type(plain).from_pretrained(folder / name, quantization_config=config, torch_dtype=torch.float32)
    for layer in made.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return DiffusionPipeline.from_pretrained(folder, **{name: made})


def test_a_preview_is_diffusers_picture_of_its_own_quantised_base(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run, stopped and resumed, gives the same bytes; its file says what it was trained on."""
    folder, flags = (
        tiny_models["sdxl"],
        ["--quantize", "nf4", "--steps", "2", "--lr", "5e-2", "--seed", "5", "--rank", "4"],
    )
    flags += ["--class-images", "1", "--class-steps", "1", "--checkpoint-every", "1", "--gradient-checkpointing"]
    drawn = ["--sample-every", "2", "--sample-steps", "2", "--sample-guidance", "4"]
    run = train("lora", folder, pictures, tmp_path / "run", *flags, *drawn)
    file = run / "adapter.safetensors"
    whole = file.read_bytes()

    pipeline = diffusers_own(folder, "unet", monkeypatch)
    same = load(folder).pipeline.unet.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in pipeline.unet.state_dict().items())
    pipeline.load_lora_weights(file)
    asked = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}
    theirs = pipeline("sks dog", generator=torch.Generator("cpu").manual_seed(5), **asked).images[0]
    ours = Image.open(run / "samples" / "step-000002-0.png")
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1

    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["finetune"])["quantize"] == "nf4"
    shutil.rmtree(run / checkpoints.name(2))
    file.unlink()
    told = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**told, "state": "stopped", "step": 1}))
    cli.main(["train", "--output", str(run), "--resume"])
    assert file.read_bytes() == whole

    cli.main(["export", str(run), "--format", "merged", "--output", str(tmp_path / "whole"), "--dtype", "fp32"])
    index = next((tmp_path / "whole").rglob("model_index.json"))
    tuned, base = (DiffusionPipeline.from_pretrained(place).unet for place in (index.parent, folder))
    one, other = (dict(module.named_parameters()) for module in (tuned, base))
    changed = {name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])}
    assert changed and all(".attn" in name for name in changed)  # the rest is as it was, never put into codes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("dreambooth --quantize nf4", "have no gradient"),
        ("lora --quantize nf4 --method loha", "two in a byte. Take --quantize int8, or"),
        ("lora --quantize int8 --method dora", "loses the scales"),
        ("pivotal --word sks --quantize nf4 --method lokr", "two in a byte"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_model_is_loaded(
    words: str, said: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, *flags = words.split()
    with pytest.raises(SystemExit) as status:
        train(recipe, "toybox", pictures, tmp_path / "run", *flags)
    assert status.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_quantised_base_draws_adapters_of_any_kind(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Beside its codes, or in plain weights where they are put into the weights; and says so in the picture."""
    family = adapted(tiny_models["sd"], "nf4", method="ia3")
    live.randomise(family)
    file = tmp_path / "ia3.safetensors"
    export.adapter(family, file, settings={})
    given = ["--model", str(tiny_models["sd"]), "--prompt", "dog", "--steps", "2", "--size", "64"]
    pictures = {}
    for name, flags in {
        "base": ["--quantize", "nf4"],
        "tuned": ["--quantize", "nf4", "--adapter", str(file)],
        "plain": ["--adapter", str(file)],
    }.items():
        cli.main(["generate", *given, *flags, "--output", str(tmp_path / name)])
        [picture] = (tmp_path / name).glob("*.png")
        pictures[name] = np.asarray(Image.open(picture)).astype(int)
        assert ('"quantize": "nf4"' in str(Image.open(picture).info)) == (name != "plain")
    assert len({picture.tobytes() for picture in pictures.values()}) == 3


def test_a_quantised_base_is_not_written_as_a_whole_model(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Fault, match="without --quantize"):
        export.merged(adapted(tiny_models["sd"], "nf4"), tmp_path / "model", dtype=torch.float32)
