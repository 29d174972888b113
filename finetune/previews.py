"""Pictures drawn while training, to watch it."""

from __future__ import annotations

from collections.abc import Sequence

from finetune import families, sampling
from finetune.data.encoding import release_frozen
from finetune.families import Family, Source
from finetune.pictures import save_png
from finetune.run import Run
from finetune.settings import Samples


def preview(
    run: Run, family: Family, source: Source, settings: Samples, prompts: Sequence[str], size: int, step: int
) -> None:
    """Write `samples/step-000100-0.png` ...: one picture a prompt, always from the same seeds.

    The parts that are out of memory while training come back for it, in the leading process, and go again.
    """
    if not run.leads:
        return
    families.restore(family, source, run.dtype)
    family.pipeline.to(run.device)
    seeds = range(run.train.seed, run.train.seed + len(prompts))
    with run.accelerator.autocast():
        pictures = sampling.sample(
            family,
            prompts,
            seeds,
            steps=settings.sample_steps,
            guidance=settings.sample_guidance,
            size=size,
            initial=sampling.everything(family, size),
        )
    folder = run.folder / "samples"
    folder.mkdir(exist_ok=True)
    for number, (picture, prompt, seed) in enumerate(zip(pictures, prompts, seeds, strict=True)):
        facts = {"prompt": prompt, "seed": seed, "step": step, "model": source.model, "revision": source.revision}
        facts |= {"steps": settings.sample_steps, "guidance": settings.sample_guidance}
        save_png(picture, folder / f"step-{step:06d}-{number}.png", facts)
    release_frozen(family)
