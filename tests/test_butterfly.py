"""BOFT: PEFT's layers with the block-diagonal matrices of torch, our formula, and the paper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import BOFTConfig
from peft.tuners.boft import layer as boft
from torch import Tensor, nn

from finetune import adapters, butterfly, cli, families, keys, shelf
from finetune.export.change import KINDS
from finetune.settings import Adapter


def made(factors: int, side: int = 4, inputs: int = 16, bias: bool = True) -> boft.Linear:
    """PEFT's layer of 6 outputs, with random weights in all that trains."""
    base = nn.Linear(inputs, 6, bias)
    config = BOFTConfig(boft_block_size=side, boft_n_butterfly_factor=factors)
    layer = boft.Linear(base, "default", config)
    for number, parameter in enumerate(layer.parameters()):
        parameter.data = parameter.data + keys.normal(tuple(parameter.shape), 0, "test", number)
    return layer.eval()


@pytest.fixture(autouse=True)
def peft() -> None:
    butterfly.use()


def test_blocks_stand_along_the_diagonal_and_have_gradients() -> None:
    blocks = keys.normal((2, 3, 4, 4), 0, "test").double().requires_grad_(True)
    for one, own in zip(boft.FastBlockDiag.apply(blocks), blocks, strict=True):
        assert torch.equal(one, torch.block_diag(*own))
    assert torch.autograd.gradcheck(boft.FastBlockDiag.apply, (blocks,))


@pytest.mark.parametrize(("factors", "side"), [(1, 4), (1, 1), (2, 4), (3, 4), (3, 2), (4, 2)])
def test_the_formula_is_what_pefts_layer_does(factors: int, side: int) -> None:
    layer = made(factors, side)
    assert layer.boft_R["default"].shape == (factors, 16 // side, side, side)
    turn, scale = layer.get_delta_weight("default")
    assert torch.allclose(turn @ turn.T, torch.eye(16), atol=1e-5)
    weight, act = layer.get_base_layer().weight.detach().clone(), KINDS["boft"].act
    assert act is not None
    change = act({name: getattr(layer, name)["default"].data for name in ("boft_R", "boft_s")}, weight)
    assert torch.allclose(weight + change, scale * (weight @ turn.T), atol=1e-5)
    given = keys.normal((5, 16), 0, "given")
    answer = layer(given)
    assert torch.allclose(answer, nn.functional.linear(given, weight + change, layer.base_layer.bias), atol=1e-5)
    layer.merge()
    assert torch.allclose(layer.get_base_layer().weight, weight + change, atol=1e-5)


def test_butterflies_make_it_dense_as_the_paper_says() -> None:
    """Factor i joins half-blocks that are 2^(i-1) apart: 8 of them need three (Liu et al. 2023, section 3)."""
    half = torch.arange(16) // 2
    for factors in (1, 2, 3):
        together = half // 2**factors
        assert torch.equal(touched(made(factors)), together[:, None] == together)
    assert touched(made(3)).all()


def touched(layer: boft.Linear) -> Tensor:
    """Which inputs have to do with one another."""
    return layer.get_delta_weight("default")[0].detach().abs() > 1e-7


def test_of_one_factor_it_is_what_peft_does_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    given = keys.normal((5, 16), 0, "given")
    with_it, several = made(1), made(2).state_dict()
    answer = with_it(given)
    monkeypatch.setattr(boft, "_FBD_CUDA", False)
    without = made(1)
    assert with_it.fbd_cuda_available and not without.fbd_cuda_available
    without.load_state_dict(with_it.state_dict())
    assert torch.allclose(answer, without(given), atol=1e-6)
    with pytest.raises(RuntimeError, match="size mismatch"):  # these it does not take for one
        without.load_state_dict(several)


def test_layers_alike_share_their_permutation(tiny_models: dict[str, Path]) -> None:
    family = families.load(families.Source(str(tiny_models["sd"])))
    adapters.adapt(family, Adapter("boft", rank=4), 1e-3, None, 0)
    layers = [one for one in family.pipeline.unet.modules() if isinstance(one, boft.BOFTLayer)]
    kinds = {(tuple(one.boft_R["default"].shape), one.boft_P.data_ptr()) for one in layers}
    assert len(kinds) == len({shape for shape, _ in kinds}) < len(layers)
    assert all(one.boft_P.shape[1:] == (one.in_features,) * 2 for one in layers)
    answer = layers[0](given := keys.normal((2, layers[0].in_features), 0, "given"))
    assert torch.allclose(answer, layers[0].base_layer(given), atol=1e-6), "it begins with no change"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rank", "4", "--butterflies", "0"], "--butterflies 0: at least 1"),
        (["--rank", "32", "--butterflies", "4"], "which are no multiple of 256"),
        (["--rank", "5", "--butterflies", "1"], "which are no multiple of 5"),
        (["--rank", "4", "--conv-rank", "4"], "BOFT has no such thing"),
    ],
)
def test_what_cannot_be_parted_is_refused(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(shelf.datasets() / "gizmo" / "pictures")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "lora", "--method", "boft", "--data", data, "--no-prior", "--prompt", "sks",
                  "--output", str(tmp_path / "run"), *flags])  # fmt: skip
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
