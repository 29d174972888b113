"""The settings that recipes share, in groups. A recipe's `Config` is made of them; each field's docstring is its help.

Read without torch: `finetune train lora --help` must answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["constant", "cosine", "linear"]
Optimizer = Literal["auto", "adamw", "adamw8bit"]


@dataclass(frozen=True)
class Model:
    """The base model."""

    model: str = "toybox"
    """The base: `toybox` (embedded, no download), a hub name, a diffusers folder or a .safetensors checkpoint."""
    revision: str | None = None
    """Branch, tag or commit of a hub model. Pin a commit to be able to repeat a run."""
    model_config: str | None = None
    """For a .safetensors checkpoint: folder or hub name of a diffusers model of the same kind, whose configuration and
    tokenizer are used. Default: the one that diffusers knows for it, from the hub."""


@dataclass(frozen=True)
class Data:
    """The pictures to learn."""

    data: Path
    """Folder of pictures; `name.txt` beside a picture is its caption."""
    prompt: str | None = None
    """Caption of every picture that has no `name.txt`, e.g. "a photo of sks dog"."""
    resolution: int | None = None
    """Side of the training square in pixels. Default: what the model was made for."""
    strict: bool = False
    """Refuse pictures without a caption instead of training them with the prompt."""
    skip: tuple[str, ...] = ()
    """File names in the folder to leave out, e.g. one that cannot be read."""
    background: str = "white"
    """Colour behind transparent pictures: a name or #rrggbb."""
    flip: bool = False
    """Also train the mirror images. Not for subjects with a left and a right (text, faces)."""


@dataclass(frozen=True)
class Prior:
    """Prior preservation: the class is kept as the base knows it (Ruiz et al. 2022, 2208.12242, section 3.3)."""

    prior: Annotated[bool, arg(aliases=["--with-prior"])] = True
    """Train class pictures beside the subject. Needs --class-prompt; --no-prior goes without."""
    class_prompt: str | None = None
    """What the subject is one of, e.g. "a photo of a dog": the caption of the class pictures."""
    class_images: int = 100
    """Number of class pictures. They are drawn by the frozen base with recorded seeds, kept, and topped up."""
    class_data: Path | None = None
    """Your own folder of class pictures, used as it is instead of drawing any."""
    prior_weight: float = 1.0
    """Weight of the class pictures' loss beside the subject's."""
    class_steps: int = 30
    """Denoising steps of a class picture."""
    class_guidance: float = 5.0
    """Guidance scale of the class pictures."""


@dataclass(frozen=True)
class Adapter:
    """The LoRA adapter (Hu et al. 2021, 2106.09685): W x + alpha / rank * B A x."""

    rank: int = 16
    """Rank of the two thin matrices: more follows finer detail, and forgets the base sooner."""
    alpha: float | None = None
    """The adapter is scaled by alpha / rank. Default: the rank, that is a scale of 1."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are dropped while training."""


@dataclass(frozen=True)
class Optim:
    """Optimizer and learning rate."""

    lr: float = 1e-4
    """Learning rate of the denoiser (the UNet)."""
    text_encoder_lr: float | None = None
    """Train the text encoders too, at this rate. Default: they stay frozen."""
    optimizer: Optimizer = "auto"
    """`adamw8bit` (bitsandbytes; state of two bytes a parameter) or `adamw`. `auto`: 8-bit on a GPU, else AdamW."""
    schedule: Schedule = "constant"
    """How the rate goes on after the warm-up."""
    warmup: int = 0
    """Steps over which the rate rises from zero."""
    weight_decay: float = 1e-2
    """Decoupled weight decay (Loshchilov & Hutter 2017, 1711.05101)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 leaves them as they are."""


@dataclass(frozen=True)
class Train:
    """The run."""

    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 1
    """Subject pictures a pass and process. Prior preservation adds as many class pictures."""
    accumulation: int = 1
    """Passes whose gradients are added up before a step."""
    precision: Precision = "fp32"
    """Precision of the forward and backward pass. Trained weights stay fp32; fp16 needs a GPU."""
    seed: int = 0
    """Every draw of the run follows from it."""
    min_snr_gamma: float | None = None
    """Min-SNR loss weighting (Hang et al. 2023, 2303.09556); 5 is usual. Default: no weighting."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    save_every: int = 0
    """Save what was trained every so many steps, beside the end's. 0: only the end's."""


@dataclass(frozen=True)
class Samples:
    """Pictures drawn while training, to watch it."""

    sample_every: int = 0
    """Draw sample pictures every so many steps. 0: never."""
    sample_prompts: tuple[str, ...] = ()
    """What to draw. Default: the training prompt."""
    sample_steps: int = 25
    """Denoising steps of a sample picture."""
    sample_guidance: float = 5.0
    """Guidance scale of the samples."""


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    output: Path
    """A new or empty folder for the run: the trained file, `settings.toml`, `log.jsonl`, samples."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where the curves go besides `log.jsonl`."""
