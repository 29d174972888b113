"""Pictures drawn by a family's pipeline: the same that plain diffusers draws with the same seed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image as Images
from PIL.Image import Image
from torch import Tensor, nn

from finetune import families, objective, prompting
from finetune.errors import Fault
from finetune.families import Family, TakesTokens
from finetune.initial import PICTURE, WHOLE, Initial
from finetune.settings import Loss

FROM_NOISE = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Settings of a scheduler that begins at pure noise, where --zero-terminal-snr trains (Lin et al. 2023, 2305.08891)."""
TOGETHER = 4
"""Pictures that are drawn at once"""


def sample(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative: str = "",
    steps: int,
    guidance: float,
    size: int | None = None,
    batch: int = TOGETHER,
    initial: Initial | None = None,
    weighted: bool = False,
) -> list[Image]:
    """One picture for each (prompt, seed) pair, drawn `batch` at a time.

    Each picture's noise comes from a generator of its own, `torch.Generator("cpu").manual_seed(seed)`: it is the
    picture of plain diffusers with that seed, whatever it is drawn together with (to rounding). Adapters act as they
    are set; the modules' modes are put back. With `initial` it is drawn from a picture, in that one's shape. `weighted`
    reads prompts as `finetune.prompting` says; else they are taken as they are, and cut as in training. Raises Fault
    when the size does not fit the model, and when an inpainting checkpoint is not told what to draw anew.
    """
    _require_whole(family)
    side = _fitting(family, size or family.resolution())
    pairs = list(zip(prompts, seeds, strict=True))
    check(family, initial, steps)
    if initial is not None:
        initial = initial.fitted(side, family.grain())
    pictures: list[Image] = []
    with drawing(family):
        if initial is not None and initial.strength == 0:
            return [_decoded(family, initial.picture)] * len(pairs)
        pipeline, start = _begin(family, initial, side)
        for part, words in _batches(family, pairs, negative, guidance, batch, weighted):
            drawn = pipeline(
                **words,
                **{name: [image] * len(part) for name, image in start.items() if isinstance(image, Image)},
                **{name: number for name, number in start.items() if not isinstance(number, Image)},
                generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in part],
                num_inference_steps=steps,
            ).images
            if initial is not None and initial.mask is not None:
                drawn = [initial.kept(image, family.grain()) for image in drawn]
            pictures += drawn
    return pictures


def everything(family: Family, side: int) -> Initial | None:
    """What an inpainting checkpoint draws a whole picture from: one that is masked all over. For others None.

    Raises Fault for one that changes pictures, which draws none without.
    """
    if families.takes_source(family):
        raise Fault(
            "the model is an instruct-pix2pix checkpoint, which changes a picture that it is given, and draws none "
            "from words alone: no class pictures (--no-prior, or --prior-from base), no figures, no card. "
            "`finetune generate --init PICTURE` draws with it."
        )
    if not families.takes_mask(family):
        return None
    return Initial(Images.new("RGB", (side, side)), 1.0, Images.new("L", (side, side), 255))


def asks(family: Family) -> str:
    """What `finetune generate` is to be given besides a prompt."""
    if families.takes_source(family):
        return " --init PICTURE"
    return " --init PICTURE --mask MASK" if families.takes_mask(family) else ""


Pairs = list[tuple[str, int]]
"""Prompts and seeds"""


def _batches(
    family: Family, pairs: Pairs, negative: str, guidance: float, batch: int, weighted: bool
) -> Iterator[tuple[Pairs, dict[str, Any]]]:
    """What is drawn together, and its prompts as the pipeline takes them.

    Prompts of different lengths in chunks are not drawn together: none is changed by the others' lengths.
    """
    if weighted and not isinstance(family, TakesTokens):
        pairs = [(prompting.unweighted(family, prompt), seed) for prompt, seed in pairs]
        negative, weighted = prompting.unweighted(family, negative), False
    if not weighted:
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            asked = [prompt for prompt, _ in part]
            if prompting.is_read_otherwise(family):
                yield part, {**prompting.without_marks(family, asked, negative), "guidance_scale": guidance}
            else:
                yield part, family.words(asked, negative, guidance)
        return
    read = {text: prompting.read(family, text) for text in {negative, *(prompt for prompt, _ in pairs)}}
    for _, alike in groupby(pairs, lambda pair: max(read[pair[0]].length, read[negative].length)):
        group = list(alike)
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            told = prompting.arguments(family, [read[prompt] for prompt, _ in part], read[negative])
            yield part, {**told, "guidance_scale": guidance}


def _begin(family: Family, initial: Initial | None, side: int) -> tuple[Any, dict[str, Any]]:
    """The pipeline that draws, and what it begins with; pictures are those of one drawing."""
    if initial is None:
        return family.pipeline, {"height": side, "width": side}
    start: dict[str, Any]
    if families.takes_source(family):
        made: Any = type(family.pipeline)
        start = {"image": initial.picture, "image_guidance_scale": initial.guidance or PICTURE}
    else:
        made = family.from_picture if initial.mask is None else family.inpaint
        start = {"image": initial.picture, "strength": initial.strength}
    if initial.mask is not None:
        start |= {"mask_image": initial.in_cells(family.grain())}
    if "height" in inspect.signature(made.__call__).parameters:  # image-to-image of SD 1.x and SDXL takes the picture's
        start |= {"height": initial.picture.height, "width": initial.picture.width}
    return families.sibling(family.pipeline, made), start


def _decoded(family: Family, picture: Image) -> Image:
    """What the VAE makes of a picture."""
    vae, processor = family.pipeline.vae, family.pipeline.image_processor
    latents = vae.encode(processor.preprocess(picture).to(vae.device)).latent_dist.mode()
    [decoded] = processor.postprocess(vae.decode(latents).sample, "pil")
    return decoded


def as_trained(family: Family, loss: Loss) -> None:
    """From here on the pipeline draws as it is trained, and says so where it is saved.

    Raises Fault when the model cannot be trained with these settings.
    """
    objective.check(loss, family.objective().prediction)
    if loss.zero_terminal_snr:
        begin_at_noise(family)


def begin_at_noise(family: Family) -> None:
    """Draw from pure noise on: with the model's own scheduler, or DDIM where it cannot (PNDM, say)."""
    own = family.pipeline.scheduler
    knows = FROM_NOISE.keys() <= inspect.signature(type(own).__init__).parameters.keys()
    family.pipeline.scheduler = (type(own) if knows else DDIMScheduler).from_config(own.config, **FROM_NOISE)


@contextmanager
def drawing(family: Family) -> Iterator[None]:
    """What calls the pipeline stands in this: no gradients, evaluation modes, each part in its own precision."""
    with torch.no_grad(), inference(family), _precision(family):
        yield


@contextmanager
def inference(family: Family) -> Iterator[None]:
    """Every module in evaluation mode; afterwards each in the mode it was in."""
    modes = [(part, part.training) for module in families.modules(family).values() for part in module.modules()]
    try:
        for module in families.modules(family).values():
            module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _precision(family: Family) -> Iterator[None]:
    """Autocast when denoiser and text encoders differ (float32 where they train, bf16 where frozen), as in training.

    The VAE works in the precision of its own weights, which may be another, and which no pipeline changes meanwhile.
    """
    vae, encode, decode = family.pipeline.vae, family.pipeline.vae.encode, family.pipeline.vae.decode
    upcast = vae.config.get("force_upcast")

    def decode_in_own(latents: Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast(vae.device.type, enabled=False):
            return decode(latents.to(_dtype(vae)), *args, **options)

    def encode_in_own(pictures: Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast(vae.device.type, enabled=False):
            parameters = encode(pictures.to(_dtype(vae)), *args, **options).latent_dist.parameters
        return AutoencoderKLOutput(DiagonalGaussianDistribution(parameters.to(pictures.dtype)))

    predicting = {_dtype(part) for part in (families.denoiser(family), *families.text_encoders(family).values())}
    lowest = min(predicting, key=lambda dtype: dtype.itemsize)
    vae.encode, vae.decode = encode_in_own, decode_in_own
    vae.register_to_config(force_upcast=False)
    try:
        with nullcontext() if len(predicting) == 1 else torch.autocast(vae.device.type, dtype=lowest):
            yield
    finally:
        vae.register_to_config(force_upcast=upcast)
        del vae.encode, vae.decode


def _dtype(module: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in module.parameters())


def _fitting(family: Family, size: int) -> int:
    factor = family.grain()
    if size < factor or size % factor:
        nearest = max(round(size / factor), 1) * factor
        raise Fault(f"size {size}: this model draws sides that are multiples of {factor}; the nearest is {nearest}.")
    return size


def check(family: Family, initial: Initial | None, steps: int) -> None:
    """Raises Fault where the model wants to be told what to draw anew, and where no step would be taken."""
    if families.takes_mask(family) and (initial is None or initial.mask is None):
        raise Fault(
            "the model is an inpainting checkpoint, which draws a part of a picture anew: give it the picture (--init) "
            "and what to draw anew (--mask or --extend)."
        )
    if families.takes_source(family):
        if initial is None or initial.mask is not None:
            raise Fault(
                "the model is an instruct-pix2pix checkpoint, which changes a whole picture: give it that (--init), "
                "without --mask and --extend."
            )
        if initial.strength != WHOLE:
            raise Fault(
                f"--strength {initial.strength:g}: an instruct-pix2pix checkpoint has none; --picture-guidance says "
                "how strictly it keeps to the picture."
            )
        return
    if initial is not None and initial.guidance is not None:
        raise Fault(f"--picture-guidance {initial.guidance:g}: only instruct-pix2pix checkpoints know it. --strength?")
    if initial is not None and (family.from_picture if initial.mask is None else family.inpaint) is None:
        raise Fault(f"--init: there is no drawing from a picture with {family.title} here.")
    if initial is not None and initial.strength > 0 and int(steps * initial.strength) < 1:
        raise Fault(
            f"--strength {initial.strength:g} of --steps {steps} is less than one step. Take more steps, or strength 0."
        )


def _require_whole(family: Family) -> None:
    names = ("vae", family.denoiser_name, *family.text_encoder_names)
    parts = [name for name in names if name not in family.optional_parts]
    released = [name for name in parts if getattr(family.pipeline, name) is None]
    if released:
        raise ValueError(f"{', '.join(released)} was released: call families.restore before drawing")
