"""Pictures drawn while training, to watch it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from finetune import engine, families, sampling
from finetune.data.encoding import release_frozen
from finetune.families import Family, Source
from finetune.pictures import save_png
from finetune.run import Run
from finetune.settings import Samples


@contextmanager
def able_to_draw(run: Run, family: Family, source: Source) -> Iterator[None]:
    """Inside, the parts that are out of memory while training are back, in the leading process; then they go again."""
    families.restore(family, source, run.dtype)
    family.pipeline.to(run.device)
    try:
        with engine.autocast(run.accelerator):
            yield
    finally:
        release_frozen(family)


def preview(
    run: Run, family: Family, source: Source, settings: Samples, prompts: Sequence[str], size: int, step: int
) -> None:
    """Write `samples/step-000100-0.png` ...: one picture a prompt, always from the same seeds."""
    if not run.leads:
        return
    seeds = range(run.train.seed, run.train.seed + len(prompts))
    with able_to_draw(run, family, source):
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
        facts |= source.how()
        facts |= {"steps": settings.sample_steps, "guidance": settings.sample_guidance}
        save_png(picture, folder / f"step-{step:06d}-{number}.png", facts)
