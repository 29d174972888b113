"""What a written file may say of how it was made: an allow-list. Nothing local (paths, user, host) is on it.

Files are passed on and published; whoever reads one learns the settings, never where or by whom they were used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DISTRIBUTION = "finetune-kit"
LOCAL = "local"
"""What is said instead of the name of a model that lies in a folder or file of the user's machine."""

TRAINING = (
    *("recipe", "model", "revision", "prompt", "class_prompt", "resolution", "flip", "strict"),
    *("prior", "prior_from", "class_images", "class_word", "prior_weight", "class_steps", "class_guidance"),
    *("method", "rank", "alpha", "rank_pattern", "alpha_pattern", "conv_rank", "rslora", "dropout", "factor", "init"),
    *("lora_plus_ratio", "parts", "weights", "lr", "text_encoder_lr", "optimizer", "schedule", "schedule_power"),
    *("warmup", "weight_decay", "unmasked_weight", "unmasked_prior", "alpha_masks", "validation", "holes"),
    *("max_upscale", "min_kept", "crop_variants", "several_captions", "shuffle_tags", "keep_tags"),
    *("caption_variants", "butterflies", "source_dropout", "quantize", "clip_skip", "text_chunks"),
    *("max_grad_norm", "steps", "batch_size", "accumulation", "precision", "seed", "min_snr_gamma"),
    *("gradient_checkpointing", "trigger", "template", "title", "author", "license", "description", "tags"),
    *("ema", "debiased", "error", "huber_delta", "noise_offset", "input_perturbation", "zero_terminal_snr"),
    *("target", "positive", "negative", "preserve", "eta", "target_images", "target_steps", "target_guidance"),
    *("timesteps", "logit_mean", "logit_std", "timestep_shift", "tag_dropout", "caption_dropout", "crop", "buckets"),
    *("word", "vectors", "init_words", "word_lr", "word_until", "adapter_from"),
)
"""Settings of a run, by their names in `finetune.settings`."""
UNTOLD = (
    *("data", "class_data", "masks", "cache", "output", "model_config", "skip", "split", "image_column"),
    *("caption_column", "limit", "streaming", "concepts", "repeats", "weight", "background", "focus", "tell_captions"),
    *("sample_prompts", "measure_prompts", "subject", "class_name", "dino", "clip", "lpips", "tracker"),
    *("use_cache", "resume", "resume_or_begin", "allow_changed", "report", "processes", "engine", "save_every"),
    *("optimizer_in_backward", "ema_on_cpu", "validate_every", "on_nan", "checkpoint_every", "keep_last", "keep_every"),
    *("sample_every", "sample_steps", "sample_guidance", "measure", "measure_share", "measure_count"),
    *("measure_steps", "measure_batch", "patience", "strengths", "sources", "fast", "compile"),
    *("offload_blocks", "cache_kv", "checkpoint_share"),
)
"""Those that are not: where things lie and what they are called there, how a run was watched and kept. A new setting
stands in one of the two."""
PICTURE = (
    *("prompt", "negative", "seed", "step", "steps", "guidance", "width", "height", "scheduler", "model", "revision"),
    *("zero_terminal_snr", "strength", "picture_guidance", "scale", "quantize", "clip_skip", "text_chunks"),
)
"""Settings of a picture."""


def public(settings: Mapping[str, Any], allowed: tuple[str, ...] = TRAINING) -> dict[str, Any]:
    """The settings that may be told, sorted by name. Groups (tables) are opened; everything else is left out.

    A model keeps its name when that is `toybox` or a hub name, and is `local` when it is a folder or file.
    """
    told = {name: value for name, value in leaves(settings) if name in allowed and value is not None}
    if "model" in told:
        told["model"] = public_model(str(told["model"]))
    return {name: told[name] for name in sorted(told) if _plain(told[name])}


def public_model(name: str) -> str:
    """A hub name or `toybox` as it is; `local` for anything on this machine."""
    hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+|[A-Za-z0-9][\w-]*", name)
    return name if hub and not Path(name).exists() else LOCAL


def dumps(value: Mapping[str, Any]) -> str:
    """JSON that is the same for the same settings."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def software() -> str:
    """The name and version of this toolkit."""
    try:
        return f"finetune {version(DISTRIBUTION)}"
    except PackageNotFoundError:
        return "finetune"


def leaves(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings by name, groups opened."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from leaves(value)
        else:
            yield str(name), value


def _plain(value: Any) -> bool:
    """Whether it is text or number, or a list of such."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(one, str | int | float) for one in value)
    return isinstance(value, str | int | float)
