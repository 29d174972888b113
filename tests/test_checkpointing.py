"""Recomputing a share of the blocks: which, that nothing but memory changes, and what is no share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import adapters, checkpointing, cli, families
from finetune.families import Source
from finetune.settings import Adapter


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_the_outermost_blocks_are_computed_again_and_gradients_stay(
    kind: str, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = families.load(Source(str(tiny_models[kind])))
    (group,) = adapters.adapt(family, Adapter(rank=2), 1e-3, None, 0)
    families.denoiser(family).train()
    blocks, again = families.blocks(family), list[torch.nn.Module]()
    checkpoint = checkpointing.checkpoint

    def watched(block: torch.nn.Module, *given: Any, **named: Any) -> Any:
        again.append(block)
        return checkpoint(block, *given, **named)

    monkeypatch.setattr(checkpointing, "checkpoint", watched)
    drawn = torch.Generator().manual_seed(0)
    noised = torch.randn(1, family.latents()[0], 8, 8, generator=drawn)
    told = {
        name: torch.randn(1, *shape, generator=drawn) for name, shape in family.condition_shapes().items()
    }  # fmt: skip
    gradients = []
    for share, count in ((None, 0), (0.5, round(len(blocks) / 2)), (1.0, len(blocks))):
        again.clear()
        for parameter in group.parameters:
            parameter.grad = None
        if share:
            checkpointing.put_on(family, share)
        family.predict(noised, torch.tensor([500.0]), told, torch.ones(1, 6)).square().mean().backward()
        gradients.append([parameter.grad for parameter in group.parameters])
        alone = kind == "sdxl" and share == 1  # diffusers keeps the first layer of a UNet's middle
        assert len(again) == count - alone
        if share == 0.5:
            front = -(-count // 2)
            assert set(again) == {*blocks[:front], *blocks[len(blocks) - (count - front) :]}
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


@pytest.mark.parametrize("share", ["0", "1.5"])
def test_what_is_no_share_is_refused(share: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        "lora",
        "--data",
        str(tmp_path),
        "--prompt",
        "sks",
        "--no-prior",
        "--output",
        str(tmp_path / "run"),
    ]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--gradient-checkpointing", "--checkpoint-share", share])
    assert stop.value.code == 2 and "--checkpoint-share" in capsys.readouterr().err
