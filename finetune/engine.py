"""What a training runs on: device, precision, and the engine that its processes share the work by."""

from __future__ import annotations

import importlib.util
import os
import platform
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import CPUOffloadPolicy

from finetune.errors import Fault
from finetune.settings import Train

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARDING = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}
"""The engines that share out what one process would hold, by their names in `--engine`."""
UNUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM trains language models",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor and context parallelism are not known to the loop",
}
"""What a launcher's configuration may ask for and is no engine here."""

OURS = {
    "gradient_clipping": ("--max-grad-norm", 0),
    "gradient_accumulation_steps": ("--accumulation", 1),
    "optimizer": ("--optimizer", None),
    "scheduler": ("--schedule", None),
}
"""What DeepSpeed's configuration may say and settings say here: the flag for it, the value that asks for nothing."""


def device() -> str:
    """The accelerator of this machine, else its CPU."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def processor() -> str:
    """What this machine's CPU is called."""
    info = Path("/proc/cpuinfo")
    told = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in told if line.startswith("model name")]
    return names[0] if names else platform.processor()


def dtype(precision: str) -> torch.dtype:
    """`auto` is bf16 on a GPU, else fp32. Raises Fault for fp16 without a GPU, whose kernels have no such numbers."""
    if precision == "fp16" and device() == "cpu":
        raise Fault("--precision fp16 needs a GPU: take bf16 or fp32 on a CPU.")
    return DTYPES[("bf16" if device() == "cuda" else "fp32") if precision == "auto" else precision]


def running(accelerator: Accelerator) -> str:
    """The engine by its name in `--engine`."""
    kind = accelerator.distributed_type.value
    return "single" if kind == "NO" else "ddp" if kind.startswith("MULTI_") else kind.lower()


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether the engine shares out what one process would hold."""
    return running(accelerator) in SHARDING


def autocast(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Accelerate's, for what is computed in `--precision`. It leaves that to DeepSpeed, which would round weights."""
    if running(accelerator) != "deepspeed":
        return accelerator.autocast()
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=accelerator.mixed_precision == "bf16")


def require_installed() -> None:
    """Refuse an engine that a launcher asks for and that is not there; Accelerate fails over it."""
    if _is_set("ACCELERATE_USE_DEEPSPEED") and importlib.util.find_spec("deepspeed") is None:
        raise Fault(
            "DeepSpeed was asked for (ACCELERATE_USE_DEEPSPEED, by the launcher's configuration) and is not installed: "
            "`pip install 'finetune-kit[deepspeed]'`. Or take FSDP2, which needs no more: see accelerate_config.yaml."
        )


def require(train: Train, accelerator: Accelerator) -> None:
    """Refuse to run on less, or on something else, than was asked for: launchers do so without a word."""
    found, engine = accelerator.num_processes, running(accelerator)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != found:
        raise Fault(f"{started} processes were started, but each would train alone ({found} process): no backend.")
    if train.processes is not None and train.processes != found:
        raise Fault(
            f"--processes {train.processes}: {found} would train. Start them with `torchrun --nproc-per-node "
            f"{train.processes} -m finetune train ...`, or by accelerate launch with a configuration that says so."
        )
    for name, title in SHARDING.items():
        asked = f"ACCELERATE_USE_{name.upper()}"
        if _is_set(asked) and engine != name:
            raise Fault(
                f"{title} was asked for ({asked}, by the launcher's configuration), but the engine would be {engine}, "
                f"{found} process(es): Accelerate leaves {title} out without a word on a CPU and in a single process. "
                "Start several processes on GPUs, or take it out of the configuration."
            )
    for name, why in UNUSED.items():
        if _is_set(name):
            raise Fault(f"{name}: {why}. Take it out of the launcher's configuration.")
    if train.engine not in ("any", engine):
        raise Fault(
            f"--engine {train.engine}: the engine would be {engine}, {found} process(es). The launcher chooses it: see "
            "accelerate_config.yaml."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise Fault(
            f"gradient_accumulation_steps {accelerator.gradient_accumulation_steps} in the launcher's configuration: "
            "say --accumulation instead, which weighs the pictures of a step."
        )
    if engine == "fsdp":
        _require_fsdp(train, accelerator.state.fsdp_plugin)
    if engine == "deepspeed":
        _require_zero(train, accelerator.deepspeed_plugin)


def _require_fsdp(train: Train, plugin: Any) -> None:
    """Refuse what the loop does not do with FSDP, and what it does itself."""
    if plugin.fsdp_version != 2:
        raise Fault(f"fsdp_version {plugin.fsdp_version}: say `fsdp_version: 2` in the launcher's configuration.")
    if train.precision == "fp16":
        raise Fault("--precision fp16: its loss scale is not shared between FSDP's processes. Take bf16.")
    if train.ema_on_cpu:
        raise Fault(
            "--ema-on-cpu: with FSDP each process keeps its share of the average beside its weights. Leave it out."
        )
    if plugin.activation_checkpointing:
        raise Fault("fsdp_activation_checkpointing: say --gradient-checkpointing instead.")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise Fault("fsdp_offload_params: not supported. Take more processes, or --gradient-checkpointing.")
    if getattr(plugin.auto_wrap_policy, "__name__", "") == "size_based_auto_wrap_policy":
        raise Fault("fsdp_auto_wrap_policy SIZE_BASED_WRAP: say TRANSFORMER_BASED_WRAP, the model knows its blocks.")


def _require_zero(train: Train, plugin: Any) -> None:
    """Refuse what the loop does not do with DeepSpeed, and what it does itself."""
    config, stage = plugin.deepspeed_config, plugin.zero_stage
    fsdp = "Take FSDP2 (`--engine fsdp`), which shares out weights too: see accelerate_config.yaml."
    if stage not in (1, 2):
        raise Fault(f"zero_stage {stage}: DeepSpeed's stages 1 and 2 are known to the loop. {fsdp}")
    offloaded = (config["zero_optimization"].get(f"offload_{what}") or {} for what in ("optimizer", "param"))
    if any(told.get("device", "none") != "none" for told in offloaded):
        raise Fault(f"offload_optimizer_device, offload_param_device: not supported, say none. Short of memory? {fsdp}")
    if train.precision == "fp16" or config.get("fp16", {}).get("enabled") is True:
        raise Fault("fp16: DeepSpeed would step and scale the loss in a way of its own. Say --precision bf16.")
    if config.get("bf16", {}).get("enabled") is True and train.precision != "bf16":
        raise Fault("bf16 in DeepSpeed's configuration: say --precision bf16 instead.")
    for name, (flag, nothing) in OURS.items():
        if config.get(name) not in (None, "auto", nothing):
            raise Fault(f"{name} in DeepSpeed's configuration: take it out, and say {flag} instead.")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on")
