"""Pictures drawn while training, to watch it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL.Image import Image

from finetune import adapters, engine, families, sampling
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
    run: Run,
    family: Family,
    source: Source,
    settings: Samples,
    prompts: Sequence[str],
    size: int,
    step: int,
    strengths: Sequence[float] = (1.0,),
) -> None:
    """Write `samples/step-000100-0.png` ...: one picture a prompt, always from the same seeds; at several strengths of
    the adapter one a strength and prompt, all prompts of the first strength first."""
    if not run.leads:
        return
    seeds = range(run.train.seed, run.train.seed + len(prompts))
    pictures: list[Image] = []
    with able_to_draw(run, family, source):
        for strength in strengths:
            with adapters.at(family, strength):
                pictures += sampling.sample(
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
    drawn = [(strength, prompt, seed) for strength in strengths for prompt, seed in zip(prompts, seeds, strict=True)]
    for number, (picture, (strength, prompt, seed)) in enumerate(zip(pictures, drawn, strict=True)):
        facts = {"prompt": prompt, "seed": seed, "step": step, "model": source.model, "revision": source.revision}
        facts |= {"steps": settings.sample_steps, "guidance": settings.sample_guidance}
        facts |= {"scale": strength} if len(strengths) > 1 else {}
        save_png(picture, folder / f"step-{step:06d}-{number}.png", facts)
