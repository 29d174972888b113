"""A checkpoint widened for inpainting predicts what it did, whatever it is told, until it is trained."""

from __future__ import annotations

import pytest
import tiny
import torch

from finetune import families, keys
from finetune.errors import Fault
from finetune.families import widened


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_it_predicts_as_before_and_its_new_weights_can_learn(kind: str) -> None:
    family = families.wrap(tiny.pipeline(kind))
    made = widened.inpainting(family)
    assert type(made.pipeline).__name__.endswith("InpaintPipeline") and families.takes_mask(made)
    assert families.denoiser(family).config.in_channels == 4, "the given one stays as it is"
    noised, beside = (keys.normal((2, channels, 8, 8), 0, name) for name, channels in (("noised", 4), ("beside", 5)))
    conditions, sizes = family.encode_prompts(["a", "b"]), torch.full((2, 6), 64.0)
    for parameter in families.denoiser(made).conv_in.parameters():
        parameter.requires_grad_(True)
    told = conditions | {families.BESIDE: beside}
    ours = made.predict(noised, torch.tensor([9, 700]), told, sizes)
    with torch.no_grad():
        torch.testing.assert_close(ours, family.predict(noised, torch.tensor([9, 700]), conditions, sizes))
    ours.square().sum().backward()
    gradient = families.denoiser(made).conv_in.weight.grad
    assert gradient[:, 4:].abs().sum() > 0


@pytest.mark.parametrize("kind", ["flux", "sd-inpainting"])
def test_others_are_refused(kind: str) -> None:
    with pytest.raises(Fault, match="is made of a plain one of SD"):
        widened.inpainting(families.wrap(tiny.pipeline(kind)))
