"""Schedulers by the names that the field's clients have for them. Read without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from finetune.errors import Fault

if TYPE_CHECKING:
    from finetune.families import Family

Name = Literal[
    "ddim", "ddpm", "pndm", "lms", "euler", "euler-a", "heun", "dpm2", "dpm2-a", "dpmpp-2m", "dpmpp-2m-karras",
    "dpmpp-2m-sde", "dpmpp-2m-sde-karras", "dpmpp-2s", "unipc", "deis", "lcm",
]  # fmt: skip
UNCLIPPED = {"clip_sample": False}
"""Latents are not pictures: nothing holds them between -1 and 1."""
KARRAS = {"use_karras_sigmas": True}
"""Steps that are denser where there is little noise (Karras et al. 2022, 2206.00364)"""
SDE = {"algorithm_type": "sde-dpmsolver++"}

CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", UNCLIPPED),
    "ddpm": ("DDPMScheduler", UNCLIPPED),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp-2m-karras": ("DPMSolverMultistepScheduler", KARRAS),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", SDE),
    "dpmpp-2m-sde-karras": ("DPMSolverMultistepScheduler", SDE | KARRAS),
    "dpmpp-2s": ("DPMSolverSinglestepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", UNCLIPPED),
}
"""diffusers' class of each, and what is said to it besides the model's own noise schedule."""


def choose(family: Family, name: str) -> None:
    """From here on the pipeline draws with this scheduler, on the model's own noise schedule."""
    import diffusers

    from finetune.objective import FLOW
    from finetune.quiet import quiet

    if family.objective().prediction == FLOW:
        own = type(family.pipeline.scheduler).__name__
        raise Fault(f"--scheduler {name}: steps of diffusion; {family.title} is a flow, drawn by its own {own} only.")
    made, options = CLASSES[name]
    with quiet():
        family.pipeline.scheduler = getattr(diffusers, made).from_config(family.pipeline.scheduler.config, **options)


def require(family: Family, name: str) -> None:
    """Raises Fault where another one had to be taken, which begins at pure noise."""
    found = type(family.pipeline.scheduler).__name__
    if found != CLASSES[name][0]:
        raise Fault(
            f"--scheduler {name} cannot begin at pure noise, as an adapter that was trained with --zero-terminal-snr "
            "wants it. Leave it out, or take ddim, euler or dpmpp-2m."
        )
