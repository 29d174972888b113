"""What is predicted without weights, against what PyTorch's allocator gave out while the same was really done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from finetune import config, engine, shelf
from finetune.families import Source
from finetune.planning import blank, phases, tracking

FULL = "--weights bf16 --precision bf16 --optimizer-in-backward --max-grad-norm 0"
CASES = [("sd", "textual_inversion", ""), ("flux", "lora", "--quantize nf4 --gradient-checkpointing")]
SLOW = [
    ("sd", "lora", ""),
    ("sdxl", "lora", "--precision bf16 --gradient-checkpointing"),
    ("sdxl", "lora", "--quantize nf4"),
    ("sdxl", "lora", "--quantize int8 --precision bf16"),
    ("sd", "pivotal", ""),
    ("sdxl", "lora", "--offload-blocks"),
    ("sdxl", "lora", "--cache-kv --sample-every 5"),
    ("sd", "lora", "--cache-kv --gradient-checkpointing --precision bf16 --prior-from base --class-prompt dog"),
    ("flux", "lora", "--offload-blocks --gradient-checkpointing --precision bf16"),
    ("sd", "lora", "--gradient-checkpointing --checkpoint-share 0.5 --batch-size 2"),
    ("flux", "slider", "--target a --positive b --negative c"),
    ("sd", "lora", "--class-prompt dog --sample-every 5 --batch-size 2"),
    ("sd", "lora", "--gradient-checkpointing --text-encoder-lr 1e-5"),
    ("sd", "dreambooth", "--optimizer adamw8bit"),
    ("sd", "dreambooth", FULL),
    ("sdxl", "lora", "--no-fast"),
    ("sdxl", "dreambooth", "--gradient-checkpointing --ema 0.9"),
    ("sd3", "lora", "--batch-size 2 --gradient-checkpointing"),
    ("sd3", "dreambooth", "--precision bf16"),
    ("flux", "lora", "--precision bf16 --batch-size 2"),
    ("flux", "lora", "--rank 4 --dropout 0.1 --accumulation 2"),
    ("flux", "dreambooth", FULL),
]


@pytest.mark.parametrize(
    ("kind", "recipe", "words"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_predicted_peaks_are_those_measured(
    kind: str, recipe: str, words: str, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each phase within 10 %, and so the whole."""
    monkeypatch.setattr(engine, "device", lambda: "cpu")
    knows = recipe in ("lora", "dreambooth", "pivotal") and "--class-prompt" not in words
    prior = ["--no-prior"] if knows else []
    given = ["--output", "run", "--model", str(tiny_models[kind]), *prior, *words.split()]
    settings = config.parse(shelf.load(recipe).Config, given, "train")
    source, dtype = Source(**vars(settings.model)), engine.DTYPES[settings.train.precision]
    predicted = phases.imagined(settings, lambda: blank.family(source, dtype), (64, 64))
    measured = phases.measured(settings, source, (64, 64))
    assert predicted.peaks.keys() == measured.peaks.keys() >= {"encode", "train"}
    for name, peak in measured.peaks.items():
        assert predicted.peaks[name] == pytest.approx(peak, rel=0.1), name
    assert predicted.peak == pytest.approx(measured.peak, rel=0.1)
    assert predicted.flops > 0 and measured.seconds is not None and measured.seconds > 0


def test_what_is_held_and_given_back_is_counted_to_the_byte() -> None:
    with tracking.Live() as live:
        one = torch.zeros(1000)
        assert live.held == 4000
        view = one.view(10, 100)
        assert live.held == 4000
        product = view @ view.t()
        assert live.held == 4000 + 400
        del one, view
        assert live.held == 400
        assert live.peak == 4400
        assert live.work.flops == 2 * 10 * 10 * 100
        live.begin()
        assert live.peak == 400
        with live.without([product, product.t()]):
            assert live.held == 0
        assert live.held == 400
        del product
    assert live.held == 0


def test_without_data_the_same_is_counted_as_with_it() -> None:
    def work() -> None:
        layer = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        layer(torch.zeros(32, 64)).square().mean().backward()

    with tracking.imagined() as without:
        work()
    with tracking.Live() as having:
        work()
    assert without.peak == having.peak > 0
    assert tracking.measured(work, torch.device("cpu")) == pytest.approx(having.peak, rel=0.02)
