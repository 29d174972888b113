"""The recipes through the command line: every family x recipe x precision trains, exports and loads back."""

from __future__ import annotations

import gc
import json
import tomllib
from pathlib import Path
from weakref import WeakSet

import foreign
import measured
import pytest
import tiny
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel

from finetune import cli, export, families, loop
from finetune.data import read_plain
from finetune.families import Source
from finetune.pictures import read_settings

KINDS = list(tiny.KINDS)
RANK = ["--rank", "4", "--alpha", "8", "--lr", "5e-2"]
FLAGS = {
    "dreambooth": ["--lr", "2e-3"],
    "lora": RANK,
    "dreambooth --parts kv norm": ["--lr", "1e-2"],
    "dreambooth --parts attention": ["--lr", "1e-2"],
    "lora --method dora": ["--rank", "4", "--alpha", "8", "--lr", "2e-1"],
    "lora --conv-rank 2": [*RANK, "--rank-pattern", "attn2=2"],
    "lora --init pissa": RANK,
    "lora --method loha": RANK,
    "lora --method loha --conv-rank 2": RANK,
    "lora --method lokr": RANK,
    "lora --method oft": ["--rank", "4", "--lr", "2e-1"],
    "lora --method boft": ["--rank", "4", "--lr", "2e-1"],
    "lora --method ia3": ["--lr", "5e-1"],
    "lora --quantize nf4": RANK,
    "lora --quantize int8": RANK,
    "lora --method oft --quantize int8": ["--rank", "4", "--lr", "2e-1"],
    "textual_inversion": ["--word", "sks", "--lr", "5e-1"],
    "pivotal": [*RANK, "--word", "sks", "--word-lr", "5e-1"],
    "pivotal --method loha": [*RANK, "--word", "sks", "--text-encoder-lr", "1e-2", "--adapter-from", "0.2"],
}
"""A recipe, its method, and what is set beside it"""
TURNED = ["--rank", "4", "--lr", "2e-1", "--text-encoder-lr", "2e-1", "--batch-size", "24"]
OWN = {
    ("sdxl", "dreambooth --parts attention"): ["--lr", "1e-1", "--batch-size", "3"],
    ("sdxl", "lora --method oft"): TURNED,
    ("sdxl", "lora --method boft"): TURNED,
    ("sdxl", "lora --method ia3"): ["--lr", "5e-1", "--text-encoder-lr", "5e-1", "--batch-size", "24"],
    ("sdxl", "lora --method oft --quantize int8"): TURNED,
}
"""What is set instead. Of the tiny SDXL attention is heard little: turned at random it changes the answer by 0.15 of
its norm, SD's by 0.35. So a rate that moves full weights further; and, for what can only turn or scale, the text
encoders too, and more pictures: in 24 steps of three the noise of the draws outweighs what there is to gain."""
UNETS = ["sd", "sd-v", "sdxl"]
OF_UNETS = [name for name in FLAGS if any(part in name for part in ("--conv-rank", "kv", "textual", "pivotal"))]
FAST = {
    *(("sd", name, "bf16") for name in FLAGS),
    *((kind, "lora", "fp32") for kind in KINDS),
    *((kind, "dreambooth", "bf16") for kind in KINDS),
    *(("sdxl", "lora --conv-rank 2", "fp32"), ("sd3", "lora --method loha", "fp32")),
    *(("flux", "lora --method boft", "fp32"), ("klein", "lora --method dora", "fp32")),
    *(("zimage", "lora --init pissa", "fp32"), ("sdxl", "pivotal", "fp32")),
    *(("flux", "lora --quantize nf4", "bf16"), ("sd3", "lora --quantize int8", "fp32")),
}
"""All methods of one family, and one method of each; the rest is slow. `test_methods_in_files` has each of each."""
SLOWER = {("zimage", name, "fp32") for name in FLAGS}
SLOWER |= {("sdxl", "pivotal", "fp32")}
"""What these few steps change little at the rates above; and all that is not fast"""
LITTLE = {"textual_inversion": 0.9999, "pivotal --method loha": 0.995}
"""To which share the loss falls where words that a random text encoder reads are all that trains, or most of it"""
CASES = [
    pytest.param(kind, name, how, marks=[] if (kind, name, how) in FAST else pytest.mark.slow)
    for kind in KINDS
    for name in FLAGS
    for how in ("fp32", "bf16")
    if kind in UNETS or name not in OF_UNETS
]
FOREIGN = ("loha", "lokr", "oft", "boft", "ia3")
"""Methods whose files diffusers does not load"""
RANKS = {"lora --conv-rank 2": (2, 4), "lora --init pissa": (8, 16)}
"""Where most layers of the file have another rank and alpha than was set"""
VAE_FILE = "diffusion_pytorch_model.safetensors"
PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three plain pictures of different shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, (size, colour) in enumerate([((80, 64), "red"), ((64, 64), "orange"), ((64, 100), "brown")]):
        Image.new("RGB", size, colour).save(folder / f"{number}.png")
    return folder


def train(recipe: str, model: Path, pictures: Path, output: Path, *flags: str) -> Path:
    """Run a recipe as a user does; the run's folder."""
    prior = ["--class-prompt", "a photo of a dog", "--class-images", "2", "--class-steps", "2"]
    prior = [] if recipe == "textual_inversion" else prior
    given = ["--model", str(model), "--data", str(pictures), "--prompt", PROMPT, "--output", str(output), *prior]
    given += ["--resolution", "64"]
    quiet = [] if "--tracker" in flags else ["--tracker", "none"]
    usual = [] if "--lr" in flags else FLAGS[recipe]
    cli.main(["train", *recipe.split(), *given, *quiet, *usual, *flags])
    return output


def log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def loss_on(pipeline: DiffusionPipeline, pictures: Path) -> float:
    """Loss of a pipeline on the training pictures, always with the same noise and timesteps."""
    family = families.wrap(pipeline)
    families.freeze(family)
    return measured.loss(family, measured.encoded(family, read_plain(pictures, PROMPT)))


@pytest.mark.parametrize(("kind", "recipe", "precision"), CASES)
def test_every_family_trains_with_every_recipe(
    kind: str, recipe: str, precision: str, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """The recipe compares each file with the live model itself; here plain diffusers loads it and finds it better."""
    own = OWN.get((kind, recipe), ["--batch-size", "3"])
    run = train(recipe, tiny_models[kind], pictures, tmp_path / "run", "--steps", "24", "--precision", precision, *own)
    assert [entry["step"] for entry in log(run)] == list(range(1, 25))
    base = DiffusionPipeline.from_pretrained(tiny_models[kind])
    before = loss_on(base, pictures)
    tuned = DiffusionPipeline.from_pretrained(tiny_models[kind])
    if (run / "sks.safetensors").exists():
        foreign.load_word(tuned, run / "sks.safetensors")
    if any(kind in recipe for kind in FOREIGN):
        export.attach(families.wrap(tuned), run / "adapter.safetensors", "tuned")
    elif recipe.startswith(("lora", "pivotal")):
        tuned.load_lora_weights(run / "adapter.safetensors")
        carried = families.denoiser(families.wrap(tuned)).peft_config["default_0"]
        assert (carried.r, carried.lora_alpha) == RANKS.get(recipe, (4, 8))
    elif recipe.startswith("dreambooth"):
        tuned = DiffusionPipeline.from_pretrained(run / "model", dtype=torch.float32)
    falls = LITTLE.get(recipe, 0.95 if (kind, recipe, precision) in FAST - SLOWER else 0.995)
    assert loss_on(tuned, pictures) < falls * before
    settings = tomllib.loads((run / "settings.toml").read_text())
    assert settings["train"]["precision"] == precision


def test_two_runs_write_the_same_bytes(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        run = train("lora", tiny_models["sd"], pictures, tmp_path / name, "--steps", "4", "--dropout", "0.3")
        files.append((run / "adapter.safetensors").read_bytes())
        torch.randn(7)  # what else a process draws has no part in it
    assert files[0] == files[1]
    other = train("lora", tiny_models["sd"], pictures, tmp_path / "three", "--steps", "4", "--seed", "1")
    assert (other / "adapter.safetensors").read_bytes() != files[0]


def test_the_settings_of_a_run_run_it_again(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    run = train("lora", tiny_models["sd"], pictures, tmp_path / "one", "--steps", "3", "--text-encoder-lr", "1e-3")
    again = tmp_path / "again"
    cli.main(["train", "--config", str(run / "settings.toml"), "--output", str(again)])
    assert (again / "adapter.safetensors").read_bytes() == (run / "adapter.safetensors").read_bytes()
    names = set(load_file(again / "adapter.safetensors"))
    assert any(name.startswith("text_encoder.text_model.") for name in names)


def test_the_vae_and_the_text_encoder_are_out_of_memory_while_training(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples in between bring them back; they go again."""
    alive: list[int] = []
    gc.collect()
    before = WeakSet(thing for thing in gc.get_objects() if isinstance(thing, AutoencoderKL | CLIPTextModel))
    step = loop._accumulate

    def watched(*given: object) -> float:
        gc.collect()
        parts = [thing for thing in gc.get_objects() if isinstance(thing, AutoencoderKL | CLIPTextModel)]
        alive.append(sum(part not in before for part in parts))
        return step(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_accumulate", watched)
    flags = ("--steps", "4", "--sample-every", "2", "--sample-steps", "2")
    run = train("lora", tiny_models["sd"], pictures, tmp_path / "run", *flags)
    assert alive == [0, 0, 0, 0]
    samples = sorted((run / "samples").iterdir())
    assert [file.name for file in samples] == ["step-000002-0.png", "step-000004-0.png"]
    told = read_settings(samples[0])
    assert (told["prompt"], told["step"], told["steps"], told["guidance"]) == (PROMPT, 2, 2, 5.0)


@pytest.mark.parametrize(("recipe", "saved"), [("lora", "adapter-000002.safetensors"), ("dreambooth", "model-000002")])
def test_saving_on_the_way_changes_nothing(
    recipe: str, saved: str, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    watched = train(
        recipe, tiny_models["sd"], pictures, tmp_path / "a",
        "--steps", "4", "--save-every", "2", "--sample-every", "3", "--sample-steps", "1",
    )  # fmt: skip
    plain = train(recipe, tiny_models["sd"], pictures, tmp_path / "b", "--steps", "4")
    assert (watched / saved).exists()
    assert [entry["loss"] for entry in log(watched)] == [entry["loss"] for entry in log(plain)]


def test_dreambooth_with_an_8_bit_optimizer_on_the_cpu(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    flags = ("--steps", "12", "--batch-size", "3", "--optimizer", "adamw8bit", "--accumulation", "2")
    run = train("dreambooth", tiny_models["sd"], pictures, tmp_path / "run", *flags)
    before = loss_on(DiffusionPipeline.from_pretrained(tiny_models["sd"]), pictures)
    tuned = DiffusionPipeline.from_pretrained(run / "model")
    frozen, kept = (load_file(root / "vae" / VAE_FILE) for root in (tiny_models["sd"], run / "model"))
    assert all(torch.equal(value, kept[name]) for name, value in frozen.items())
    assert loss_on(tuned, pictures) < 0.95 * before


def test_the_summary_says_what_is_going_to_happen(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("lora", tiny_models["sd"], pictures, tmp_path / "run", "--steps", "6", "--batch-size", "2")
    said = " ".join(capsys.readouterr().out.split())
    for part in ("unet", "text_encoder", "3 pictures", "6 of 2 pictures: 4.0 epochs", "adamw, fp32, cpu", "seed 0"):
        assert part in said
    assert "left" in said.partition("step 5/6 loss ")[2].partition("step 6/6")[0]
    assert "finetune generate" in said
    assert str(run / "adapter.safetensors") in said.replace(" ", "") or "adapter.safetensors" in said


def test_an_output_folder_that_is_in_use_is_left_alone(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        train("lora", tiny_models["sd"], pictures, tmp_path / "run")
    assert stop.value.code == 2
    assert "--output" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["precious.txt"]


def test_fp16_is_refused_without_a_gpu(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        train("lora", tiny_models["sd"], pictures, tmp_path / "run", "--precision", "fp16")
    assert "needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_curves(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    run = train("lora", tiny_models["sd"], pictures, tmp_path / "run", "--steps", "2", "--tracker", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(path.parent for path in run.rglob("events.out*"))))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert events.Scalars("loss")[0].value == pytest.approx(log(run)[0]["loss"])


def test_an_engine_that_was_made_before_does_not_matter(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    Accelerator(cpu=True)
    run = train("lora", tiny_models["sd"], pictures, tmp_path / "run", "--steps", "1", "--precision", "bf16")
    assert len(log(run)) == 1


def test_sources_are_told_apart(tiny_models: dict[str, Path]) -> None:
    assert len({Source(str(tiny_models[kind])).identity() for kind in KINDS}) == len(KINDS)
