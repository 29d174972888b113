"""`finetune generate --init`: image-to-image, inpainting and outpainting, each as diffusers does it."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import original
import pytest
import tiny
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from PIL import Image as Images
from PIL.Image import Image

from finetune import families, sampling
from finetune.cli import main
from finetune.families import Source
from finetune.initial import Initial
from finetune.pictures import read_settings

KINDS = [kind for kind in tiny.KINDS if families.known(type(tiny.pipeline(kind)).__name__).from_picture]
UNETS = ["sd", "sd-v", "sdxl"]
DRAW = {"steps": 4, "guidance": 4.0}


@pytest.fixture(scope="session")
def inpainting_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inpainting")
    return {kind: tiny.save(kind, root / kind) for kind in tiny.INPAINTING}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A picture of 64 x 64 with smooth colours and a mask of its right half."""
    photo().save(tmp_path / "photo.png")
    half().save(tmp_path / "mask.png")
    return tmp_path / "photo.png", tmp_path / "mask.png"


def photo(width: int = 64, height: int = 64) -> Image:
    y, x = np.mgrid[:height, :width] / 64
    return Images.fromarray((255 * np.stack([x / 2, y / 2, (x + y) / 4], -1)).clip(0, 255).astype(np.uint8))


def half() -> Image:
    mask = Images.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    return mask


def pixels(image: Image | Path) -> np.ndarray:
    return np.asarray(Images.open(image) if isinstance(image, Path) else image).astype(int)


def generate(output: Path, model: Path | str, *words: str) -> Path:
    main(["generate", "--model", str(model), "--prompt", "a dog", "--steps", "4", "--output", str(output), *words])
    [picture] = output.glob("*.png")
    return picture


def refused(capsys: pytest.CaptureFixture[str], output: Path, model: Path | str, *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        generate(output, model, *words)
    assert stop.value.code == 2 and not output.exists()
    return " ".join(capsys.readouterr().err.split())


def sized(pipeline: DiffusionPipeline) -> dict[str, int]:
    """What pipelines are told that do not take the picture's own size."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    return {name: 64 for name in ("height", "width") if name in takes}


def through_the_vae(folder: Path | str, picture: Image) -> np.ndarray:
    """Encoded and decoded by diffusers' own code."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        latents = pipeline.vae.encode(pipeline.image_processor.preprocess(picture)).latent_dist.mode()
        decoded = pipeline.vae.decode(latents).sample
    return pixels(pipeline.image_processor.postprocess(decoded, "pil")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_from_a_picture_is_that_of_plain_diffusers(kind: str, tiny_models: dict[str, Path]) -> None:
    family = families.load(Source(str(tiny_models[kind])))
    ours = sampling.sample(family, ["a ball", "a dog"], [7, 8], initial=Initial(photo(), 0.5), size=64, **DRAW)
    pipeline = AutoPipelineForImage2Image.from_pretrained(tiny_models[kind])
    for picture, prompt, seed in zip(ours, ["a ball", "a dog"], [7, 8], strict=True):
        theirs = pipeline(
            prompt, image=photo(), strength=0.5, num_inference_steps=4, guidance_scale=4.0,
            generator=torch.Generator("cpu").manual_seed(seed), **sized(pipeline),
        ).images[0]  # fmt: skip
        assert np.abs(pixels(picture) - pixels(theirs)).max() <= 1
    assert np.abs(pixels(ours[0]) - pixels(ours[1])).max() > 5


@pytest.mark.parametrize("kind", [*KINDS, *tiny.INPAINTING])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_under_the_mask_a_picture_is_that_of_plain_diffusers(
    kind: str, strength: float, tiny_models: dict[str, Path], inpainting_models: dict[str, Path]
) -> None:
    """Latent blending with four channels, concatenation with nine."""
    folder = {**tiny_models, **inpainting_models}[kind]
    family = families.load(Source(str(folder)))
    [ours] = sampling.sample(family, ["a ball"], [7], initial=Initial(photo(), strength, half()), size=64, **DRAW)
    theirs = AutoPipelineForInpainting.from_pretrained(folder)(
        "a ball", image=photo(), mask_image=half(), strength=strength, num_inference_steps=4, guidance_scale=4.0,
        height=64, width=64, generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]  # fmt: skip
    assert np.abs(pixels(ours) - pixels(theirs))[:, 32:].max() <= 1
    kept = 32 - family.grain()  # what lies between leads over
    assert np.array_equal(pixels(ours)[:, :kept], pixels(photo())[:, :kept])
    assert np.abs(pixels(ours) - pixels(photo()))[:, 32:].mean() > 5


@pytest.mark.parametrize("kind", [*UNETS, "toybox"])
def test_strength_0_gives_the_picture_back_to_the_vae_error(
    kind: str, tmp_path: Path, tiny_models: dict[str, Path], files: tuple[Path, Path]
) -> None:
    model = tiny_models.get(kind, kind)
    drawn = generate(tmp_path / "out", model, "--init", str(files[0]), "--strength", "0")
    folder = Source(str(model)).folder
    assert folder is not None
    assert np.abs(pixels(drawn) - through_the_vae(folder, photo())).max() <= 1
    if kind == "toybox":
        assert np.abs(pixels(drawn) - pixels(photo())).mean() < 4, "a VAE that was trained gives back what it is given"
    assert read_settings(drawn)["strength"] == 0


def test_inpainting_keeps_what_is_not_masked(tmp_path: Path, files: tuple[Path, Path]) -> None:
    """With a trained model: of what stays, all but an edge of 8 pixels to the bit, the edge to the VAE's error."""
    drawn = pixels(generate(tmp_path / "out", "toybox", "--init", str(files[0]), "--mask", str(files[1])))
    own, vae = pixels(photo()), through_the_vae(str(Source("toybox").folder), photo())
    assert np.array_equal(drawn[:, :24], own[:, :24])
    edge = np.abs(drawn - own)[:, 24:31].mean()
    assert edge <= np.abs(vae - own)[:, 24:31].mean() + 4
    assert np.abs(drawn - own)[:, 32:].mean() > 10


@pytest.mark.parametrize("kind", tiny.INPAINTING)
def test_an_inpainting_checkpoint_draws_with_a_mask_only(
    kind: str,
    tmp_path: Path,
    inpainting_models: dict[str, Path],
    files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = inpainting_models[kind]
    drawn = generate(tmp_path / "out", model, "--init", str(files[0]), "--mask", str(files[1]), "--seed", "3")
    assert np.array_equal(pixels(drawn)[:, :24], pixels(photo())[:, :24])
    assert "inpainting checkpoint" in refused(capsys, tmp_path / "no", model)
    assert "--mask or --extend" in refused(capsys, tmp_path / "no", model, "--init", str(files[0]))


@pytest.mark.parametrize("kind", tiny.INPAINTING)
def test_an_inpainting_checkpoint_in_one_file(
    kind: str, tmp_path: Path, inpainting_models: dict[str, Path], files: tuple[Path, Path]
) -> None:
    file = original.save(tiny.pipeline(kind), tmp_path / "model.safetensors")
    assert "Inpaint" in Source(str(file)).pipeline_class(), "known by its nine channels"
    words = ["--init", str(files[0]), "--mask", str(files[1])]
    one = generate(tmp_path / "one", file, *words, "--model-config", str(inpainting_models[kind]))
    other = generate(tmp_path / "other", inpainting_models[kind], *words)
    assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_outpainting_keeps_the_picture_and_draws_around_it(tmp_path: Path) -> None:
    photo(32, 64).save(tmp_path / "photo.png")
    words = ["--init", str(tmp_path / "photo.png"), "--extend", "32", "0", "0", "0"]
    drawn = pixels(generate(tmp_path / "out", "toybox", *words))
    assert drawn.shape == (64, 64, 3)
    assert np.array_equal(drawn[:, 48:], pixels(photo(32, 64))[:, 16:])
    border = np.broadcast_to(pixels(photo(32, 64))[:, :1], (64, 32, 3))
    assert np.abs(drawn[:, :32] - border).mean() > 10, "what is new is drawn, not the border drawn out"


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(128, 32, (128, 32)), (400, 300, (72, 56)), (20, 20, (64, 64))]
)
def test_a_picture_keeps_its_shape(
    width: int, height: int, expected: tuple[int, int], tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    photo(width, height).save(tmp_path / "photo.png")
    drawn = generate(tmp_path / "out", tiny_models["sd"], "--init", str(tmp_path / "photo.png"))
    assert Images.open(drawn).size == expected


def test_the_mask_covers_every_latent_pixel_that_it_touches() -> None:
    mask = Images.new("L", (64, 64))
    mask.putpixel((13, 22), 255)
    cells = pixels(Initial(photo(), 1.0, mask).in_cells(8))
    assert cells[16:24, 8:16].min() == 255 and cells.sum() == 64 * 255


def test_precisions(tiny_models: dict[str, Path]) -> None:
    """In bf16 the VAE stays in float32, which SDXL's pipeline would change, and nearly the same is drawn."""
    start = Initial(photo(), 0.5, half())
    for kind in UNETS:
        source = Source(str(tiny_models[kind]))
        [expected] = sampling.sample(families.load(source), ["a ball"], [7], initial=start, **DRAW)
        family = families.load(source, torch.bfloat16)
        for initial in (start, Initial(photo(), 0.5)):
            [picture] = sampling.sample(family, ["a ball"], [7], initial=initial, **DRAW)
        [picture] = sampling.sample(family, ["a ball"], [7], initial=start, **DRAW)
        assert family.pipeline.vae.dtype == torch.float32 and family.pipeline.vae.config.force_upcast
        assert np.abs(pixels(picture) - pixels(expected)).mean() < 8


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--mask", "mask.png"), "name the picture too, with --init"),
        (("--strength", "0.5"), "name the picture too, with --init"),
        (("--init", "photo.png", "--strength", "1.5"), "--strength 1.5: between 0"),
        (("--init", "photo.png", "--strength", "0.1"), "less than one step"),
        (("--init", "nowhere.png"), "nowhere.png"),
        (("--init", "photo.png", "--mask", "wide.png"), "another shape"),
        (("--init", "photo.png", "--mask", "black.png"), "black all over"),
        (("--init", "photo.png", "--extend", "8", "8"), "four numbers"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    words: tuple[str, ...],
    expected: str,
    tmp_path: Path,
    tiny_models: dict[str, Path],
    files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    Images.new("L", (64, 32), 255).save(tmp_path / "wide.png")
    Images.new("L", (64, 64)).save(tmp_path / "black.png")
    named = [str(tmp_path / word) if word.endswith(".png") else word for word in words]
    assert expected in refused(capsys, tmp_path / "out", tiny_models["sd"], *named)
