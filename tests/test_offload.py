"""Blocks in the CPU's memory: the same training to the bit, two blocks at a time, and what is refused.

Without a GPU a block is brought as a copy beside the weights that stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune import adapters, checkpoints, cli, families, fast, offload
from finetune.families import Family, Source
from finetune.settings import Adapter


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(["red", "orange"]):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights begin at round addresses, as on a GPU and as copies do: the CPU's kernels round by it, and in a file's
    memory they stand anyhow."""
    load = Source.load

    def loaded(self: Source, *given: Any, **named: Any) -> Any:
        pipeline = load(self, *given, **named)
        for part in pipeline.components.values():
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                parameter.data = parameter.data.clone()
        return pipeline

    monkeypatch.setattr(Source, "load", loaded)


def train(model: Path, pictures: Path, output: Path, *flags: str) -> Path:
    given = ["--model", str(model), "--data", str(pictures), "--output", str(output), "--tracker", "none"]
    given += ["--resolution", "64", "--prompt", "sks dog", "--no-prior", "--no-report", "--rank", "2"]
    cli.main(["train", "lora", *given, "--steps", "2", "--lr", "1e-2", "--checkpoint-every", "1", *flags])
    return output


def test_a_run_is_the_same_to_the_bit_and_resumes(tiny_models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    """With pictures drawn on the way; gone on without offloading, which changes nothing that is trained."""
    drawn = ["--sample-every", "1", "--sample-steps", "1"]
    plain, own = (
        train(tiny_models["sdxl"], pictures, tmp_path / name, *drawn, *flags)
        for name, flags in (("plain", ()), ("own", ("--offload-blocks",)))
    )
    expected, weights = (load_file(run / "adapter.safetensors") for run in (plain, own))
    assert expected.keys() == weights.keys() and all(torch.equal(expected[name], weights[name]) for name in weights)
    picture = "samples/step-000002-0.png"
    assert (own / picture).read_bytes() == (plain / picture).read_bytes()
    shutil.rmtree(own / checkpoints.name(2))
    (own / "adapter.safetensors").unlink()
    told = json.loads((own / "run.json").read_text())
    (own / "run.json").write_text(json.dumps({**told, "state": "stopped", "step": 1}))
    cli.main(["train", "--output", str(own), "--resume", "--no-offload-blocks"])
    again = load_file(own / "adapter.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_gradients_are_the_same_and_two_blocks_are_held(
    kind: str, checkpointing: bool, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: list[offload.Block] = []
    bring = offload.Belt._bring

    def watched(self: offload.Belt, block: offload.Block) -> offload._Copies:
        brought.append(block)
        assert len(self.here) < 2
        return bring(self, block)

    monkeypatch.setattr(offload.Belt, "_bring", watched)
    gradients, count, forward = {}, 0, 0
    for offloaded in (False, True):
        family = families.load(Source(str(tiny_models[kind]), offload_blocks=offloaded))
        (group,) = adapters.adapt(family, Adapter(rank=2), 1e-3, None, 0)
        fast.put_on(family)
        denoiser = families.denoiser(family)
        denoiser.train()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        for _ in range(2):
            brought.clear()
            loss = predict(family).square().mean()
            forward = len(brought)
            loss.backward()
        gradients[offloaded] = [parameter.grad for parameter in group.parameters]
        count = len(families.blocks(family))
        held = offload.weights(denoiser)
        assert len(held) == len({id(weight) for weight in held}) == (len(list(frozen(family))) if offloaded else 0)
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))
    # Each once, as it is brought while the one before it computes; what the last pass ended with is there still.
    assert forward in (count - 1, count - 2) and len({*brought[:forward]}) == forward
    assert len(brought) - forward == len({*brought[forward:]}) == count - 1


def predict(family: Family) -> torch.Tensor:
    """Of two pictures of noise."""
    drawn = torch.Generator().manual_seed(0)
    noised = torch.randn(2, family.latents()[0], 8, 8, generator=drawn)
    shapes = family.condition_shapes()
    told = {name: torch.randn(2, *shape, generator=drawn) for name, shape in shapes.items()}
    return family.predict(noised, torch.tensor([10.0, 500.0]), told, torch.ones(2, 6))


def frozen(family: Family) -> list[torch.Tensor]:
    return [p for block in families.blocks(family) for p in block.parameters() if not p.requires_grad]


def test_blocks_stay_where_they_are_when_a_pipeline_is_moved(tiny_models: dict[str, Path]) -> None:
    family = families.load(Source(str(tiny_models["sd"]), offload_blocks=True))
    family.pipeline.to("meta")
    denoiser = families.denoiser(family)
    assert {p.device.type for p in offload.weights(denoiser)} == {"cpu"}
    assert {p.device.type for name, p in denoiser.named_parameters() if name.startswith("conv_in")} == {"meta"}


@pytest.mark.parametrize(
    ("recipe", "flags", "said"),
    [
        ("lora", ["--quantize", "nf4"], "--offload-blocks --quantize nf4"),
        ("dreambooth", [], "the base's own weights train here"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(
    recipe: str, flags: list[str], said: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", recipe, "--data", str(pictures), "--prompt", "sks dog", "--no-prior", "--tracker", "none"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--output", str(tmp_path / "run"), "--offload-blocks", *flags])
    assert stop.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
