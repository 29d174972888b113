"""finetune evaluate RUN: how good what was trained is, in figures, with a verdict. See `finetune/evaluation/`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from finetune.errors import Fault

COUNT = 4


@dataclass(frozen=True)
class Config:
    """Measure a run: likeness, prompt fidelity, class drift, diversity, drift, copies; and say what follows.

    Pictures are drawn from fixed seeds and kept in RUN/evaluation: the same command goes on where it was stopped.
    """

    run: Positional[Path]
    """The run's folder."""
    step: tuple[str, ...] = ()
    """Which states: steps of checkpoints, `best`, `last`, `result`. Default: every checkpoint that is kept, and the
    result of a finished run."""
    protocol: Literal["short", "dreambooth", "style"] = "short"
    """`dreambooth`: the 25 prompts for objects or live subjects of Ruiz et al. 2022 (2208.12242), 4 pictures each.
    `short`: a few of them (for toybox, in its words). `style`: for a style; other things in it, likeness by CLIP
    (as Sohn et al. 2023, 2306.00983), and how much of it other prompts take on."""
    prompt: tuple[str, ...] = ()
    """Your own prompts instead, with the subject's words in them."""
    subject: str | None = None
    """The words that call what was learned, e.g. "sks dog"; of a style with {} for what is shown, e.g.
    "neonart, {}". Default: as the run's settings and captions have it."""
    class_name: str | None = None
    """What it is one of, e.g. dog. Default: as the run's class prompt has it."""
    references: tuple[Path, ...] = ()
    """Folder of real pictures to compare with, one for each concept. Default: those of the run, as papers do."""
    count: int | None = None
    """Pictures of each prompt. Default: 4."""
    judge: Literal["auto", "toybox", "published"] = "auto"
    """Metric models: toybox's own, or those of the papers. `auto`: toybox's for runs on toybox."""
    dino: str = "facebook/dino-vits16"
    """Hub name or folder of the model for likeness: DINO ViT-S/16, or DINOv2."""
    clip: str = "openai/clip-vit-base-patch32"
    """Hub name or folder of the CLIP model."""
    lpips: str = "timm/vgg16.tv_in1k"
    """Hub name or folder of VGG16 for LPIPS; a folder may hold the learned weights of its channels beside
    it, lpips.safetensors."""
    seed: int = 0
    """Seed of the first picture of each prompt; the next have the next seeds."""
    steps: int | None = None
    """Denoising steps. Default: those of the run's own samples."""
    guidance: float | None = None
    """Guidance scale. Default: that of the run's own samples."""
    size: int | None = None
    """Side in pixels. Default: the one that was trained."""
    batch: int = 4
    """Pictures drawn at a time: fewer need less memory."""
    json: bool = False
    """Print the table as JSON instead of Markdown. Both, and CSV, are in RUN/evaluation too."""


def main(config: Config) -> None:
    # What can be refused is refused before a model is loaded.
    _require_sense(config)

    from finetune import engine
    from finetune.evaluation import evaluate, judges, verdict
    from finetune.evaluation.prompts import Asked
    from finetune.evaluation.tables import to_json, to_markdown
    from finetune.report import page

    given = {name: value for name in ("steps", "guidance", "size") if (value := getattr(config, name)) is not None}
    how = replace(evaluate.as_sampled(config.run, config.seed, config.batch), **given)
    asked = Asked(config.prompt, config.subject, config.class_name)
    count = config.count or COUNT
    brief = evaluate.brief(config.run, config.step, asked, config.protocol, how, count, config.references)
    device = engine.device()
    places = config.dino, config.clip, config.lpips
    panel = judges.panel(config.judge, brief.plan.source.model, places, device)
    panel = panel.of_styles() if config.protocol == "style" else panel
    table = evaluate.evaluate(brief, panel, device, track)
    said = verdict.judge(table, seed=config.seed)
    if config.json:
        print(to_json(table, verdict=vars(said)), end="")
    else:
        print(to_markdown(table), evaluate.sentence(said), sep="\n")
    page.refresh(config.run)


def track(items: Sequence[Any], what: str) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track as tracked

    return tracked(items, what, console=Console(stderr=True))


def _require_sense(config: Config) -> None:
    for name in ("count", "steps", "batch"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise Fault(f"--{name} {value}: at least 1.")
    if config.seed < 0:
        raise Fault(f"--seed {config.seed}: a seed is 0 or more.")
    if config.protocol == "dreambooth" and (config.prompt or config.count not in (None, COUNT)):
        raise Fault("--protocol dreambooth has its own prompts, 4 pictures each: leave --prompt and --count out.")
    if config.protocol == "style" and config.class_name:
        raise Fault("--protocol style: a style has no class: leave --class-name out.")
    if not config.run.is_dir():
        raise Fault(f"{config.run}: there is no such folder. Name a run's folder, the --output of a training.")
