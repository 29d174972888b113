"""Metric models behind one small protocol: DINO, CLIP and LPIPS from the hub or a folder, and toybox's own judge.

Pictures are prepared as the models' authors did: the shorter side to so many pixels (bicubic), the middle square, their
means and deviations. Published figures are on 224 pixels; a model made for less is given less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image as Images
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from finetune import weights
from finetune.errors import Fault
from finetune.evaluation.lpips import Features, distance
from finetune.glance import EMBEDDED
from finetune.quiet import quiet

SIDE = 224
BATCH = 32
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Means and standard deviations of red, green and blue in ImageNet's pictures."""
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Those that CLIP was trained with."""
DINO_MODEL = "facebook/dino-vits16"
CLIP_MODEL = "openai/clip-vit-base-patch32"
LPIPS_MODEL = "timm/vgg16.tv_in1k"


class Judge(Protocol):
    """What sees pictures."""

    name: str
    """Which model it is, as every figure tells it"""

    def see(self, pictures: Sequence[Image]) -> Tensor:
        """(N, D), each of length 1."""


class Reader(Judge, Protocol):
    """What sees pictures and reads prompts in one space."""

    def read(self, prompts: Sequence[str]) -> Tensor:
        """(N, D), each of length 1."""


class Differ(Protocol):
    """What says how different pictures are."""

    name: str

    def distances(self, pictures: Sequence[Image]) -> Tensor:
        """(N, N): 0 for equal pictures."""


class DINO:
    """The class token of a self-supervised vision transformer (Caron et al. 2021, 2104.14294), ViT-S/16 unless told."""

    def __init__(self, place: str = DINO_MODEL, device: torch.device | str = "cpu") -> None:
        """Raises Fault when there is no such model."""
        from transformers import AutoModel

        self.name = f"DINO {_called(place)}"
        self.model = _load(AutoModel.from_pretrained, place, device)
        self.side = min(SIDE, int(self.model.config.image_size))

    @torch.no_grad()
    def see(self, pictures: Sequence[Image]) -> Tensor:
        shorter = round(self.side * 256 / 224)
        parts = _batches(pictures, shorter, self.side, *IMAGENET)
        seen = [self.model(part.to(self.model.device)).last_hidden_state[:, 0].cpu() for part in parts]
        return F.normalize(torch.cat(seen).float(), dim=1)


class CLIP:
    """Pictures and prompts in one space (Radford et al. 2021, 2103.00020), ViT-B/32 unless told."""

    def __init__(self, place: str = CLIP_MODEL, device: torch.device | str = "cpu") -> None:
        """Raises Fault when there is no such model."""
        from transformers import CLIPModel, CLIPTokenizer

        self.name = f"CLIP {_called(place)}"
        self.model = _load(CLIPModel.from_pretrained, place, device)
        with _faults(place):
            self.tokenizer = CLIPTokenizer.from_pretrained(place)
        self.side = min(SIDE, int(self.model.config.vision_config.image_size))

    @torch.no_grad()
    def see(self, pictures: Sequence[Image]) -> Tensor:
        parts = _batches(pictures, self.side, self.side, *OPENAI)
        seen = [self.model.vision_model(part.to(self.model.device)).pooler_output for part in parts]
        return F.normalize(self.model.visual_projection(torch.cat(seen)).cpu().float(), dim=1)

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        said = self.model.text_model(**tokens.to(self.model.device)).pooler_output
        return F.normalize(self.model.text_projection(said).cpu().float(), dim=1)


class LPIPS:
    """Learned perceptual distance on VGG16 (Zhang et al. 2018, 1801.03924); the formula is in `lpips.py`."""

    def __init__(self, place: str = LPIPS_MODEL, device: torch.device | str = "cpu") -> None:
        """`place`: a hub name or folder with VGG16's `model.safetensors`, and `lpips.safetensors` where the learned
        weights of the channels are at hand: without them each channel counts alike, which is another scale.
        """
        with _faults(place):
            self.features, self.channels = Features.load(place)
        self.features.to(device)
        self.device = device
        how = "learned channel weights" if self.channels else "all channels alike"
        self.name = f"LPIPS VGG16 {_called(place)}, {how}"

    @torch.no_grad()
    def distances(self, pictures: Sequence[Image]) -> Tensor:
        side = min(SIDE, *(min(picture.size) for picture in pictures))
        seen = [self.features(part.to(self.device)) for part in _batches(pictures, side, side, *IMAGENET, batch=1)]
        result = torch.zeros(len(seen), len(seen))
        for i in range(len(seen)):
            for j in range(i):
                result[i, j] = result[j, i] = distance(seen[i], seen[j], self.channels).item()
        return result


class ToyboxIdentity:
    """Toybox's own judge, its head for which thing it is."""

    def __init__(self, judge: Any) -> None:
        self.judge, self.name = judge, f"{judge.name} (identity)"

    def see(self, pictures: Sequence[Image]) -> Tensor:
        seen: Tensor = self.judge.embed(pictures)
        return seen


class ToyboxPrompt:
    """Toybox's own judge, its head for what is to be seen."""

    def __init__(self, judge: Any) -> None:
        self.judge, self.name = judge, f"{judge.name} (prompt)"

    def see(self, pictures: Sequence[Image]) -> Tensor:
        seen: Tensor = self.judge.encode(pictures)[0]
        return seen

    def read(self, prompts: Sequence[str]) -> Tensor:
        said: Tensor = self.judge.embed_prompts(prompts)
        return said


class ToyboxWhole:
    """Both heads together: which thing, and where and how it is shown."""

    def __init__(self, judge: Any) -> None:
        self.judge, self.name = judge, f"{judge.name} (identity and prompt)"

    def see(self, pictures: Sequence[Image]) -> Tensor:
        return torch.cat(self.judge.encode(pictures), 1) / 2**0.5

    def distances(self, pictures: Sequence[Image]) -> Tensor:
        """One minus the cosine."""
        seen = self.see(pictures)
        return 1 - seen @ seen.T


@dataclass(frozen=True)
class Panel:
    """Who judges what."""

    likeness: Mapping[str, Judge]
    """By what the measure is called; the first one counts for the verdict."""
    words: Reader
    words_title: str
    whole: Judge
    """Sees all of a picture: for drift and for copies of training pictures"""
    differ: Differ
    differ_title: str
    style: Mapping[str, Judge]
    """Likeness of styles: what reads prompts first, which sees how a thing is drawn, as it has words for it"""

    def of_styles(self) -> Panel:
        return replace(self, likeness=self.style)


def panel(kind: str, model: str, places: tuple[str, str, str], device: torch.device | str) -> Panel:
    """Of a kind: toybox, published (DINO, CLIP and LPIPS at these places), or auto: toybox's for runs on toybox.

    Raises Fault when one is not to be had.
    """
    if kind == "toybox" or (kind == "auto" and model == EMBEDDED):
        return toybox()
    return published(places[0], places[1], places[2], device)


def toybox() -> Panel:
    """The embedded judge, for the embedded base."""
    from finetune.toybox.judge import Judge as Embedded

    judge = Embedded.load()
    whole, words = ToyboxWhole(judge), ToyboxPrompt(judge)
    things, styles = {"likeness": ToyboxIdentity(judge)}, {"likeness": words}
    return Panel(things, words, "prompt score", whole, whole, "diversity", styles)


def published(
    dino: str = DINO_MODEL, clip: str = CLIP_MODEL, lpips: str = LPIPS_MODEL, device: torch.device | str = "cpu"
) -> Panel:
    """The models that papers use, by hub name or folder. Raises Fault when one is not to be had."""
    seer, reader = DINO(dino, device), CLIP(clip, device)
    things: dict[str, Judge] = {"DINO": seer, "CLIP-I": reader}
    styles: dict[str, Judge] = {"CLIP-I": reader, "DINO": seer}
    return Panel(things, reader, "CLIP-T", seer, LPIPS(lpips, device), "DIV", styles)


def prepared(picture: Image, shorter: int, side: int, means: Sequence[float], deviations: Sequence[float]) -> Tensor:
    """(3, side, side): the picture with its shorter side so long, its middle square, normalised."""
    picture = picture.convert("RGB")
    sizes = [max(shorter, round(length * shorter / min(picture.size))) for length in picture.size]
    picture = picture.resize((sizes[0], sizes[1]), Images.Resampling.BICUBIC)
    left, top = (sizes[0] - side) // 2, (sizes[1] - side) // 2
    values = np.asarray(picture.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    shift, scale = (np.asarray(numbers, dtype=np.float32) for numbers in (means, deviations))
    return torch.from_numpy((values - shift) / scale).permute(2, 0, 1)


def _batches(
    pictures: Sequence[Image],
    shorter: int,
    side: int,
    means: Sequence[float],
    deviations: Sequence[float],
    batch: int = BATCH,
) -> Iterator[Tensor]:
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        yield torch.stack([prepared(picture, shorter, side, means, deviations) for picture in part])


def _load(make: Callable[..., Any], place: str, device: torch.device | str) -> Any:
    """A model of transformers in float32, frozen, every weight finite. Only safetensors are read."""
    folder = Path(place).is_dir()
    if folder:
        for file in sorted(Path(place).glob(f"*{weights.SUFFIX}")):
            weights.check_file(file)
    with _faults(place), quiet():
        model: nn.Module = make(place, use_safetensors=True, dtype=torch.float32, local_files_only=folder)
    weights.check_finite({"metric model": model})
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def _faults(place: str) -> Iterator[None]:
    try:
        yield
    except Fault:
        raise
    except Exception as error:  # foreign configurations raise anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Fault(
            f"{place}: this metric model cannot be loaded ({reason}). Give a folder or a hub name of such a model with "
            "safetensors weights; for the network, see HF_ENDPOINT and HF_HUB_OFFLINE."
        ) from error


def _called(place: str) -> str:
    """A hub name as it is, of a folder its last part."""
    return Path(place).resolve().name if Path(place).is_dir() else place
