"""Pictures drawn while training, to watch it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from finetune import engine, families, initial, sampling
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
    run: Run, family: Family, source: Source, settings: Samples, prompts: Sequence[str], size: int, step: int
) -> None:
    """Write `samples/step-000100-0.png` ...: one picture a prompt, always from the same seeds."""
    if not run.leads:
        return
    seeds = range(run.train.seed, run.train.seed + len(prompts))
    with able_to_draw(run, family, source):
        pictures = [
            picture
            for words, numbers, start in _alike(run, family, prompts, seeds, size)
            for picture in sampling.sample(
                family,
                words,
                numbers,
                steps=settings.sample_steps,
                guidance=settings.sample_guidance,
                size=size,
                initial=start,
            )
        ]
    folder = run.folder / "samples"
    folder.mkdir(exist_ok=True)
    for number, (picture, prompt, seed) in enumerate(zip(pictures, prompts, seeds, strict=True)):
        facts = {"prompt": prompt, "seed": seed, "step": step, "model": source.model, "revision": source.revision}
        facts |= {"steps": settings.sample_steps, "guidance": settings.sample_guidance}
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
