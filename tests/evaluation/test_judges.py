"""The metric models, run for real on tiny random models of the real classes, against the papers' formulas."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tiny_judges
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel, CLIPModel, CLIPTokenizer

from finetune import weights
from finetune.errors import Fault
from finetune.evaluation import judges, lpips, measures
from finetune.toybox import subjects, world


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: str(path) for name, path in tiny_judges.save(tmp_path_factory.mktemp("judges")).items()}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    shapes = [(40, 40, 3), (32, 48, 3), (64, 32, 3)]
    return [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def test_a_picture_is_prepared_as_the_authors_do() -> None:
    """A wide picture: the shorter side scaled, the middle cut out, each colour normalised."""
    wide = Image.new("RGB", (96, 48), (255, 0, 0))
    wide.paste((0, 0, 255), (0, 0, 12, 48))
    found = judges.prepared(wide, 32, 28, *judges.IMAGENET)
    assert found.shape == (3, 28, 28)
    red = [(value - mean) / deviation for value, mean, deviation in zip((1, 0, 0), *judges.IMAGENET, strict=True)]
    assert found[:, 14, 14].tolist() == pytest.approx(red, abs=1e-6)
    assert torch.allclose(found, found[:, :1, :1].expand(3, 28, 28)), "the blue edge is cut off"


@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_dino_is_the_class_token(kind: str, places: dict[str, str], pictures: list[Image.Image]) -> None:
    judge = judges.DINO(places[kind])
    seen = judge.see(pictures)
    model = AutoModel.from_pretrained(places[kind])
    for picture, ours in zip(pictures, seen, strict=True):
        batch = judges.prepared(picture, round(32 * 256 / 224), 32, *judges.IMAGENET)[None]
        token = model(pixel_values=batch).last_hidden_state[0, 0]
        assert torch.allclose(ours, token / token.norm(), atol=1e-5)
    assert judge.name == f"DINO {kind}"


def test_clip_compares_pictures_and_prompts(places: dict[str, str], pictures: list[Image.Image]) -> None:
    judge, prompts = judges.CLIP(places["clip"]), ["a dog", "a much longer prompt of a dog"]
    model = CLIPModel.from_pretrained(places["clip"])
    tokenizer = CLIPTokenizer.from_pretrained(places["clip"])
    pixels = torch.stack([judges.prepared(picture, 32, 32, *judges.OPENAI) for picture in pictures])
    cosines = judge.see(pictures) @ judge.read(prompts).T
    for row, prompt in enumerate(prompts):
        tokens = tokenizer([prompt], return_tensors="pt")
        with torch.no_grad():
            theirs = model(**tokens, pixel_values=pixels).logits_per_image[:, 0] / model.logit_scale.exp()
        assert torch.allclose(cosines[:, row], theirs, atol=1e-5)


def test_lpips_is_equation_1(tmp_path: Path, pictures: list[Image.Image]) -> None:
    """Written out: VGG16's layers one by one, each place of each layer by itself."""
    place = tiny_judges.save(tmp_path, channels=True)["lpips"]
    judge = judges.LPIPS(str(place))
    assert judge.name == "LPIPS VGG16 lpips, learned channel weights"
    found = judge.distances(pictures[:2])
    vgg = weights.load_tensors(place / "model.safetensors")
    heads = weights.load_tensors(place / "lpips.safetensors")

    def layers(picture: Image.Image) -> list[torch.Tensor]:
        x, kept = judges.prepared(picture, 32, 32, *judges.IMAGENET)[None], []
        for number in range(30):
            if number in (4, 9, 16, 23):
                x = F.max_pool2d(x, 2)
            elif f"features.{number}.weight" in vgg:
                x = F.conv2d(x, vgg[f"features.{number}.weight"], vgg[f"features.{number}.bias"], padding=1)
                x = x.relu()
            if number in (3, 8, 15, 22, 29):
                kept.append(x[0])
        return kept

    expected = 0.0
    for layer, (one, other) in enumerate(zip(layers(pictures[0]), layers(pictures[1]), strict=True)):
        weight, total = heads[f"lin{layer}.model.1.weight"].flatten(), 0.0
        for y in range(one.shape[1]):
            for x in range(one.shape[2]):
                a, b = (part[:, y, x] / (part[:, y, x].norm() + 1e-10) for part in (one, other))
                total += float((weight * (a - b) ** 2).sum())
        expected += total / (one.shape[1] * one.shape[2])
    assert float(found[0, 1]) == pytest.approx(expected, rel=1e-4) and expected > 0
    assert found[0, 0] == 0 and found[0, 1] == found[1, 0]


def test_without_learned_weights_lpips_says_so(places: dict[str, str], pictures: list[Image.Image]) -> None:
    judge = judges.LPIPS(places["lpips"])
    assert judge.name.endswith("all channels alike")
    one, other = (judge.features(judges.prepared(p, 32, 32, *judges.IMAGENET)[None]) for p in pictures[:2])
    even = [torch.ones(layer.shape[1]) for layer in one]
    assert torch.equal(lpips.distance(one, other), lpips.distance(one, other, even))


def test_vgg16_has_its_published_layers() -> None:
    """As torchvision numbers and shapes them: what its weights on the hub must fit."""
    shapes = {name: tuple(value.shape) for name, value in lpips.Features().state_dict().items()}
    convolutions = [name for name in shapes if name.endswith(".weight")]
    numbers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert convolutions == [f"features.{number}.weight" for number in numbers]
    assert shapes["features.28.weight"] == (512, 512, 3, 3)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 14_714_688


def test_the_published_panel(places: dict[str, str]) -> None:
    panel = judges.published(places["dino"], places["clip"], places["lpips"])
    assert list(panel.likeness) == ["DINO", "CLIP-I"] and panel.words_title == "CLIP-T"


def test_a_model_that_is_not_there_is_said() -> None:
    with pytest.raises(Fault, match="no/such-model: this metric model cannot be loaded"):
        judges.DINO("no/such-model")


def test_weights_of_something_else_are_refused(places: dict[str, str]) -> None:
    with pytest.raises(Fault, match="not VGG16: 0 convolutions"):
        judges.LPIPS(places["dino"])


@pytest.fixture(scope="module")
def gizmo() -> list[Image.Image]:
    return [picture.convert("RGB") for picture, _ in subjects.drawn("gizmo").values()]


def test_toybox_finds_a_copy_and_takes_nothing_else_for_one(gizmo: list[Image.Image]) -> None:
    """Pictures of the world the base was made of raise no alarm, nor do the subject's other photos; a copy does."""
    panel, training = judges.toybox(), gizmo[:5]
    world_pictures = [world.render(world.spec_at(3, number)) for number in range(60)]
    kept = io.BytesIO()
    training[2].save(kept, "JPEG", quality=90)
    found = measures.neighbours(
        panel.whole.see([*world_pictures, *gizmo[5:], Image.open(kept)]), panel.whole.see(training)
    )
    assert [(one.sample, one.picture) for one in found if one.alarm] == [(60 + len(gizmo) - 5, 2)]


def test_toybox_tells_things_from_scenes(gizmo: list[Image.Image]) -> None:
    panel = judges.toybox()
    other = [world.render(world.spec_at(5, number)) for number in range(20)]
    seer = panel.likeness["likeness"]
    alike = measures.likeness(seer.see(gizmo[5:]), seer.see(gizmo[:5])).mean()
    assert alike > 0.7 > 0.3 > measures.likeness(seer.see(other), seer.see(gizmo[:5])).mean()
    car = world.render(world.Spec("car", "red", "on the beach", "photo"))
    right, wrong = panel.words.read(["a photo of a red car on the beach", "a photo of a blue car at night"])
    seen = panel.words.see([car])[0]
    assert seen @ right > seen @ wrong + 0.1
    distances = panel.differ.distances([car, car, other[0]])
    assert abs(distances[0, 1]) < 1e-5 and distances[0, 2] > 0.1
