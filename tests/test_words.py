"""New words (textual inversion, pivotal tuning) through the command line: what trains and when, files, faults."""

from __future__ import annotations

import json
from pathlib import Path

import foreign
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image as Images
from safetensors import safe_open
from safetensors.torch import load_file

from finetune import families, loop
from finetune import words as new_words
from finetune.cli import main
from finetune.families import Source
from finetune.pictures import read_settings
from finetune.settings import Words

PROMPT = "a photo of sks dog"
NAMES = {"sd": {"sks": "text_encoder"}, "sdxl": {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}}
"""What the tensors of a file are called, and whose they are"""
PIVOT = ["--rank", "4", "--no-prior", "--lr", "1e-2", "--word-lr", "1e-1", "--word-until", "0.5"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(("red", "orange")):
        Images.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
    return folder


def train(recipe: str, model: Path, pictures: Path, output: Path, *more: str) -> Path:
    given = ["--model", str(model), "--data", str(pictures), "--output", str(output), "--tracker", "none"]
    given += [] if "--prompt" in more else ["--prompt", PROMPT]
    given += [] if {"--word", "--trigger"} & set(more) else ["--word", "sks"]
    main(["train", recipe, *given, *more])
    return output


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_what_trains_and_when(
    kind: str, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the word's vectors alone, then the adapter alone; the other's gradients are not made, and nothing of it
    moves or is counted."""
    seen: list[set[str]] = []
    states: list[tuple[dict[str, torch.Tensor], set[str], float]] = []
    tables: list[torch.Tensor] = []
    step, clip = loop.Training._step, loop.Training._clip

    def clipped(self: loop.Training) -> float:
        held = {name for name, p in self.model.parts.named_parameters() if p.grad is not None}
        seen.append({"word" if name.endswith(".rows") else "adapter" if "lora_" in name else name for name in held})
        return clip(self)

    def watched(self: loop.Training) -> loop.Report:
        layers = list(new_words.taught(self.whole.family).values())
        tables[:] = tables or [layer.weight.clone() for layer in layers]
        report = step(self)
        values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        stepped = {name for name, parameter in self.parameters.items() if self.optimizer.state[parameter]}
        states.append((values, stepped, report.lr))
        assert all(torch.equal(layer.weight, table) for layer, table in zip(layers, tables, strict=True))
        assert all(p.requires_grad for p in self.parameters.values())
        return report

    monkeypatch.setattr(loop.Training, "_clip", clipped)
    monkeypatch.setattr(loop.Training, "_step", watched)
    train("pivotal", tiny_models[kind], pictures, tmp_path / "run", "--steps", "4", *PIVOT)
    assert seen == [{"word"}, {"word"}, {"adapter"}, {"adapter"}]
    assert [rate for *_, rate in states] == [0.1, 0.1, 0.01, 0.01]
    for number, moving in ((1, "rows"), (2, "lora_"), (3, "lora_")):
        before, after = states[number - 1][0], states[number][0]
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and all(moving in name for name in moved)
    assert states[1][1] and all(name.endswith(".rows") for name in states[1][1])
    assert (tmp_path / "run" / "adapter.safetensors").is_file() and (tmp_path / "run" / "sks.safetensors").is_file()


@pytest.mark.parametrize(
    ("recipe", "kind", "more"),
    [
        ("textual_inversion", "sd", ["--vectors", "12", "--lr", "1e-1"]),
        ("textual_inversion", "sdxl", ["--vectors", "1", "--init-words", "d", "--lr", "1e-1"]),
        ("pivotal", "sd", [*PIVOT, "--text-encoder-lr", "1e-2"]),
        ("pivotal", "sdxl", PIVOT),
    ],
)
def test_a_sample_is_the_picture_of_plain_diffusers_with_the_files(
    recipe: str, kind: str, more: list[str], tiny_models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """And the one that `finetune generate` draws with them."""
    drawn = ["--steps", "2", "--sample-every", "2", "--sample-steps", "2", "--sample-guidance", "3"]
    run = train(recipe, tiny_models[kind], pictures, tmp_path / "run", *drawn, *more)
    sample = run / "samples" / "step-000002-0.png"
    told = read_settings(sample)
    file, adapter = run / "sks.safetensors", run / "adapter.safetensors"
    tensors = load_file(file)
    assert tensors.keys() == NAMES[kind].keys()
    assert {len(one) for one in tensors.values()} == {int(more[1]) if more[0] == "--vectors" else 4}
    pipeline = DiffusionPipeline.from_pretrained(tiny_models[kind])
    foreign.load_word(pipeline, file)
    if adapter.exists():
        pipeline.load_lora_weights(adapter)
    generator = torch.Generator("cpu").manual_seed(told["seed"])
    asked = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0}
    plain = np.asarray(pipeline(told["prompt"], generator=generator, **asked).images[0]).astype(int)
    assert np.abs(plain - np.asarray(Images.open(sample)).astype(int)).max() <= 1
    words = ["--model", str(tiny_models[kind]), "--embedding", str(file), "--prompt", told["prompt"]]
    words += ["--adapter", str(adapter)] if adapter.exists() else []
    words += ["--steps", "2", "--guidance", "3", "--seed", str(told["seed"]), "--output", str(tmp_path / "drawn")]
    main(["generate", *words])
    [picture] = (tmp_path / "drawn").glob("*.png")
    assert np.abs(plain - np.asarray(Images.open(picture)).astype(int)).max() <= 1


def test_several_words_each_become_a_file(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    flags = ["--word", "sks", "neon-style", "--prompt", "sks dog, neon-style", "--steps", "2", "--save-every", "1"]
    run = train("textual_inversion", tiny_models["sd"], pictures, tmp_path / "run", *flags, "--lr", "1e-1")
    for word in ("sks", "neon-style"):
        assert [*load_file(run / f"{word}.safetensors")] == [word]
        assert (run / f"{word}-000001.safetensors").is_file()
    with safe_open(run / "neon-style.safetensors", "pt") as opened:
        header = opened.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert header["modelspec.trigger_phrase"] == "neon-style" and str(tmp_path) not in json.dumps(header)
    pipeline = DiffusionPipeline.from_pretrained(tiny_models["sd"])
    for word in ("sks", "neon-style"):
        foreign.load_word(pipeline, run / f"{word}.safetensors")
    assert len(pipeline.tokenizer) == 514 + 8


def test_export_brings_the_words_with_the_adapter(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("pivotal", tiny_models["sd"], pictures, tmp_path / "run", "--steps", "4", *PIVOT,
                "--checkpoint-every", "2", "--keep-last", "4")  # fmt: skip
    main(["export", str(run), "--format", "kohya", "merged", "--output", str(tmp_path / "end")])
    assert sorted(path.name for path in (tmp_path / "end").iterdir()) == [
        "run-kohya.safetensors", "run-merged", "sks.safetensors",
    ]  # fmt: skip
    assert torch.equal(*(load_file(folder / "sks.safetensors")["sks"] for folder in (run, tmp_path / "end")))
    whole = DiffusionPipeline.from_pretrained(tmp_path / "end" / "run-merged")
    assert whole.tokenizer.tokenize(whole.maybe_convert_prompt("sks", whole.tokenizer))[-1] == "sks_3"
    main(["export", str(run), "--step", "2", "--format", "embedding", "--output", str(tmp_path / "early")])
    early = load_file(tmp_path / "early" / "sks.safetensors")["sks"]
    assert torch.equal(early, load_file(run / "sks.safetensors")["sks"])  # held since then
    assert [path.name for path in (tmp_path / "early").iterdir()] == ["sks.safetensors"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run), "--format", "single-file", "--output", str(tmp_path / "whole")])
    assert stop.value.code == 2 and "no place for new words" in capsys.readouterr().err
    page = (run / "report.html").read_text()
    assert f"--embedding {run}/sks.safetensors" in page and "embedding:sks" in page
    assert f"finetune publish {run}" in page
    main(["inspect", str(run / "adapter.safetensors")])
    assert "goes with sks.safetensors" in capsys.readouterr().out
    main(["inspect", str(run / "sks.safetensors"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["what"], told["words"], told["trigger"]) == ("textual inversion", ["sks"], "sks")


def test_a_word_begins_as_words_of_the_base(tiny_models: dict[str, Path]) -> None:
    """Two words share out three vectors; without any it is as far out as the base's own are, and the same each time."""
    family = families.load(Source(str(tiny_models["sdxl"])))
    own = {name: encoder.get_input_embeddings().weight for name, encoder in families.text_encoders(family).items()}
    ids = [family.pipeline.tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "ab"]
    new_words.teach(family, ["sks"], Words(vectors=3, init_words="a b"), seed=0)
    for name, vectors in new_words.vectors(family, ["sks"])["sks"].items():
        assert torch.equal(vectors, own[name][[ids[0], ids[0], ids[1]]])
    drawn = []
    for seed in (0, 0, 1):
        family = families.load(Source(str(tiny_models["sd"])))
        new_words.teach(family, ["sks"], Words(vectors=75), seed)
        drawn.append(new_words.vectors(family, ["sks"])["sks"]["text_encoder"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].std().item() == pytest.approx(own["text_encoder"].std().item(), rel=0.2)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--vectors", "0"], "--vectors 0: from 1 to 75"),
        (["--vectors", "76"], "--vectors 76: from 1 to 75"),
        (["--vectors", "70"], "has no room for the 70 vectors of sks"),
        (["--word", "Sks"], "--word Sks: small letters"),
        (["--word", "<sks>"], "--word <sks>: small letters"),
        (["--word", "sks_1"], "not ending in _ and a number"),
        (["--word", "d", "--prompt", "a photo of d"], "--word d: d is a word of this model's text encoder already"),
        (["--word", "cat"], "--word cat: no caption has it"),
        (["--word", "sks", "--prompt", "sks dog of SKS"], "in capitals"),
        (["--word", "sks", "--prompt", "sks dog, musks"], "found inside other words"),
        (["--word", "sks", "sksy", "--prompt", "sks sksy"], "holds the word sks"),
        (["--init-words", "dog"], "dog is no word of this model's text encoder, which spells it in 3 pieces"),
        (["--init-words", "a b c d e"], "5 words for 4 vectors"),
        (["--text-encoder-lr", "1e-4"], "train the recipe pivotal"),
        (["--trigger", "sks", "--word", ""], "--word : small letters"),
    ],
)
def test_words_that_cannot_be_taught_are_refused(
    flags: list[str],
    expected: str,
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        train("textual_inversion", tiny_models["sd"], pictures, tmp_path / "run", *flags)
    assert stop.value.code == 2 and expected in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_more_chunks_of_text_have_more_room(
    tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--vectors", "4", "--prompt", f"{'a dog ' * 20}sks", "--steps", "1"]  # each letter is a token here
    with pytest.raises(SystemExit) as stop:
        train("textual_inversion", tiny_models["sd"], pictures, tmp_path / "run", *flags)
    said = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and "has no room for the 4 vectors of sks: a prompt has 75 in all" in said
    train("textual_inversion", tiny_models["sd"], pictures, tmp_path / "run", *flags, "--text-chunks", "3")
    assert (tmp_path / "run" / "sks.safetensors").is_file()


@pytest.mark.parametrize("kind", ["sd3", "flux", "klein", "zimage"])
def test_families_that_are_taught_no_words_say_why(
    kind: str, tiny_models: dict[str, Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train("textual_inversion", tiny_models[kind], pictures, tmp_path / "run")
    assert stop.value.code == 2 and "train the recipe lora" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--word-until", "0"], "shares of the steps"),
        (["--adapter-from", "1"], "shares of the steps"),
        (["--word-until", "0.3"], "nothing would train in between"),
        (["--optimizer", "prodigy", "--lr", "1"], "Say --word-lr 1"),
    ],
)
def test_parts_of_a_run_that_cannot_be_are_refused(
    flags: list[str],
    expected: str,
    tiny_models: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        train("pivotal", tiny_models["sd"], pictures, tmp_path / "run", "--no-prior", *flags)
    assert stop.value.code == 2 and expected in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
