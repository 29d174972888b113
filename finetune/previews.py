"""Pictures drawn while training, to watch it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL.Image import Image

from finetune import adapters, engine, families, initial, sampling
from finetune.data.encoding import release_frozen
from finetune.families import Family, Source
from finetune.initial import Initial
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
        alike = _alike(run, family, prompts, seeds, size)
        for strength in strengths:
            with adapters.at(family, strength):
                for words, numbers, start in alike:
                    pictures += sampling.sample(
                        family,
                        words,
                        numbers,
                        steps=settings.sample_steps,
                        guidance=settings.sample_guidance,
                        size=size,
                        initial=start,
                    )
    folder = run.folder / "samples"
    folder.mkdir(exist_ok=True)
    drawn = [(strength, prompt, seed) for strength in strengths for prompt, seed in zip(prompts, seeds, strict=True)]
    for number, (picture, (strength, prompt, seed)) in enumerate(zip(pictures, drawn, strict=True)):
        facts = {"prompt": prompt, "seed": seed, "step": step, "model": source.model, "revision": source.revision}
        facts |= source.how()
        facts |= {"steps": settings.sample_steps, "guidance": settings.sample_guidance}
        facts |= {"scale": strength} if len(strengths) > 1 else {}
        save_png(picture, folder / f"step-{step:06d}-{number}.png", facts)


def _alike(
    run: Run, family: Family, prompts: Sequence[str], seeds: Sequence[int], size: int
) -> list[tuple[Sequence[str], Sequence[int], Initial | None]]:
    """Prompts and seeds that are drawn from the same, and what that is."""
    if not families.takes_source(family):
        return [(prompts, seeds, sampling.everything(family, size))]
    return [([prompt], [seed], _source(run, prompt)) for prompt, seed in zip(prompts, seeds, strict=True)]


def _source(run: Run, prompt: str) -> Initial:
    """What the first picture with this caption was made of, or else the first picture."""
    examples = [item.example for item in run.subjects]
    chosen = next((one for one in examples if prompt in one.captions), examples[0])
    assert chosen.source is not None
    return initial.read(chosen.source.path)
