"""LPIPS (Zhang et al. 2018, 1801.03924), equation 1, on VGG16 (Simonyan & Zisserman 2014, 1409.1556).

Own code of thirty lines, because the libraries that have it need torchvision for this one network. Names of the weights
are torchvision's (`features.0.weight`), those of the channels the authors' own (`lin0.model.1.weight`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune import weights
from finetune.errors import Fault

WIDTHS = (64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)
"""Channels of the convolutions; each stage ends where its last one was rectified: relu1_2 to relu5_3."""
MODEL, CHANNELS = "model.safetensors", "lpips.safetensors"


class Features(nn.Module):
    """VGG16's convolutions: (B, 3, H, W), normalised as ImageNet's -> the activations at the end of each stage."""

    def __init__(self, widths: Sequence[Sequence[int]] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends: list[int] = []
        before = 3
        for stage in widths:
            layers += [nn.MaxPool2d(2)] if layers else []
            for width in stage:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            self.ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        found, x = [], pictures
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in self.ends:
                found.append(x)
        return found

    @classmethod
    def load(cls, place: str) -> tuple[Features, list[Tensor]]:
        """From a folder or the hub; with the learned weights of the channels where they are there, else an empty list.

        Raises Fault when the file is not VGG16's.
        """
        folder, file = Path(place), _file(place)
        tensors = {name: value for name, value in load_file(file).items() if name.startswith("features.")}
        shapes = [value.shape for name, value in sorted(tensors.items(), key=_order) if name.endswith(".weight")]
        wanted = [len(stage) for stage in WIDTHS]
        if len(shapes) != sum(wanted):
            raise Fault(f"{file}: not VGG16: {len(shapes)} convolutions `features.N.weight`, expected {sum(wanted)}.")
        sizes = iter(int(shape[0]) for shape in shapes)
        made = cls([[next(sizes) for _ in range(count)] for count in wanted])
        made.load_state_dict(tensors)
        learned = folder / CHANNELS
        found = _channels(learned) if learned.is_file() else []
        return made.float().eval().requires_grad_(False), found


def distance(one: Sequence[Tensor], other: Sequence[Tensor], channels: Sequence[Tensor] = ()) -> Tensor:
    """(B,): sum over the layers of the mean over places of || w * (y - y') ||^2, y of length 1 at each place.

    `channels`: the w^2 of each layer, (C,), as the authors' files hold them; without them 1 (their "baseline").
    """
    total = torch.zeros(len(one[0]), device=one[0].device)
    for layer, (a, b) in enumerate(zip(one, other, strict=True)):
        apart = (_unit(a) - _unit(b)) ** 2
        weight = channels[layer].to(apart) if channels else torch.ones(apart.shape[1]).to(apart)
        total = total + (apart * weight[:, None, None]).sum(1).mean((1, 2))
    return total


def _unit(features: Tensor) -> Tensor:
    """Of length 1 over the channels, as the authors' code has it (a place without any activation stays 0)."""
    return features / (features.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)


def _file(place: str) -> Path:
    if Path(place).is_dir():
        weights.check_file(Path(place) / MODEL)
        return Path(place) / MODEL
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(place, MODEL))


def _channels(file: Path) -> list[Tensor]:
    weights.check_file(file)
    told = load_file(file)
    try:
        return [told[f"lin{layer}.model.1.weight"].float().flatten() for layer in range(len(WIDTHS))]
    except KeyError as error:
        raise Fault(f"{file}: no {error.args[0]} there: not the channel weights of LPIPS.") from error


def _order(named: tuple[str, Tensor]) -> int:
    return int(named[0].split(".")[1])
