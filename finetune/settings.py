"""The settings that recipes share, in groups. A recipe's `Config` is made of them; each field's docstring is its help.

Read without torch: `finetune train lora --help` must answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Suppress, arg

Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["constant", "cosine", "linear", "polynomial"]
Method = Literal["lora", "dora", "loha", "lokr", "oft", "boft", "ia3"]
Quantization = Literal["nf4", "int8"]
Part = Literal[
    "attention", "self-attention", "cross-attention", "kv", "feed-forward", "norm", "conv", "down", "mid", "up"
]
Optimizer = Literal[
    "auto", "adamw", "adamw8bit", "pagedadamw8bit", "lion8bit", "adafactor", "prodigy", "schedulefree", "came"
]


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
    quantize: Quantization | None = None
    """Hold the frozen weights of the denoiser's linear layers, and of T5's or Qwen3's, in 4 bits (nf4: QLoRA, Dettmers
    et al. 2023, 2305.14314) or 8 (int8, 2208.07339). Under an adapter alone, and not under each: docs/methods.md."""
    offload_blocks: bool = False
    """Keep the frozen weights of the denoiser's blocks in the CPU's memory, and bring each block to the GPU for its own
    pass, the next one meanwhile: two blocks are held at a time. The same training, in more time. Under
    adapters and new words, in one process; docs/memory.md."""
    cache_kv: bool = False
    """Keep the frozen weights that make cross-attention's keys and values in the CPU's memory, and with them what they
    make of each caption, computed once; a step has that sent in. The same training, to rounding. Under adapters, for
    Stable Diffusion 1.x, 2.x and XL, the text encoders frozen, in one process; docs/memory.md."""
    clip_skip: int | None = None
    """Which layer of CLIP is read, as clients count: 1 is the last, 2 the last but one (diffusers' clip_skip=1).
    Default: the checkpoint's own, 1 for Stable Diffusion 1.x and 2.x, 2 for XL; of adapters that are drawn with, what
    their files say."""
    text_chunks: int | None = None
    """Read captions and prompts in so many chunks of 75 tokens, for Stable Diffusion 1.x, 2.x and XL: longer ones are
    cut, shorter ones filled up with empty chunks (3: kohya's --max_token_length 225). Default: 1; `finetune generate`
    takes what the adapters say, and more where a prompt needs more."""


@dataclass(frozen=True)
class Concept:
    """One of several things that a run learns: a `[[concepts]]` table. What it leaves out is as in `[data]`."""

    data: str
    """Its pictures, as in `[data]`."""
    prompt: str | None = None
    """Caption of its pictures that have none of their own."""
    trigger: str | None = None
    """The word that stands for it."""
    template: str | None = None
    """How its captions are made."""
    class_prompt: tuple[str, ...] = ()
    """What it is one of; its class pictures are drawn with these."""
    class_data: Path | None = None
    """Its own folder of class pictures."""
    repeats: int = 1
    """How often an epoch sees each of its pictures."""
    weight: float = 1.0
    """Weight of its pictures' loss."""
    masks: Path | None = None
    """Its folder of masks."""
    sources: Path | None = None
    """Its folder of pictures to change."""
    alpha_masks: bool | None = None
    """Take its pictures' own transparency as their masks."""
    validation: float | None = None
    """Share of its pictures that is held out of the training."""


@dataclass(frozen=True)
class Data:
    """The pictures to learn."""

    data: str | None = None
    """Folder of pictures, with `name.txt` captions or a metadata.jsonl / .csv beside them; or `hf:NAME` for a data set
    that the library `datasets` reads, from the hub or a folder."""
    split: str = "train"
    """Split of a `hf:` data set."""
    image_column: str = "image"
    """Its column of pictures."""
    caption_column: str | None = None
    """Its column of captions. Default: the one of text, caption, captions, prompt that is there."""
    streaming: bool = False
    """Read a `hf:` data set as it comes instead of downloading it whole first."""
    limit: int | None = None
    """Take only so many rows of a `hf:` data set."""
    prompt: str | None = None
    """Caption of every picture that has none of its own, e.g. "a photo of sks dog"."""
    trigger: str | None = None
    """The word that stands for the subject or style, e.g. sks."""
    template: str | None = None
    """How a caption is made of the trigger and the picture's own caption. With a trigger it is "{trigger}, {caption}",
    unless the caption holds the trigger already."""
    strict: bool = False
    """Refuse pictures without a caption instead of training them with the prompt."""
    skip: tuple[str, ...] = ()
    """File names in the folder to leave out, e.g. one that cannot be read."""
    background: str = "white"
    """Colour behind transparent pictures: a name or #rrggbb."""
    masks: Path | None = None
    """Folder of masks, one of the same name for a picture: white is trained, black is not."""
    alpha_masks: bool = False
    """Take a picture's own transparency as its mask."""
    cache: Path | None = None
    """Where latents and text embeddings are kept between runs. Default: below $FINETUNE_CACHE or ~/.cache/finetune."""
    use_cache: bool = True
    """Keep them on disk, and use what is there. --no-use-cache computes them in memory."""
    holes: int = 8
    """For an inpainting checkpoint: number of masks that each picture is trained with, drawn at random. Each is encoded
    ahead, and cached."""
    sources: Path | None = None
    """For an instruct-pix2pix checkpoint: folder of the pictures that are changed, one of the same name for a picture,
    which shows the result; its caption says what is done, e.g. "make it night"."""
    source_dropout: float = 0.05
    """Share of the draws that train it without the caption, without the source, and without both, each so often: what
    its two guidances are between (Brooks et al. 2022, 2211.09800, section 3.2)."""
    validation: float = 0.0
    """Share of the pictures that is held out of the training. Their loss is measured at each checkpoint, always at the
    same noise and timesteps, and the checkpoint where it is lowest is kept, unless --measure chooses one."""
    concepts: Annotated[tuple[Concept, ...], Suppress] = ()
    """Several things to learn at once: `[[concepts]]` tables in TOML, instead of `data`."""


@dataclass(frozen=True)
class Captions:
    """What is made of a picture's captions. Every draw follows from the seed."""

    several_captions: bool = False
    """Each line of `name.txt` is a caption of its own, one of which is drawn each time."""
    shuffle_tags: bool = False
    """Shuffle the tags, which commas part."""
    keep_tags: int = 1
    """The first tags, which stay where they are and are never dropped."""
    tag_dropout: float = 0.0
    """Share of the tags that is left out each time."""
    caption_dropout: float = 0.0
    """Share of the draws that train the empty prompt instead (0.1 helps guidance, Ho & Salimans 2022, 2207.12598)."""
    caption_variants: int = 8
    """Number of shufflings a caption is trained in. Each is encoded ahead, and cached."""


@dataclass(frozen=True)
class Framing:
    """How pictures are scaled and cropped."""

    resolution: tuple[int, ...] = ()
    """Side in pixels of the square whose area is trained; with several, each picture is trained at each. Default: what
    the model was made for."""
    buckets: bool = True
    """Train each picture near its own aspect ratio. --no-buckets crops all to squares."""
    max_upscale: float = 2.0
    """Enlarge a picture at most so far. Smaller ones are trained at less than full size, down to half the side."""
    min_kept: float = 0.5
    """Refuse pictures of which less than this share would be trained."""
    crop: Literal["centre", "random", "focus"] = "centre"
    """What is kept where a picture is cropped: the centre, several random places, or the focus (a point, the mask)."""
    crop_variants: int = 4
    """Number of places of `--crop random`. Each is encoded once, and cached."""
    focus: tuple[float, float] | None = None
    """The point to keep in view, as shares of width and height from the top left. Default: the middle of the mask."""
    flip: bool = False
    """Also train the mirror images. Not for subjects with a left and a right (text, faces)."""


@dataclass(frozen=True)
class Prior:
    """Prior preservation: the class is kept as the base knows it (Ruiz et al. 2022, 2208.12242, section 3.3)."""

    prior: Annotated[bool, arg(aliases=["--with-prior"])] = True
    """Train the class beside the subject. Needs --class-prompt or --class-word; --no-prior goes without."""
    prior_from: Literal["pictures", "base"] = "pictures"
    """`pictures`: class pictures, which the frozen base draws. `base`: none; the subject's own pictures under the class
    prompt, held to what the frozen base predicts of them."""
    class_prompt: tuple[str, ...] = ()
    """What the subject is one of, e.g. "a photo of a dog": the caption of the class pictures. Several take turns."""
    class_word: str | None = None
    """Make the class prompts from the captions: their trigger is replaced by this word, e.g. dog."""
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
class Slider:
    """A direction between two prompts, along which the adapter's strength goes (Gandikota et al. 2023, 2311.12092)."""

    target: str = ""
    """What is changed, e.g. "a photo of a person"."""
    positive: str = ""
    """Where strengths above 0 lead, e.g. "a photo of a very old person"."""
    negative: str = ""
    """Where strengths below 0 lead, e.g. "a photo of a very young person"."""
    preserve: tuple[str, ...] = ()
    """What must not change with it, e.g. man woman: the direction is the mean of those with each of them put behind
    both prompts, and what the two prompts differ in beside what they say is left out (eq. 8)."""
    eta: float = 4.0
    """How far strength 1 leads: times the difference of the two prompts."""
    target_images: int = 50
    """Number of pictures to learn on. The frozen base draws them, as class pictures are, by the prompt --target."""
    target_steps: int = 30
    """Denoising steps of such a picture."""
    target_guidance: float = 5.0
    """Guidance scale of such a picture."""
    strengths: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    """Those that samples, and the pictures of `finetune publish`, show it at."""
    cache: Path | None = None
    """Where latents and text embeddings are kept between runs. Default: below $FINETUNE_CACHE or ~/.cache/finetune."""
    use_cache: bool = True
    """Keep them on disk, and use what is there. --no-use-cache computes them in memory."""


@dataclass(frozen=True)
class Adapter:
    """What is put beside the base's weights to be trained."""

    method: Method = "lora"
    """How a change is written down. `lora`: W + alpha / rank * B A, two thin matrices (Hu et al. 2021, 2106.09685).
    `dora`: the same, each row's length trained beside it (Liu et al. 2024, 2402.09353). `loha`: the product, entry by
    entry, of two such products (Hyeon-Woo et al. 2021, 2108.06098). `lokr`: a Kronecker product (Yeh et al. 2023,
    2309.14859), the smallest that still changes whole matrices. `oft`: what goes into a layer is turned, in blocks of
    `--rank` (Qiu et al. 2023, 2306.07280), which keeps angles between the rows. `boft`: turned several times, in blocks
    that overlap as a butterfly's wings (Liu et al. 2023, 2311.06243). `ia3`: a factor for each row or column
    (Liu et al. 2022, 2205.05638), the smallest files. docs/methods.md says when to take which."""
    rank: int = 16
    """Rank of the thin matrices: more follows finer detail, and forgets the base sooner. (IA)3 has none."""
    alpha: float | None = None
    """The adapter is scaled by alpha / rank, in layers of another rank too. Default: the rank, that is a scale of 1."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks for some layers: `attn2=32 down_blocks.0=4`, each for the layers with such a part in their path. Of
    several that fit, the last one counts."""
    alpha_pattern: tuple[str, ...] = ()
    """Other alphas for some layers, in the same way."""
    conv_rank: int | None = None
    """Adapt the convolutions of the denoiser's blocks too, at this rank (LoCon, Yeh et al. 2023, 2309.14859): for
    styles and textures. Default: attention alone."""
    rslora: bool = False
    """Rank-stabilised: scaled by alpha / sqrt(rank), so that high ranks learn no slower (Kalajdzievski 2023,
    2312.03732)."""
    dropout: float = 0.0
    """Share of the adapter's inputs (LoHa, LoKr: of the change's rows; OFT, BOFT: of the blocks) that are dropped while
    training."""
    factor: int = -1
    """Of LoKr: into how many parts the sides of a weight are divided for the first factor; 4 to 16 is usual, fewer is a
    larger file. -1: such that both factors are as alike as can be, the smallest file."""
    butterflies: int = 2
    """Of BOFT: how often inputs are turned. Each time doubles the inputs that have to do with one another, and takes as
    many weights again."""
    init: Literal["default", "pissa", "olora"] = "default"
    """What it begins with. `default`: a change of zero. `pissa`: the largest singular values of the weight (Meng et al.
    2024, 2404.02948), `olora`: its QR factors (Buyukakyuz 2024, 2406.01775), both taken off again, so that the base
    stays as it is; they learn faster at first, and the file is twice as large."""
    lora_plus_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024, 2402.12354); 16 is usual, at a lower --lr."""


@dataclass(frozen=True)
class Words:
    """New words of the text encoders (textual inversion, Gal et al. 2022, 2208.01618)."""

    word: tuple[str, ...] = ()
    """The new words, as the captions have them: small letters, digits, - and _. Each becomes a file of its name.
    Default: the trigger, or those of the concepts."""
    vectors: int = 4
    """Vectors of each word: more hold finer detail, take as many of a prompt's 75 places, and are harder to change by
    what else a prompt says; 1 to 8 are usual."""
    init_words: str | None = None
    """Words of the base that the vectors begin as, e.g. "toy": what is learned is a kind of it. Several share out the
    vectors. Default: random vectors, as far out as the base's words are."""


@dataclass(frozen=True)
class Pivot:
    """First the word, then the adapter around it (pivotal tuning, Roich et al. 2021, 2106.05744)."""

    word_lr: float = 1e-3
    """Learning rate of the word's vectors."""
    word_until: float = 0.5
    """Share of the steps after which the vectors are held; 1 trains them to the end."""
    adapter_from: float = 0.5
    """Share of the steps before which the adapter rests; 0 trains both from the beginning."""


@dataclass(frozen=True)
class Full:
    """The denoiser's weights train: which of them, and how they are held and stepped where memory is short."""

    parts: tuple[Part, ...] = ()
    """Train these parts of the denoiser alone: its attention (to itself, to the text), the keys and values of what
    attends to the text (kv: Custom Diffusion, Kumari et al. 2022, 2212.04488), feed-forward layers, norms,
    convolutions, or its blocks on the way down, in the middle, on the way up. Default: all of it."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Precision of the weights that train. bf16 takes half the memory; what a step leaves of each weight is rounded up
    or down by chance, so that small steps add up (Zamirai et al. 2020, 2010.06192). It needs --precision bf16."""
    optimizer_in_backward: bool = False
    """Step each weight as soon as its gradient is known and free that: the gradients of the whole model are never held
    together, unless a step has several passes. The same training to the bit; needs --max-grad-norm 0. When a gradient
    is not finite, other weights may have stepped: the run goes on from the last checkpoint."""


@dataclass(frozen=True)
class Optim:
    """Optimizer and learning rate."""

    lr: float = 1e-4
    """Learning rate of the denoiser (the UNet)."""
    text_encoder_lr: float | None = None
    """Train the text encoders too, at this rate. Default: they stay frozen."""
    optimizer: Optimizer = "auto"
    """`auto`: adamw8bit (bitsandbytes; state of two bytes a parameter) on a GPU, else adamw. `prodigy` finds the rate
    itself (--lr 1), `schedulefree` needs no schedule; the README says which libraries they come from."""
    schedule: Schedule = "constant"
    """How the rate goes on after the warm-up: as it is, or falling to zero at the last step."""
    schedule_power: float = 2.0
    """Exponent of `--schedule polynomial`: the rate is lr * (share of the steps that is left) ** power."""
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
    processes: int | None = None
    """Refuse to train with another number of processes than this: launchers may start one and say nothing."""
    engine: Literal["any", "single", "ddp", "fsdp", "deepspeed"] = "any"
    """Refuse to train on another engine than this; the launcher's configuration chooses it. `ddp` keeps all in each
    process, `fsdp` (version 2) shares out weights, gradients and optimizer, `deepspeed` (ZeRO 1 or 2) the last two."""
    precision: Precision = "fp32"
    """Precision of the forward and backward pass. Trained weights stay fp32, unless --weights says bf16; fp16
    needs a GPU."""
    seed: int = 0
    """Every draw of the run follows from it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_share: float = 1.0
    """Of which share of the denoiser's blocks, the outermost first, which have the largest pictures in a UNet: half of
    them costs half of the time."""
    fast: bool = True
    """Compute the same in fewer passes over memory, and keep less for the backward pass. --no-fast leaves all to the
    libraries, for comparison."""
    compile: Literal["off", "blocks", "graphs"] = "off"
    """Compile the denoiser's repeated blocks for the steps (torch.compile): fewer launches on a GPU, after a minute or
    more before the first step. `graphs` records them as CUDA graphs too, which pays where a step is short."""
    save_every: int = 0
    """Export what was trained every so many steps, beside the end's. 0: only the end's."""
    ema: float = 0.0
    """Decay of a moving average of the weights that train; the average is what is sampled, measured and exported. 0.999
    is usual, 0.99 for less than a thousand steps. 0: none."""
    ema_on_cpu: bool = False
    """Keep the average out of the GPU's memory."""
    validate_every: int = 0
    """Measure the loss on the held-out pictures (--validation) every so many steps too. 0: at checkpoints."""
    on_nan: Literal["stop", "rollback"] = "stop"
    """When a loss or gradient is not finite: `stop`, the last good state being kept, or `rollback`: go back to the last
    checkpoint and on from it at half the rate, up to three times."""
    checkpoint_every: int = 100
    """Keep the whole state of the training every so many steps, to go on from after a stop (--resume). 0: only when it
    is stopped by a signal."""
    keep_last: int = 2
    """Number of checkpoints that are kept, the newest; with measuring or held-out pictures the best one is kept too."""
    keep_every: int = 0
    """Also keep the checkpoints at multiples of so many steps. 0: none."""


@dataclass(frozen=True)
class Loss:
    """What the loss weighs how much."""

    min_snr_gamma: float | None = None
    """Min-SNR loss weighting (Hang et al. 2023, 2303.09556); 5 is usual. Default: no weighting."""
    debiased: bool = False
    """Debiased estimation (Yu et al. 2023, 2310.08442): the noise's loss weighs 1 / sqrt(SNR)."""
    error: Literal["l2", "huber", "smooth_l1"] = "l2"
    """What of an error is learned from: its square; or, beyond --huber-delta, no more than its size, so that odd
    pictures pull less (Huber 1964). smooth_l1 is huber / delta."""
    huber_delta: float = 0.1
    """Where huber and smooth_l1 go from the square to the size."""
    noise_offset: float = 0.0
    """Add so much noise that is the same all over a picture, for darker darks (Guttenberg 2023); 0.05 is usual."""
    input_perturbation: float = 0.0
    """Noise the input by so much more than the target says (Ning et al. 2023, 2301.11706); 0.1 is usual."""
    zero_terminal_snr: bool = False
    """Let the last timestep be pure noise (Lin et al. 2023, 2305.08891, section 3.1), for a v-prediction model."""
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    """How timesteps are drawn; logit_normal: mostly from the middle (Esser et al. 2024, 2403.03206, section 3.1)."""
    logit_mean: float = 0.0
    """Mean of logit_normal: above 0 is noisier."""
    logit_std: float = 1.0
    """Spread of logit_normal."""
    timestep_shift: float = 1.0
    """Shift timesteps to the noisier (above 1; 3 is usual) or the cleaner (below 1), as Esser et al. 2024, eq. 23."""
    unmasked_weight: float = 0.0
    """Weight of the loss outside the masks; 1 ignores them."""
    unmasked_prior: float = 0.0
    """Outside the masks, hold the model with this weight to what the frozen base predicts there (LoRA only)."""


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
class Measure:
    """What was learned, measured at the checkpoints while training, to choose the best one (README: How good is it)."""

    measure: Literal["auto", "off", "toybox", "published"] = "auto"
    """Who measures: toybox's own judge, or the metric models of the papers. `auto`: toybox's for a run on toybox, and
    nothing else. What is trained is the same with and without."""
    measure_share: float = 0.1
    """Measure for no more than this share of the time that the steps take, at most 0.1: a checkpoint that would cost
    more is not measured. Only the base and the last state always are."""
    measure_count: int = 1
    """Pictures of each prompt, always from the same seeds."""
    measure_steps: int = 8
    """Denoising steps of such a picture: few, as they are only compared with each other."""
    measure_batch: int = 4
    """Pictures drawn at a time: fewer need less memory."""
    measure_prompts: tuple[str, ...] = ()
    """Your own prompts, with the subject's words in them. Default: the short protocol of `finetune evaluate`."""
    subject: str | None = None
    """The words that call what is learned, e.g. "sks dog". Default: as trigger, prompt or captions have it."""
    class_name: str | None = None
    """What it is one of, e.g. dog. Default: as the class prompt has it."""
    dino: str = "facebook/dino-vits16"
    """`published`: hub name or folder of the model for likeness, DINO ViT-S/16 or DINOv2."""
    clip: str = "openai/clip-vit-base-patch32"
    """`published`: hub name or folder of the CLIP model."""
    lpips: str = "timm/vgg16.tv_in1k"
    """`published`: hub name or folder of VGG16 for LPIPS."""
    patience: int = 0
    """End the run when so many checkpoints were measured since the best one. 0: take all steps. Without measuring
    it is refused."""


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    output: Path
    """A new or empty folder for the run: the trained file, `settings.toml`, `log.jsonl`, samples."""
    resume: bool = False
    """Go on with the run in the output folder, from its newest whole checkpoint. Its settings are taken from there."""
    resume_or_begin: bool = False
    """As --resume where the output folder holds a run, else begin one: for clusters, which give the same command again.
    Of a finished run it says so, with exit status 0."""
    allow_changed: bool = False
    """Go on although settings, base or data are not those that the checkpoint was made with."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where the curves go besides `log.jsonl`."""
    report: bool = True
    """Keep report.html in the folder up to date: a page of the run, made anew at each checkpoint and at the end."""
    title: str | None = None
    """What the trained file is called in its header, which clients show. Default: after its trigger."""
    author: str | None = None
    """Whom its header names."""
    license: str | None = None
    """Its licence, for the header."""
    description: str | None = None
    """A sentence on it, for the header."""
    tags: tuple[str, ...] = ()
    """Words that it is found by, for the header."""
    tell_captions: bool = False
    """Tell in the header how often each tag of the captions occurs, which clients suggest words from. Captions may be
    private, so only on request."""
