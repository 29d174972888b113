"""BOFT's block-diagonal matrices in torch, for any device, in place of the CUDA extension that PEFT compiles for them.

Where that cannot be compiled PEFT trains one factor instead of those that were asked for. All else is PEFT's own.
"""

from __future__ import annotations

from peft.tuners.boft import layer
from torch import Tensor, nn


class BlockDiagonal:
    """What PEFT calls of the extension (`peft/tuners/boft/fbd/fbd_cuda.cpp`)."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        """(N, D, H, H) to (N, D H, D H), the blocks along the diagonal."""
        count, number, side, _ = blocks.shape
        made = blocks.new_zeros(count, number, side, number, side)
        made.diagonal(0, 1, 3).copy_(blocks.permute(0, 2, 3, 1))
        return [made.view(count, number * side, number * side)]

    @staticmethod
    def backward(gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        """Of the matrices (N, D H, D H), the blocks' own (N, D, H, H)."""
        count, number, side, _ = blocks.shape
        found = gradient.reshape(count, number, side, number, side).diagonal(0, 1, 3)
        return [found.permute(0, 3, 1, 2).contiguous()]


def use() -> None:
    """From now on, in this process, PEFT takes these."""
    layer._FBD_CUDA = BlockDiagonal


def share(module: nn.Module) -> None:
    """Let layers alike have one permutation, on their device, where PEFT gives each its own, (m, in, in): on SDXL, with
    two factors, 9.6 GB."""
    known: dict[object, Tensor] = {}
    for one in module.modules():
        if isinstance(one, layer.BOFTLayer):
            device, [blocks] = one.get_base_layer().weight.device, one.boft_R.values()
            one.boft_P = known.setdefault((device, blocks.shape), one.boft_P.to(device))
