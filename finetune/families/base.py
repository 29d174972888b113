"""The questions that every model family answers. One small file a family; nothing outside it knows the answers.

A family wraps a diffusers pipeline: loading, prompt encoding, sampling and saving stay diffusers' own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.families.checkpoint import Part
from finetune.families.original import Joined, Layout
from finetune.objective import Diffusion, Flow, Objective
from finetune.quiet import quiet

EDITING = StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline
CLIENTS = ("diffusers", "sd-scripts", "ComfyUI", "A1111", "Forge", "InvokeAI")


@dataclass(frozen=True)
class Edition:
    """One of the base models of a family that files are published for: what headers call it, and its sizes."""

    title: str
    version: str
    """`ss_base_model_version`"""
    architecture: str
    """`modelspec.architecture`, to which adapters add a kind ("/lora")"""
    implementation: str
    """`modelspec.implementation` of its adapters"""
    width: int
    """Of the text that the denoiser attends to"""
    resolution: int
    """Side in pixels"""
    prediction: Literal["epsilon", "v"] | None = "epsilon"
    """None where it is not known, and for flows, for which headers have no word."""
    second: bool = False
    """`ss_v2`: of Stable Diffusion's second generation"""
    clip_skip: int | None = None
    """`ss_clip_skip`: which of the text encoder's layers is taken, 1 being the last; None where it is not told."""
    tag: str = "stable-diffusion"
    """What the hub finds its models by"""
    site: str = "Other"
    """What Civitai calls it"""
    webui: str = "Unknown"
    """What AUTOMATIC1111's sidecars call it"""
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    """Configurations of the denoiser and the text encoders, where they are not their classes' defaults"""


@dataclass(frozen=True)
class Published:
    """What adapter files of the family are known by where kohya's names are read, which is nearly everywhere."""

    text: tuple[str, ...]
    """Prefixes of the text encoders' layers, in the pipeline's order."""
    original: Layout | None
    """Where a UNet's layers go by the original code's names; None: by diffusers' own."""
    widths: tuple[int, ...]
    """Widths of the text that the denoiser attends to, by which clients know a family."""
    versions: tuple[str, ...]
    """What `ss_base_model_version` may begin with, the longest first."""
    architectures: tuple[str, ...]
    """What `modelspec.architecture` may begin with."""
    editions: tuple[Edition, ...] = ()
    """Its base models; of those with the same width the likeliest first."""
    classes: Mapping[str, type] = field(default_factory=dict)
    """Classes of the denoiser and the text encoders"""
    joined: Joined | None = None
    """What a transformer's layers are called; None: it has no names by which kohya's programs know it."""
    translated: bool = True
    """Whether diffusers reads kohya's names of it."""
    single_file: bool = True
    """Whether whole models of it are written as one file, see `Family.original_parts`."""
    clients: tuple[str, ...] = CLIENTS
    """The programs of which is known what they make of its files, see `finetune.export.clients`."""

    def edition(self, said: Mapping[str, str], width: int | None) -> Edition:
        """The one that a header tells, or else the likeliest: by the width of the text, if that is known."""
        told = said.get("ss_base_model_version"), said.get("modelspec.architecture", "").partition("/")[0]
        for edition in self.editions:
            if told[0] == edition.version or (not told[0] and told[1] == edition.architecture):
                return edition
        alike = [edition for edition in self.editions if edition.width == width] or list(self.editions[:1])
        return alike[0] if len(alike) == 1 else replace(alike[0], prediction=None)


Conditions: TypeAlias = dict[str, Tensor]
"""What the denoiser is told about the pictures besides their noise: tensors by name, each (B, ...)."""
BESIDE = "beside"
"""The condition that some checkpoints have besides those of prompts, as further channels beside the noised latents, see
`takes_mask` and `takes_source`"""


class Family(Protocol):
    """A pipeline and how it is trained. Pictures are (B, 3, H, W) in [-1, 1]; latents (B, C, H/f, W/f)."""

    title: ClassVar[str]
    """The name that people know, e.g. "Stable Diffusion 1.x / 2.x"."""
    denoiser_name: ClassVar[str]
    """The pipeline's name of the module that predicts: "unet", "transformer"."""
    text_encoder_names: ClassVar[tuple[str, ...]]
    """The pipeline's names of the text encoders, in its order."""
    attends_to: ClassVar[str | None]
    """The condition that the denoiser's cross-attention makes keys and values of, as it is; None: it attends to prompt
    and picture together."""
    adapter_targets: ClassVar[tuple[str, ...]]
    """Ends of the denoiser's module names that an adapter is put on by default."""
    text_adapter_targets: ClassVar[tuple[str, ...]]
    """The same for the text encoders."""
    trained_text_encoders: ClassVar[tuple[str, ...]]
    """Those of the text encoders that can be trained: whose adapters diffusers loads."""
    optional_parts: ClassVar[tuple[str, ...]]
    """Parts that a checkpoint may do without."""
    embedding_names: ClassVar[tuple[str, ...]]
    """What files of new words (textual inversion) call the vectors of each text encoder, "" being the word itself.
    Empty: it is taught no words."""
    published: ClassVar[Published]
    """Its names in adapter files."""
    from_picture: ClassVar[type[DiffusionPipeline] | None]
    """diffusers' pipeline of the same parts that draws from a picture (image-to-image); None: there is none."""
    inpaint: ClassVar[type[DiffusionPipeline] | None]
    """The one that draws a part of a picture anew."""

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The diffusers pipeline, which holds the parts by their names; a part that was released is None."""
        ...

    def edition(self) -> Edition:
        """What headers of files for this checkpoint say that it is."""
        ...

    def original_parts(self) -> dict[str, Part]:
        """The parts of the pipeline that a single-file checkpoint holds, by name, and what they are in it.

        None where no such file is written, which `Published.single_file` says.
        """
        ...

    def objective(self) -> Objective:
        """What the checkpoint was trained to predict, read from its scheduler."""
        ...

    def resolution(self) -> int:
        """Side in pixels that the checkpoint was made for."""
        ...

    def multiple(self) -> int:
        """What the sides of a picture in pixels must be multiples of to be trained."""
        ...

    def grain(self) -> int:
        """What they must be multiples of to be drawn."""
        ...

    def latents(self) -> tuple[int, int]:
        """C and f: channels of the latents, and the side of a picture over theirs."""
        ...

    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) -> mean and std of their latents, in the scale that the denoiser works in."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """Prompts -> conditions. Gradients flow into the text encoders where they are being trained."""
        ...

    def words(self, prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
        """What the pipeline is called with to draw these prompts, so guided, against that one ("": none).

        Raises Fault where it knows no negative prompt.
        """
        ...

    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the conditions of one prompt, told by the denoiser alone: the encoders may be out of memory."""
        ...

    def predict(self, noised: Tensor, timesteps: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        """The denoiser's prediction, (B, C, h, w). timesteps: (B,), as the objective tells them. sizes: (B, 6), see
        `finetune.data.Geometry`; ignored by most families."""
        ...


@runtime_checkable
class TakesTokens(Protocol):
    """A family whose prompts may be put together of tokens, in chunks: see `finetune.prompting`."""

    own_layer: ClassVar[int]
    """Which layer of its text encoders it was made with: 1 is the last."""
    clip_skip: int
    """Which is read"""
    chunks: int
    """In how many chunks prompts are read, see `prompting.conditions`"""

    def encode_tokens(self, tokens: Sequence[Tensor]) -> Conditions:
        """Tokens (B, 77), one tensor for each tokenizer, begin and end included -> conditions, as of prompts."""
        ...


def chunks(family: Family) -> int:
    """In how many chunks its captions and prompts are read."""
    return family.chunks if isinstance(family, TakesTokens) else 1


def denoiser(family: Family) -> nn.Module:
    return getattr(family.pipeline, family.denoiser_name)


def precision(part: nn.Module) -> torch.dtype:
    """What a part is given its inputs in: diffusers' `part.dtype`, which walks through all layers each time."""
    return next(weight.dtype for weight in part.parameters() if weight.is_floating_point())


@contextmanager
def aside(family: Family) -> Iterator[None]:
    """Inside, the denoiser is in the CPU's memory, so that a GPU has room for what is computed without it. (One that
    bitsandbytes has quantised stays: it is small, and not made to be moved.)"""
    part: Any = denoiser(family)
    device = part.device
    if device.type == "cpu" or any(type(parameter) is not nn.Parameter for parameter in part.parameters()):
        yield
        return
    part.to("cpu")
    try:
        yield
    finally:
        part.to(device)


def blocks(family: Family) -> list[nn.Module]:
    """The denoiser's blocks, which hold nearly all of its weights: the innermost of those parts that diffusers says are
    not to be taken apart; in a UNet's order from one end to the other."""
    part: Any = denoiser(family)
    named = set(part._no_split_modules or ())
    found = {path: module for path, module in part.named_modules() if type(module).__name__ in named}
    inner = [path for path in found if not any(other.startswith(f"{path}.") for other in found)]
    return [found[path] for path in sorted(inner, key=lambda path: path.partition(".")[0])]  # down, mid, up


def keys_values(family: Family) -> list[nn.Linear]:
    """The layers that make keys and values of the prompt alone, before an adapter is on them."""
    attending = [m for m in denoiser(family).modules() if isinstance(m, Attention) and m.is_cross_attention]
    return [layer for one in attending for layer in (one.to_k, one.to_v)]


def takes_mask(family: Family) -> bool:
    """Whether the denoiser is told what is drawn anew, 1 there, and the latents of the picture without it, together
    (B, 1 + C, h, w): an inpainting checkpoint."""
    part: Any = denoiser(family)
    return int(part.config.in_channels) == 2 * family.latents()[0] + 1


def takes_source(family: Family) -> bool:
    """Whether it is told the latents of a picture to change, (B, C, h, w): an instruct-pix2pix checkpoint (Brooks et
    al. 2022, 2211.09800)."""
    return isinstance(family.pipeline, EDITING)


def beside(family: Family) -> int:
    """How many channels the denoiser is given beside the noised latents."""
    channels = family.latents()[0]
    return 1 + channels if takes_mask(family) else channels if takes_source(family) else 0


def encode_sources(family: Family, pictures: Tensor) -> Tensor:
    """The latents of pictures to change, (B, C, h, w), float32: their modes, without the scale that others have.

    (CosXL's edition of SDXL, which says so in its pipeline's configuration, has them scaled.)
    """
    mean, _ = family.encode_pictures(pictures)
    if family.pipeline.config.get("is_cosxl_edit"):
        return mean
    vae: Any = modules(family)["vae"]
    return mean / vae.config.scaling_factor


def with_beside(noised: Tensor, conditions: Conditions) -> Tensor:
    """What a UNet is given: the noised latents, and behind them what stands beside them, where something does."""
    return torch.cat([noised, conditions[BESIDE].to(noised)], dim=1) if BESIDE in conditions else noised


def sibling(pipeline: Any, kind: Any) -> Any:
    """Another of diffusers' pipelines of the very same parts and settings; the pipeline itself where it is of that."""
    if isinstance(pipeline, kind):
        return pipeline
    taken = inspect.signature(kind.__init__).parameters
    settings = {name: pipeline.config[name] for name in taken if name in pipeline.config}
    with quiet():
        made = kind(**{**settings, **pipeline.components})
    made.set_progress_bar_config(disable=True)
    return made


def text_encoders(family: Family) -> dict[str, nn.Module]:
    """The text encoders that the pipeline holds at the moment, by name."""
    held = {name: getattr(family.pipeline, name) for name in family.text_encoder_names}
    return {name: module for name, module in held.items() if module is not None}


def tokenizers(family: Family) -> list[Any]:
    """The tokenizers of the text encoders that the checkpoint has, in their order."""
    found = [getattr(family.pipeline, name.replace("text_encoder", "tokenizer")) for name in family.text_encoder_names]
    return [tokenizer for tokenizer in found if tokenizer is not None]


def modules(family: Family) -> dict[str, nn.Module]:
    """Every weight-bearing part that the pipeline holds at the moment, by name."""
    return {name: part for name, part in family.pipeline.components.items() if isinstance(part, nn.Module)}


def freeze(family: Family) -> None:
    """No parameter is trained until something says so; modules behave as in inference."""
    for module in modules(family).values():
        module.requires_grad_(False).eval()


def diffusion(pipeline: DiffusionPipeline) -> Diffusion:
    """The objective of a discrete-time diffusion model: its scheduler's noise schedule, as it is used in training."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    return Diffusion(scheduler.alphas_cumprod, scheduler.config.prediction_type)


def flow(pipeline: DiffusionPipeline) -> Flow:
    """The objective of a rectified flow: its scheduler's shares of noise, shifted as in training.

    (Where the shift depends on a picture's size, it is for drawing; diffusers' training scripts leave it out too.)
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    return Flow(scheduler.sigmas.flip(0))


def guided(prompts: Sequence[str], negative: str, guidance: float) -> dict[str, Any]:
    """`Family.words` of classifier-free guidance (Ho & Salimans 2022, 2207.12598)."""
    # SDXL takes no negative prompt and an empty one differently; no words mean none, as without the option.
    against = [negative] * len(prompts) if negative else None
    return {"prompt": list(prompts), "negative_prompt": against, "guidance_scale": guidance}


def tokens(pipeline: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """(B, 77), as diffusers has them: what is longer is cut."""
    words = pipeline.maybe_convert_prompt(list(prompts), tokenizer)  # textual inversions may be of several vectors
    told = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return tokenizer(words, return_tensors="pt", **told).input_ids


def zeroed(pipeline: Any, prompts: Sequence[str], conditions: Conditions) -> Conditions:
    """Zeros for empty prompts, where the pipeline draws so without words (SDXL's authors have trained so)."""
    if not pipeline.config.get("force_zeros_for_empty_prompt"):
        return conditions
    said = torch.tensor([bool(prompt) for prompt in prompts])
    return {
        name: torch.where(said.to(value.device).reshape(-1, *[1] * (value.ndim - 1)), value, torch.zeros_like(value))
        for name, value in conditions.items()
    }


def skeleton(published: Published, edition: Edition) -> dict[str, nn.Module]:
    """The denoiser and the text encoders of an edition without their weights (on the device "meta"), by name."""
    with torch.device("meta"):
        return {name: _empty(made, edition.parts.get(name, {})) for name, made in published.classes.items()}


def _empty(made: Any, config: Mapping[str, Any]) -> nn.Module:
    module: nn.Module = made(made.config_class(**config)) if issubclass(made, PreTrainedModel) else made(**config)
    return module


def unet_multiple(pipeline: Any) -> int:
    """The VAE's factor times the UNet's, of whose levels all but the last halve the sides: 64 for SD 1.x, 32 for XL."""
    return int(pipeline.vae_scale_factor) * 2 ** (len(pipeline.unet.config.down_block_types) - 1)


def encode_with_vae(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of an AutoencoderKL's latents, shifted and scaled as its configuration says.

    Each (B, C, H/f, W/f), float32. The scale makes latents unit-variance (Rombach et al. 2021, 2112.10752, appendix G).
    """
    pictures = pictures.to(vae.device, vae.dtype)
    if vae.device.type == "cpu":  # where convolutions take a quarter less time so, and half the memory
        vae.encoder.to(memory_format=torch.channels_last)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
    scale = vae.config.scaling_factor
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale
