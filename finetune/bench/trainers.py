"""The trainers, each told the same work by its own flags."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.errors import Fault

Recipe = Literal["lora", "dreambooth"]
Rival = Literal["diffusers", "kohya"]
PROMPT, CLASS_PROMPT = "a photo of sks toy", "a photo of a toy"
LR = 1e-4
TOKENIZER = "openai_clip-vit-large-patch14"
"""Where kohya looks for the tokenizer of Stable Diffusion 1.x, in the folder that it is given"""


@dataclass(frozen=True)
class Work:
    """What is trained, the same for all."""

    model: Path
    """A diffusers folder"""
    subjects: Path
    """Folder of square pictures of the resolution"""
    classes: Path | None
    """Folder of class pictures, one of which goes with each subject; None: no prior preservation"""
    recipe: Recipe
    precision: Literal["fp32", "bf16"]
    resolution: int
    rank: int
    batch: int
    steps: int
    seed: int


@dataclass(frozen=True)
class Command:
    """What a process runs: a script with its words, or a module."""

    words: list[str]
    script: Path | None = None
    module: str | None = None
    python: str | None = None
    """An interpreter of its own"""
    constants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What it has no flag for, see `watched`"""


@dataclass(frozen=True)
class Trainer:
    name: str
    command: Callable[[Work, Path], Command]
    """Of the work and of an empty folder for its output"""
    prior: bool = True
    """Whether a step sees class pictures beside the subject's; else as many subject pictures more"""
    own: bool = False
    """Whether it is `finetune train`, of which a plan can be made"""


def ours(fast: bool = True) -> Trainer:
    """`finetune train`, by the fast path or by the plain one."""

    def command(work: Work, place: Path) -> Command:
        words: list[object] = ["train", work.recipe, "--model", work.model, "--data", work.subjects, "--prompt", PROMPT]
        words += ["--output", place / "run", "--resolution", work.resolution, "--batch-size", work.batch]
        words += ["--steps", work.steps, "--precision", work.precision, "--lr", LR, "--optimizer", "adamw"]
        words += ["--seed", work.seed, "--measure", "off", "--checkpoint-every", 0]
        words += ["--rank", work.rank] if work.recipe == "lora" else []
        words += ["--class-data", work.classes, "--class-prompt", CLASS_PROMPT] if work.classes else ["--no-prior"]
        return Command([*map(str, words), "--fast" if fast else "--no-fast"], module="finetune")

    return Trainer("finetune" if fast else "finetune --no-fast", command, own=True)


def diffusers(given: Path, recipe: Recipe, python: str | None = None) -> Trainer:
    """examples/dreambooth of diffusers. `given`: that folder, or the recipe's script in it."""
    script = _script(given, {"lora": "train_dreambooth_lora.py", "dreambooth": "train_dreambooth.py"}[recipe])

    def command(work: Work, place: Path) -> Command:
        words: list[object] = ["--pretrained_model_name_or_path", work.model, "--output_dir", place / "run"]
        words += ["--instance_data_dir", work.subjects, "--instance_prompt", PROMPT, "--resolution", work.resolution]
        words += ["--train_batch_size", work.batch, "--max_train_steps", work.steps, "--learning_rate", LR]
        words += ["--lr_scheduler", "constant", "--lr_warmup_steps", 0, "--seed", work.seed]
        words += ["--mixed_precision", {"fp32": "no"}.get(work.precision, work.precision)]
        words += ["--rank", work.rank] if work.recipe == "lora" else []
        if work.classes:
            count = len(list(work.classes.iterdir()))
            words += ["--with_prior_preservation", "--class_data_dir", work.classes, "--class_prompt", CLASS_PROMPT]
            words += ["--num_class_images", count]
        return Command([*map(str, words)], script=script, python=python)

    return Trainer("diffusers", command)


def kohya(given: Path, recipe: Recipe, python: str | None = None) -> Trainer:
    """train_network.py of kohya's sd-scripts, with latents cached. `given`: the script or its folder.

    It shuffles class pictures among the others: a step's pictures are the subject's here. Its UNet has the widths of
    Stable Diffusion, and its LoRA adapts more layers than attention's, in constants, which are set to the work's.
    """
    if recipe != "lora":
        raise Fault(f"--against kohya --recipe {recipe}: train_network.py trains adapters. Compare --recipe lora.")
    script = _script(given, "train_network.py")

    def command(work: Work, place: Path) -> Command:
        pictures, tokenizers = place / "pictures", place / "tokenizers"
        shutil.copytree(work.subjects, pictures / f"{work.batch}_{PROMPT}")  # so often an epoch: whole batches
        shutil.copytree(work.model / "tokenizer", tokenizers / TOKENIZER)
        words: list[object] = ["--pretrained_model_name_or_path", work.model, "--train_data_dir", pictures]
        words += ["--output_dir", place / "run", "--output_name", "adapter", "--resolution", work.resolution]
        words += ["--train_batch_size", work.batch, "--max_train_steps", work.steps, "--learning_rate", LR]
        words += ["--lr_scheduler", "constant", "--optimizer_type", "AdamW", "--seed", work.seed]
        words += ["--mixed_precision", {"fp32": "no"}.get(work.precision, work.precision)]
        words += ["--network_module", "networks.lora", "--network_dim", work.rank, "--network_alpha", work.rank]
        words += ["--network_train_unet_only", "--cache_latents", "--sdpa", "--max_data_loader_n_workers", 0]
        words += ["--save_model_as", "safetensors", "--tokenizer_cache_dir", tokenizers]
        constants: dict[str, dict[str, Any]] = {
            "networks.lora:LoRANetwork": {"UNET_TARGET_REPLACE_MODULE": ["CrossAttention"]}
        }
        constants |= {"library.original_unet": _kohya_widths(work.model)}
        return Command([*map(str, words)], script=script, python=python, constants=constants)

    return Trainer("kohya", command, prior=False)


RIVALS: dict[Rival, Callable[[Path, Recipe, str | None], Trainer]] = {"diffusers": diffusers, "kohya": kohya}


def _kohya_widths(model: Path) -> dict[str, Any]:
    import json

    told = json.loads((model / "unet" / "config.json").read_text(encoding="utf-8"))
    widths = told["block_out_channels"]
    return {
        "BLOCK_OUT_CHANNELS": widths,
        "TIMESTEP_INPUT_DIM": widths[0],
        "TIME_EMBED_DIM": 4 * widths[0],
        "NORM_GROUPS": told["norm_num_groups"],
        "TRANSFORMER_NORM_NUM_GROUPS": told["norm_num_groups"],
    }


def _script(given: Path, name: str) -> Path:
    file = given if given.is_file() else given / name
    if file.name != name or not file.is_file():
        raise Fault(f"--against {given}: there is no {name}. Name that script or the folder that it is in.")
    return Path(os.path.abspath(file))
