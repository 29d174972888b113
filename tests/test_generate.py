"""`finetune generate`, through its own main."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import live
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image as Images
from safetensors.torch import load_file, save_file

from finetune import config, export, generate
from finetune.errors import Fault
from finetune.pictures import read_settings
from finetune.settings import Model

QUICK = {"steps": 2, "guidance": 4.0}


@pytest.fixture(scope="session")
def adapters(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    files = {kind: folder / f"{kind}.safetensors" for kind in ("sd", "sdxl")}
    for kind, file in files.items():
        export.adapter(live.adapted(tiny_models[kind], text=True), file, settings={})
    return files


def draw(output: Path, model: Path, *prompts: str, **options: object) -> list[Path]:
    asked = {"model": Model(str(model)), "prompt": prompts or ("a dog",), "output": output, **QUICK, **options}
    generate.main(generate.Config(**asked))
    return sorted(path for path in output.iterdir() if path.name != generate.GRID)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Images.open(path)).astype(int)


def apart(one: Path, other: Path) -> int:
    return int(np.abs(pixels(one) - pixels(other)).max())


def test_prompts_and_seeds(tmp_path: Path, tiny_models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A file for each prompt and seed, each with its settings, the same picture as drawn alone, and the grid."""
    files = draw(tmp_path / "out", tiny_models["sd"], "a red ball", "Ein Hund, läuft!", seed=5, count=3, batch=4)
    assert [path.name for path in files] == [
        *(f"01-a-red-ball-seed{seed}.png" for seed in (5, 6, 7)),
        *(f"02-ein-hund-läuft-seed{seed}.png" for seed in (5, 6, 7)),
    ]
    told = [read_settings(path) for path in files]
    assert [(one["prompt"], one["seed"]) for one in told] == [
        *(("a red ball", seed) for seed in (5, 6, 7)),
        *(("Ein Hund, läuft!", seed) for seed in (5, 6, 7)),
    ]
    assert {(one["steps"], one["guidance"], one["scheduler"], one["model"]) for one in told} == {
        (2, 4.0, "DDIMScheduler", "local")
    }
    [alone] = draw(tmp_path / "alone", tiny_models["sd"], "a red ball", seed=6)
    assert apart(alone, files[1]) <= 1 and apart(files[0], files[1]) > 5
    sheet = Images.open(tmp_path / "out" / generate.GRID)
    assert sheet.width > 3 * 192 and sheet.height > 2 * 192
    assert not (tmp_path / "alone" / generate.GRID).exists()
    printed = capsys.readouterr().out.split("\n")
    assert str(files[0]) in printed and str(tmp_path / "out" / generate.GRID) in printed


def test_a_picture_is_that_of_plain_diffusers_with_the_adapter(
    tmp_path: Path, tiny_models: dict[str, Path], adapters: dict[str, Path]
) -> None:
    [ours] = draw(tmp_path, tiny_models["sdxl"], adapter=(adapters["sdxl"],), scale=(0.7,), negative="blurry", seed=9)
    pipeline = DiffusionPipeline.from_pretrained(tiny_models["sdxl"])
    pipeline.load_lora_weights(adapters["sdxl"].parent, weight_name="sdxl.safetensors", adapter_name="one")
    pipeline.set_adapters(["one"], [0.7])
    theirs = pipeline(
        "a dog", negative_prompt="blurry", num_inference_steps=2, guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(9),
    ).images[0]  # fmt: skip
    assert np.abs(pixels(ours) - np.asarray(theirs).astype(int)).max() <= 1
    digest = hashlib.sha256(adapters["sdxl"].read_bytes()).hexdigest()
    assert read_settings(ours)["adapters"] == [{"name": "sdxl.safetensors", "sha256": digest, "scale": 0.7}]


def test_scale_zero_is_the_base_and_scales_add_up(
    tmp_path: Path, tiny_models: dict[str, Path], adapters: dict[str, Path]
) -> None:
    base, one = tiny_models["sd"], adapters["sd"]
    [bare] = draw(tmp_path / "bare", base)
    [off] = draw(tmp_path / "off", base, adapter=(one,), scale=(0.0,))
    [on] = draw(tmp_path / "on", base, adapter=(one,))
    [halves] = draw(tmp_path / "halves", base, adapter=(one, one), scale=(0.5,))
    [parts] = draw(tmp_path / "parts", base, adapter=(one, one), scale=(0.75, 0.25))
    assert apart(bare, off) == 0
    assert apart(bare, on) > 5
    assert apart(on, halves) <= 1 and apart(on, parts) <= 1


def test_pictures_are_not_written_over_unasked(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    [file] = draw(tmp_path / "out", tiny_models["sd"])
    file.write_bytes(b"mine")
    with pytest.raises(Fault, match=r"1 of the pictures are there already.*--overwrite(.|\n)*01-a-dog-seed0.png"):
        draw(tmp_path / "out", Path("no-such-model"), count=2)
    assert file.read_bytes() == b"mine"
    assert draw(tmp_path / "out", tiny_models["sd"], overwrite=True) == [file]
    assert pixels(file).shape == (64, 64, 3)


def refused(tmp_path: Path, model: Path, *prompts: str, **options: object) -> str:
    with pytest.raises(Fault) as fault:
        draw(tmp_path / "refused", model, *prompts, **options)
    assert not (tmp_path / "refused").exists()
    return str(fault.value)


@pytest.mark.parametrize(("model", "adapter", "foreign"), [("sd", "sdxl", "text_encoder_2."), ("sdxl", "sd", "unet.")])
def test_an_adapter_for_another_family_is_refused_by_its_names(
    model: str, adapter: str, foreign: str, tmp_path: Path, tiny_models: dict[str, Path], adapters: dict[str, Path]
) -> None:
    said = refused(tmp_path, tiny_models[model], adapter=(adapters[adapter],))
    assert str(adapters[adapter]) in said and "do not belong to this" in said and "another kind of model" in said
    assert foreign in said and "more" in said


def altered(file: Path, tmp_path: Path, change: str) -> Path:
    """An adapter with one thing wrong; the first layer of the UNet by name."""
    tensors = load_file(file)
    some = sorted(name for name in tensors if name.startswith("unet.") and "lora_A" in name)[0]
    if change == "renamed key":
        tensors[some.replace("lora_A", "lora_C")] = tensors.pop(some)
    elif change == "renamed layer":
        for half in ("lora_A", "lora_B"):
            tensors[some.replace("to_k", "to_x").replace("lora_A", half)] = tensors.pop(some.replace("lora_A", half))
    elif change == "missing half":
        del tensors[some.replace("lora_A", "lora_B")]
    elif change == "shape":
        tensors[some] = torch.zeros(tensors[some].shape[0], tensors[some].shape[1] + 1)
    elif change == "alpha beside":
        tensors[some.replace("lora_A.weight", "alpha")] = torch.tensor(2.0)
    elif change == "no adapter":
        tensors = {"model.diffusion_model.out.0.weight": torch.zeros(3)}
    save_file(tensors, tmp_path / "altered.safetensors", {"format": "pt"})
    return tmp_path / "altered.safetensors"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("renamed key", "attn1.to_k.lora_C.weight"),
        ("renamed layer", "attn1.to_x.lora_A.weight: this model has no such layer"),
        ("missing half", "attn1.to_k.lora_B.weight"),
        ("shape", "attn1.to_k.lora_A.weight: (4, 9) does not fit the layer's weight (8, 8)"),
        ("alpha beside", "attn1.to_k.alpha"),
        ("no adapter", "model.diffusion_model.out.0.weight"),
    ],
)
def test_an_adapter_that_would_be_ignored_in_part_is_refused(
    change: str, expected: str, tmp_path: Path, tiny_models: dict[str, Path], adapters: dict[str, Path]
) -> None:
    file = altered(adapters["sd"], tmp_path, change)
    said = refused(tmp_path, tiny_models["sd"], adapter=(file,))
    assert str(file) in said and expected in said, said


def kohya(file: Path, to: Path, text: str) -> Path:
    """The same adapter with kohya's names, alpha = rank / 2 (tiny.Adapter has rank 4, alpha 2)."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(file).items():
        part, _, rest = name.partition(".")
        layer, _, kind = rest.rpartition(".lora_")
        stem = f"{'lora_unet' if part == 'unet' else text}_{layer.replace('.', '_')}"
        tensors[f"{stem}.lora_{'down' if kind.startswith('A') else 'up'}.weight"] = tensor
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, to)
    return to


def test_a_foreign_adapter_with_kohya_names_draws_the_same(
    tmp_path: Path, tiny_models: dict[str, Path], adapters: dict[str, Path]
) -> None:
    foreign = kohya(adapters["sd"], tmp_path / "kohya.safetensors", "lora_te")
    [ours] = draw(tmp_path / "ours", tiny_models["sd"], adapter=(adapters["sd"],))
    [theirs] = draw(tmp_path / "theirs", tiny_models["sd"], adapter=(foreign,))
    assert apart(ours, theirs) <= 1
    unknown = kohya(adapters["sd"], tmp_path / "te3.safetensors", "lora_te3")
    assert "lora_te3_text_model" in refused(tmp_path, tiny_models["sd"], adapter=(unknown,))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"count": 0}, "--count 0"),
        ({"steps": 0}, "--steps 0"),
        ({"seed": -1}, "--seed -1"),
        ({"scale": (1.0, 0.5)}, "2 numbers for 0 adapters"),
        ({"size": 45}, "multiples of 8"),
        ({"adapter": (Path("nowhere.safetensors"),)}, "nowhere.safetensors: there is no such file"),
    ],
)
def test_senseless_settings(
    tmp_path: Path, tiny_models: dict[str, Path], options: dict[str, object], expected: str
) -> None:
    with pytest.raises(Fault, match=expected.replace(".", r"\.")):
        draw(tmp_path / "out", tiny_models["sd"], **options)
    assert not list(tmp_path.rglob("*.png"))


def test_a_blank_prompt(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    assert "say what to draw" in refused(tmp_path, tiny_models["sd"], "a dog", "  ")


def test_the_command_line_gives_lists(tmp_path: Path) -> None:
    words = ["--prompt", "a dog", "a cat", "--adapter", "a.safetensors", "b.safetensors", "--scale", "1", "0.5"]
    made = config.parse(generate.Config, [*words, "--model", "toybox", "--count", "4"], "finetune generate")
    assert made.prompt == ("a dog", "a cat") and made.adapter == (Path("a.safetensors"), Path("b.safetensors"))
    assert made.scale == (1.0, 0.5) and made.model.model == "toybox" and made.count == 4


def test_its_settings_are_read_without_torch() -> None:
    code = "import sys, finetune.generate; sys.exit(any(n in sys.modules for n in ('torch', 'diffusers', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
