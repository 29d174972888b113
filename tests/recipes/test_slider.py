"""Sliders through the command line: trained without pictures, with a strength that has a sign."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from measured import batches
from PIL import Image
from torch.nn import functional as F

from finetune import adapters, cli, export, families, keys, loop, sampling, sliders, weights
from finetune.data import encoding, plan
from finetune.families import Family, Source
from finetune.pictures import read_settings
from finetune.settings import Adapter, Captions, Data, Framing, Loss, Slider
from finetune.toybox.judge import Judge

SETTINGS = Slider("a thing", "a red thing", "a blue thing", ("old", "new"), 2.0, target_images=3, target_steps=1)
WORDS = ["--target", "a thing", "--positive", "a red thing", "--negative", "a blue thing", "--eta", "3"]
QUICK = ["--target-images", "2", "--target-steps", "1", "--resolution", "64", "--tracker", "none"]
CASES = [("sdxl", "loha"), ("flux", "lokr")]
"""Beside LoRA on SD, which is the fixture `run`"""


def train(model: Path, output: Path, *flags: str) -> Path:
    cli.main(["train", "slider", "--model", str(model), "--output", str(output), *WORDS, *QUICK, *flags])
    return output


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> Path:
    flags = ["--steps", "8", "--lr", "5e-2", "--rank", "4", "--sample-every", "8", "--sample-steps", "2"]
    return train(tiny_models["sd"], tmp_path_factory.mktemp("slider") / "run", *flags, "--batch-size", "4")


def prepared(model: Path, method: str = "lora") -> tuple[Family, encoding.Encodings]:
    """A slider's data on a model whose adapter is no longer nothing."""
    source = Source(str(model))
    family = families.load(source)
    examples = sliders.examples(family, source, SETTINGS, 0, 64, lambda items, what, total: iter(items))
    items = plan(examples, Framing(), (64,), family.multiple())
    groups = adapters.adapt(family, Adapter(method, rank=2), 1e-3, None, 0)
    for number, parameter in enumerate(parameter for group in groups for parameter in group.parameters):
        parameter.data += 0.1 * keys.normal(tuple(parameter.shape), "some adapter", number)
    return family, encoding.encode(family, items, (), (), Data(use_cache=False), Captions())


@pytest.mark.parametrize(("kind", "method"), [("sd", "lora"), ("sd-v", "loha"), ("flux", "lora")])
@torch.no_grad()
def test_the_loss_is_that_of_the_paper(kind: str, method: str, tiny_models: dict[str, Path]) -> None:
    """At s of 1 and -1: prediction(s) against base(c) + s eta mean over p of (base(c+, p) - base(c-, p)), eq. 8."""
    family, data = prepared(tiny_models[kind], method)
    measure = loop.PictureLoss(family, data, Loss())
    seen = batches(data, 6)
    assert sorted(batch.strength for batch in seen) == [-1, 1] and sum(len(batch.captions) for batch in seen) == 6
    for batch in seen:
        noised = measure.objective.noised(batch.latents, batch.noise, batch.timesteps)

        def predicted(prompt: str, x: torch.Tensor = noised, batch: object = batch) -> torch.Tensor:
            told = family.encode_prompts([prompt] * len(x)) if data.texts is None else data.conditions(prompt)
            told = {name: value.expand(len(x), *value.shape[1:]) for name, value in told.items()}
            return family.predict(x, measure.objective.told(batch.timesteps), told, batch.sizes)  # type: ignore[attr-defined]

        with adapters.off(family):
            ends = [predicted(f"a red thing, {p}") - predicted(f"a blue thing, {p}") for p in ("old", "new")]
            target = predicted("a thing") + batch.strength * 2.0 * (ends[0] + ends[1]) / 2
        with adapters.at(family, batch.strength):
            ours, mine = measure(batch), predicted("a thing")
        torch.testing.assert_close(ours, F.mse_loss(mine, target, reduction="none").flatten(1).mean(1))
    with adapters.off(family):
        base = predicted("a thing")
    with adapters.at(family, 0):
        torch.testing.assert_close(predicted("a thing"), base)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_sliders_of_every_kind_train(kind: str, method: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """The recipe compares the file with the live model itself; what was frozen is what it was."""
    flags = ["--method", method, "--steps", "8", "--batch-size", "2", "--lr", "5e-2", "--rank", "4"]
    made = losses(train(tiny_models[kind], tmp_path / "run", *flags, "--seed", "1"))
    assert len(made) == 8 and sum(made[-2:]) < 0.9 * sum(made[:2]), made


def test_both_signs_are_learned(run: Path, tiny_models: dict[str, Path]) -> None:
    """Loaded back, strength 1 is nearer to the one end than the base is, -1 to the other."""
    family, source = families.load(Source(str(tiny_models["sd"]))), Source(str(tiny_models["sd"]))
    settings = Slider("a thing", "a red thing", "a blue thing", eta=3.0, target_images=2, target_steps=1)
    examples = sliders.examples(family, source, settings, 0, 64, lambda items, what, total: iter(items))
    items = plan(examples, Framing(), (64,), family.multiple())
    export.attach(family, run / "adapter.safetensors", "tuned")
    data = encoding.encode(family, items, (), (), Data(use_cache=False), Captions())
    measure = loop.PictureLoss(family, data, Loss())
    for batch in batches(data, 24):
        with torch.no_grad():
            told = []
            for strength in (batch.strength, 0, -batch.strength):
                with adapters.at(family, strength):
                    told.append(float(measure(batch).mean()))
        assert told[0] < told[1] < told[2]


def test_recomputed_activations_are_those_of_the_strength(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--steps", "2", "--batch-size", "2", "--lr", "1e-2"]
    plain = train(tiny_models["sd"], tmp_path / "plain", *flags)
    spared = train(tiny_models["sd"], tmp_path / "spared", *flags, "--gradient-checkpointing")
    one, two = (weights.load_tensors(made / "adapter.safetensors") for made in (plain, spared))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value)


def test_samples_show_it_at_its_strengths(run: Path) -> None:
    samples = sorted((run / "samples").iterdir())
    assert [read_settings(file)["scale"] for file in samples] == [-2, -1, 0, 1, 2]
    assert {(told := read_settings(file))["prompt"] + str(told["seed"]) for file in samples} == {"a thing0"}
    assert len({file.read_bytes() for file in samples}) == 5


def test_strengths_below_zero_are_drawn(run: Path, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """By `generate` and `grid`, whose tests have it that 0 is the base."""
    words = ["--model", str(tiny_models["sd"]), "--prompt", "a thing", "--steps", "2"]
    adapter = ["--adapter", str(run / "adapter.safetensors")]
    made = {}
    for scale in ("-1.5", "0"):
        cli.main(["generate", *words, *adapter, "--scale", scale, "--output", str(tmp_path / scale)])
        made[scale] = next((tmp_path / scale).glob("*.png"))
    below, none = (np.asarray(Image.open(file)).astype(int) for file in made.values())
    assert np.abs(below - none).max() > 1
    assert read_settings(made["-1.5"])["adapters"][0]["scale"] == -1.5
    sheet = tmp_path / "grid.png"
    cli.main(["grid", *words, *adapter, "--scale", "-2", "0", "2", "--output", str(sheet)])
    assert Image.open(sheet).width > 3 * 64


def test_its_header_says_what_it_is(
    run: Path, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["export", str(run), "--format", "kohya", "--output", str(tmp_path / "files")])
    for file in (run / "adapter.safetensors", next((tmp_path / "files").glob("*.safetensors"))):
        told = weights.read_metadata(file)
        assert told["modelspec.tags"] == "slider" and "modelspec.trigger_phrase" not in told
        assert 'above 0 lead to "a red thing", below 0 to "a blue thing"' in told["modelspec.usage_hint"]
        assert told["modelspec.title"].startswith("from a blue thing to a red thing")
        own = json.loads(told["finetune"])
        assert (own["target"], own["positive"], own["eta"]) == ("a thing", "a red thing", 3.0)
    capsys.readouterr()
    cli.main(["verify", str(run / "adapter.safetensors"), "--model", str(tiny_models["sd"]), "--clients", "diffusers"])
    cli.main(["inspect", str(run / "adapter.safetensors"), "--json"])
    assert '"trigger": null' in capsys.readouterr().out


def test_it_is_published_with_both_directions(run: Path, tmp_path: Path) -> None:
    words = ["--output", str(tmp_path / "out"), "--steps", "1", "--seed", "3"]
    cli.main(["publish", str(run), "--repo", "someone/red-slider", *words, "--title", "Red"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'strengths above 0 lead to "a red thing", below 0 to "a blue thing"' in card and "- slider" in card
    strip = Image.open(tmp_path / "out" / "images" / "strength.png")
    assert strip.width > 5 * 64 and read_settings(tmp_path / "out" / "images" / "01-seed3.png")["prompt"] == "a thing"


def test_it_is_not_evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", str(run)])
    assert stop.value.code == 2 and "a slider" in capsys.readouterr().err
    assert (run / "report.html").is_file()


@pytest.mark.slow
def test_toyboxs_slider_leads_from_its_one_end_to_the_other(tmp_path: Path) -> None:
    """As toybox's judge sees it: the further the strength, the more the one prompt, and the cup stays a cup."""
    ends = "a photo of a cup at night", "a photo of a cup in the snow"
    words = ["--target", "a photo of a cup", "--positive", ends[0], "--negative", ends[1], "--tracker", "none"]
    cli.main(["train", "slider", "--config", "slider-toybox-attribute", "--output", str(tmp_path / "run"), *words])
    family, strengths = families.load(Source("toybox")), (-2.0, -1.0, 0.0, 1.0, 2.0)
    export.attach(family, tmp_path / "run" / "adapter.safetensors", "slider")
    judge, apart, scenes = Judge.load(), [], []
    for strength in strengths:
        export.set_strengths(family, {"slider": strength})
        drawn = sampling.sample(family, ["a photo of a cup"] * 8, range(8), steps=20, guidance=2.0, batch=8)
        apart.append(judge.prompt(drawn, [ends[0]] * 8) - judge.prompt(drawn, [ends[1]] * 8))
        seen = judge.read(drawn)
        scenes.append([one["scene"] for one in seen])
        assert [one["noun"] for one in seen].count("cup") >= 7
    print(apart, scenes)
    assert all(later > earlier for earlier, later in itertools.pairwise(apart[:4])) and apart[4] > apart[2] + 0.1
    assert scenes[0].count("in the snow") >= 6 and scenes[4].count("at night") >= 6


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--positive", " "], "--positive: missing"),
        (["--positive", "a thing", "--negative", "A thing"], "no direction between them"),
        (["--preserve", "old", ""], "--preserve: an empty one"),
        (["--eta", "-1"], "let the two prompts change places"),
        (["--target-images", "0"], "--target-images 0"),
        (["--method", "dora"], "Methods that have: lora, loha, lokr"),
        (["--method", "ia3"], "--method ia3"),
        (["--method", "oft"], "--method oft"),
        (["--strengths"], "--strengths"),
    ],
)
def test_what_is_no_slider_is_refused(
    flags: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, *QUICK]
    given = {flag: value for flag, value in zip(words[::2], words[1::2], strict=True) if flag not in flags}
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "slider", "--model", "no-such/model", "--output", str(tmp_path / "run"),
                  *(word for pair in given.items() for word in pair), *flags])  # fmt: skip
    assert stop.value.code == 2 and expected in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
