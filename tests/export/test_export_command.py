"""`finetune export`, through the command line: every format from every kind of thing that was trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import live
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune import cli, export, families, toybox
from finetune.export import compare, formats
from finetune.families import Family, Source

SUBJECT = ["--prompt", "a photo of sks dog", "--no-prior", "--max-upscale", "4", "--tracker", "none", "--no-use-cache"]
VALIDATED = ["--validation", "0.34", "--checkpoint-every", "2", "--keep-last", "3", "--steps", "6"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


ADAPTER = ["--rank", "4", "--alpha", "2", "--lr", "1e-2"]
ASKED = {
    "lora": ("sdxl", ["lora", *ADAPTER, "--text-encoder-lr", "1e-2", "--steps", "3"]),
    "averaged": ("sd", ["lora", *ADAPTER, "--ema", "0.9", *VALIDATED]),
    "free": ("sd", ["lora", *ADAPTER, "--optimizer", "schedulefree", "--steps", "3"]),
    "dreambooth": ("sd-v", ["dreambooth", "--lr", "1e-4", "--steps", "2"]),
    "toybox": (None, ["lora", *ADAPTER, "--steps", "2"]),
}
"""A LoRA with alpha != rank on SDXL and its text encoders, two of other weights than the last step's, a DreamBooth, one
of the embedded model"""


@dataclass
class Runs:
    """Of each name a run, trained when it is first asked for."""

    models: dict[str, Path]
    pictures: Path
    root: Path

    def __getitem__(self, name: str) -> Path:
        run, (kind, words) = self.root / name, ASKED[name]
        if not run.exists():
            base = ["--model", str(self.models[kind])] if kind else []
            cli.main(["train", *words, *base, "--data", str(self.pictures), "--output", str(run), *SUBJECT])
        return run


@pytest.fixture(scope="session")
def runs(tiny_models: dict[str, Path], pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_models, pictures, tmp_path_factory.mktemp("runs"))


def run(*words: object) -> None:
    cli.main(["export", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def plain(kind: str, folder: Path, file: Path | None = None) -> Family:
    """As a user of diffusers loads what was written: an adapter, a merged folder or a single file."""
    if kind == "single-file":
        xl = "XL" in json.loads((folder / "model_index.json").read_text())["_class_name"]
        made = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
        pipeline = made.from_single_file(str(file), config=str(folder), torch_dtype=torch.float32)
    else:
        pipeline = DiffusionPipeline.from_pretrained(file if kind == "merged" else folder, torch_dtype=torch.float32)
    if kind in ("diffusers", "kohya"):
        pipeline.load_lora_weights(file.parent, weight_name=file.name)  # type: ignore[union-attr]
    return families.wrap(pipeline)


def written(folder: Path, name: str) -> dict[str, Path]:
    files = {
        "diffusers": f"{name}-diffusers.safetensors",
        "kohya": f"{name}-kohya.safetensors",
        "peft": f"{name}-peft.safetensors",
        "merged": f"{name}-merged",
        "single-file": f"{name}-single-file.safetensors",
    }
    return {form: folder / file for form, file in files.items() if (folder / file).exists()}


@pytest.mark.parametrize("name", ["lora", "toybox"])
def test_every_format_of_an_adapter_gives_the_same_model(
    name: str, runs: Runs, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_models["sdxl"] if name == "lora" else toybox.path()
    run(runs[name], "--format", "all", "--dtype", "fp32", "--output", tmp_path / "out")
    files = written(tmp_path / "out", name)
    assert list(files) == ["diffusers", "kohya", "merged", "single-file"]
    assert {path for path in (tmp_path / "out").iterdir()} == set(files.values())
    printed = capsys.readouterr().out
    assert all(f"{path}  " in printed for path in files.values()) and "MB" in printed
    trained = plain("diffusers", base, runs[name] / "adapter.safetensors")
    asked = compare.prediction(trained), compare.encoding(trained)
    assert compare.difference(compare.prediction(plain("base", base)), asked[0]) > 1e-3, "the adapter acts"
    for form, path in files.items():
        loaded = plain(form, base, path)
        assert compare.difference(asked[0], compare.prediction(loaded)) < 1e-4, form
        assert compare.difference(asked[1], compare.encoding(loaded)) < 1e-4, form
    told = [json.loads(safe_open(files[form], "pt").metadata()["finetune"]) for form in ("kohya", "single-file")]
    assert all((one["rank"], one["prompt"]) == (4, "a photo of sks dog") for one in told)


def test_half_precision_is_the_default(runs: Runs, tmp_path: Path) -> None:
    run(runs["toybox"], "--format", "kohya", "--output", tmp_path, "--name", "sks")
    tensors = load_file(tmp_path / "sks-kohya.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")} == {torch.float16}
    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {2.0}


def test_a_whole_models_formats(runs: Runs, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    run(runs["dreambooth"], "--format", "all", "--dtype", "fp32", "--output", tmp_path)
    files = written(tmp_path, "dreambooth")
    assert list(files) == ["merged", "single-file"]
    expected = compare.prediction(plain("merged", tiny_models["sd-v"], runs["dreambooth"] / "model"))
    for form, path in files.items():
        loaded = plain(form, tiny_models["sd-v"], path)
        assert compare.difference(expected, compare.prediction(loaded)) < 1e-5
        assert loaded.objective().prediction == "v_prediction"
    run(runs["dreambooth"] / "model", "--format", "single-file", "--dtype", "fp32", "--output", tmp_path)
    again = load_file(tmp_path / "model-single-file.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in load_file(files["single-file"]).items())


@pytest.mark.parametrize("name", ["lora", "averaged", "free"])
def test_the_last_checkpoint_is_what_the_run_exported(name: str, runs: Runs, tmp_path: Path) -> None:
    """To the bit: averaged weights and those of a schedule-free optimizer are the ones to use there, too."""
    run(runs[name], "--step", "last", "--format", "diffusers", "--dtype", "fp32", "--output", tmp_path)
    [file] = tmp_path.iterdir()
    assert file.name.startswith(f"{name}-step-00000")
    expected, found = load_file(runs[name] / "adapter.safetensors"), load_file(file)
    assert expected.keys() == found.keys() and all(torch.equal(found[each], expected[each]) for each in expected)


def test_a_checkpoint_of_a_whole_model(runs: Runs, tmp_path: Path) -> None:
    run(runs["dreambooth"], "--step", "2", "--format", "merged", "--dtype", "fp32", "--output", tmp_path)
    unet = "unet/diffusion_pytorch_model.safetensors"
    expected, found = (load_file(path / unet) for path in (runs["dreambooth"] / "model", *tmp_path.iterdir()))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_any_checkpoint_by_its_step_and_the_best_one(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [json.loads(line) for line in (runs["averaged"] / "log.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation"] for line in told if "validation" in line}
    best = min((2, 4, 6), key=lambda step: losses[step])
    for step in ("2", "best"):
        run(runs["averaged"], "--step", step, "--format", "kohya", "--output", tmp_path / step)
    assert (tmp_path / "2" / "averaged-step-000002-kohya.safetensors").is_file()
    assert (tmp_path / "best" / f"averaged-step-{best:06d}-kohya.safetensors").is_file()
    said = refused(capsys, runs["averaged"], "--step", "3", "--format", "kohya", "--output", tmp_path / "3")
    assert "--step 3: there are checkpoints of 2, 4, 6, best and last" in said
    said = refused(capsys, runs["lora"], "--step", "best", "--format", "kohya", "--output", tmp_path / "3")
    assert "nothing was measured to choose by" in said


def test_an_unfinished_run_gives_its_newest_checkpoint(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = tmp_path / "begun"
    shutil.copytree(runs["averaged"], unfinished, ignore=shutil.ignore_patterns("adapter.safetensors"))
    shutil.rmtree(unfinished / "checkpoints" / "step-000006")
    run(unfinished, "--format", "kohya", "--output", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["begun-step-000004-kohya.safetensors"]
    assert "the adapter of step-000004" in capsys.readouterr().out
    shutil.rmtree(unfinished / "checkpoints")
    said = refused(capsys, unfinished, "--format", "kohya", "--output", tmp_path / "other")
    assert "nothing to export yet" in said and not (tmp_path / "other").exists()


def test_an_adapter_file_without_and_with_its_base(
    runs: Runs, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To kohya's names and back without the base; with it to a whole model."""
    file = runs["lora"] / "adapter.safetensors"
    run(file, "--format", "all", "--dtype", "fp32", "--output", tmp_path, "--name", "there")
    assert list(written(tmp_path, "there")) == ["diffusers", "kohya"]
    assert "single-file: not written: a whole model needs the adapter's base" in capsys.readouterr().out
    there = written(tmp_path, "there")["kohya"]
    run(there, "--format", "diffusers", "--dtype", "fp32", "--output", tmp_path, "--name", "back")
    expected, found = load_file(file), load_file(tmp_path / "back-diffusers.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(found[each], expected[each]) for each in expected)
    run(there, "--format", "merged", "--dtype", "fp32", "--output", tmp_path, "--model", tiny_models["sdxl"])
    trained = plain("diffusers", tiny_models["sdxl"], file)
    loaded = plain("merged", tiny_models["sdxl"], tmp_path / "there-kohya-merged")
    assert compare.difference(compare.prediction(trained), compare.prediction(loaded)) < 1e-5
    assert compare.difference(compare.encoding(trained), compare.encoding(loaded)) < 1e-5


def test_kinds_that_diffusers_does_not_load_are_merged_all_the_same(
    tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoHa, in LyCORIS's names: no diffusers file of it, but a whole model."""
    family = families.load(Source(str(tiny_models["sd"])))
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = family.pipeline.unet.get_submodule(path)
    draw = torch.Generator().manual_seed(0)
    names = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)}
    halves = {name: torch.randn(shape, generator=draw) for name, shape in names.items()}
    module = f"lora_unet_{path.replace('.', '_')}"
    tensors = {f"{module}.{name}": half for name, half in halves.items()} | {f"{module}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "loha.safetensors", {"ss_base_model_version": "sd_v1"})
    asked = ["--model", tiny_models["sd"], "--dtype", "fp32", "--output", tmp_path / "out"]
    run(tmp_path / "loha.safetensors", "--format", "all", *asked)
    assert "diffusers: not written:" in capsys.readouterr().out
    files = written(tmp_path / "out", "loha")
    assert list(files) == ["kohya", "peft", "merged", "single-file"]
    w1, w2 = (halves[f"hada_w{n}_a"] @ halves[f"hada_w{n}_b"] for n in (1, 2))
    merged = load_file(files["merged"] / "unet" / "diffusion_pytorch_model.safetensors")[f"{path}.weight"]
    assert torch.allclose(merged, layer.weight + 0.5 * w1 * w2, atol=1e-6)
    said = refused(capsys, tmp_path / "loha.safetensors", "--format", "diffusers", *asked[:-1], tmp_path / "other")
    assert "diffusers loads LoRA and DoRA only, not LoHa" in said


def test_alphas_that_differ_by_layer_are_those_of_the_file(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """diffusers takes one alpha of a kohya file for all of it; what is exported does not."""
    family = live.adapted(tiny_models["sd"])
    export.adapter(family, tmp_path / "a.safetensors", settings={}, form="kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    for number, name in enumerate(sorted(name for name in tensors if name.endswith(".alpha"))):
        tensors[name] = torch.tensor(1.0 + number % 3)
    save_file(tensors, tmp_path / "b.safetensors")
    asked = ["--model", tiny_models["sd"], "--dtype", "fp32", "--output", tmp_path]
    run(tmp_path / "b.safetensors", "--format", "kohya", "merged", *asked)
    expected, found = (formats.read(tmp_path / f"{name}.safetensors") for name in ("b", "b-kohya"))
    assert not compare.other_changes(expected, found, torch.float32)
    merged = load_file(tmp_path / "b-merged" / "unet" / "diffusion_pytorch_model.safetensors")
    base = family.pipeline.unet.state_dict()
    for layer in expected:
        weight = base[f"{layer.path}.base_layer.weight"]
        assert torch.allclose(merged[f"{layer.path}.weight"], weight + layer.change().reshape(weight.shape), atol=1e-6)


def test_wrong_input(
    runs: Runs, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is refused before anything is written."""
    file, out = runs["lora"] / "adapter.safetensors", ["--output", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    assert "no run: it has no settings.toml" in refused(capsys, tmp_path / "empty", "--format", "kohya", *out)
    assert "there is no such file or folder" in refused(capsys, tmp_path / "nothing", "--format", "kohya", *out)
    assert "civitai" in refused(capsys, file, "--format", "civitai", *out)
    assert "a whole model needs the adapter's base. Name it: --model" in refused(
        capsys, file, "--format", "single-file", *out
    )
    assert "only a run has checkpoints" in refused(capsys, file, "--step", "2", "--format", "kohya", *out)
    assert "this is a whole model, no adapter" in refused(capsys, runs["dreambooth"], "--format", "kohya", *out)
    other = ["--model", tiny_models["sd"], "--format", "merged", *out]
    assert "an adapter for StableDiffusionXLPipeline" in refused(capsys, file, *other)
    assert "is a whole model itself" in refused(capsys, runs["dreambooth"], *other)
    assert "go with --model" in refused(capsys, runs["lora"], "--revision", "main", "--format", "kohya", *out)
    assert "a name without a folder" in refused(capsys, file, "--format", "kohya", "--name", "a/b", *out)
    whole = tmp_path / "whole.safetensors"
    save_file({"model.diffusion_model.out.2.bias": torch.zeros(4)}, whole)
    assert "no adapter in a format that is known" in refused(capsys, whole, "--format", "kohya", *out)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_written_over(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toybox-kohya.safetensors").write_text("mine")
    said = refused(capsys, runs["toybox"], "--format", "kohya", "merged", "--output", tmp_path)
    assert "not written over" in said and "toybox-kohya.safetensors" in said
    assert [path.name for path in tmp_path.iterdir()] == ["toybox-kohya.safetensors"]


def test_another_base_than_the_runs_is_noticed(
    runs: Runs, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder that the run names holds another model meanwhile; named with --model, it is taken."""
    moved, base = tmp_path / "moved", tmp_path / "base"
    shutil.copytree(runs["averaged"], moved)
    shutil.copytree(tiny_models["sd-v"], base)
    settings = (moved / "settings.toml").read_text()
    (moved / "settings.toml").write_text(settings.replace(str(tiny_models["sd"]), str(base)))
    asked = ["--format", "kohya", "--output", tmp_path / "out"]
    assert f"{base}: not the model that {moved} was trained from any more" in refused(capsys, moved, *asked)
    run(moved, *asked, "--model", tiny_models["sd"])
    (moved / "settings.toml").write_text("[adapter]\nrank = 4\n")
    asked += ["--step", "last"]
    assert "do not say which base it was trained from" in refused(capsys, moved, *asked)
