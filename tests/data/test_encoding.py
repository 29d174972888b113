"""What a run trains on, computed by one process or by several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from finetune import data, families
from finetune.data.encoding import Turn, encode
from finetune.data.examples import Item
from finetune.errors import Fault
from finetune.families import Family, Source
from finetune.settings import Captions, Data, Framing


@pytest.fixture
def family(tiny_models: dict[str, Path]) -> Family:
    return families.load(Source(str(tiny_models["sdxl"])))


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.effect_noise((64, 64), 20 + 60 * number).convert("RGB").save(tmp_path / "pictures" / f"{number}.png")
    return data.plan(data.read_plain(tmp_path / "pictures", "a dog"), Framing(flip=True), (64,), 32)


def test_processes_that_share_a_cache_share_the_work(
    tiny_models: dict[str, Path], items: list[Item], tmp_path: Path
) -> None:
    """Each computes every other one; what the first leaves out, the second adds."""
    shared = Data(cache=tmp_path / "cache")
    counts = []
    for rank in (0, 1):
        family = families.load(Source(str(tiny_models["sdxl"])))
        made = encode(family, items, (), (), shared, Captions(), turn=Turn(rank, 2))
        counts.append(made.built["pictures"])
    assert counts == [(6, 6), (3, 6)]
    assert all(made.latents(item, view)[0].shape == (4, 8, 8) for item in items for view in item.views)


def test_what_is_kept_in_memory_each_process_computes_for_itself(family: Family, items: list[Item]) -> None:
    made = encode(family, items, (), (), Data(use_cache=False), Captions(), turn=Turn(1, 2))
    assert all(made.latents(item, view)[0].isfinite().all() for item in items for view in item.views)
    assert set(made.conditions("a dog")) == {"text", "pooled"}


def test_a_mirror_image_has_latents_of_its_own(family: Family, items: list[Item]) -> None:
    made = encode(family, items, (), (), Data(use_cache=False), Captions())
    plain, mirrored = (made.latents(items[0], view)[0] for view in items[0].views)
    assert not torch.equal(plain, mirrored)


def test_latents_that_are_not_finite_are_refused_with_the_remedy(family: Family, items: list[Item]) -> None:
    """As a half-precision VAE makes them (row 26)."""
    with torch.no_grad():
        family.pipeline.vae.quant_conv.bias.fill_(float("inf"))
    with pytest.raises(Fault, match=r"0\.png: its latents are not finite.*--precision fp32"):
        encode(family, items, (), (), Data(use_cache=False), Captions())


def test_the_denoiser_is_out_of_a_gpus_memory_meanwhile(
    family: Family, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is none, it is told to go and to come back all the same."""
    denoiser, did = families.denoiser(family), []
    monkeypatch.setattr(type(denoiser), "device", torch.device("cuda"))
    monkeypatch.setattr(denoiser, "to", lambda device: did.append(str(device)))
    vae: Any = family.pipeline.vae
    vae.register_forward_pre_hook(lambda *_: did.append("encode"))
    vae.encoder.register_forward_pre_hook(lambda *_: did.append("encode"))
    encode(family, items, (), (), Data(use_cache=False), Captions())
    assert did[0] == "cpu" and did[-1] == "cuda" and set(did[1:-1]) == {"encode"}
