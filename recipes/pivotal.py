"""Pivotal tuning: first a new word for a subject or a style, then an adapter around it; exported together.

The page reads downward: load, freeze, adapt, teach, data, fit, export. `finetune copy pivotal my_recipe.py` hands it to
you; change it, and run it with `finetune train ./my_recipe.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import finetune as ft
from finetune.settings import (
    Adapter,
    Captions,
    Data,
    Framing,
    Loss,
    Measure,
    Model,
    Optim,
    Output,
    Pivot,
    Prior,
    Samples,
    Train,
    Words,
)


@dataclass(frozen=True)
class Config:
    """Pivotal tuning: first a new word for a subject or a style, then an adapter around it; exported together."""

    data: Data
    output: Output
    model: Model = field(default_factory=Model)
    captions: Captions = field(default_factory=Captions)
    framing: Framing = field(default_factory=Framing)
    prior: Prior = field(default_factory=Prior)
    words: Words = field(default_factory=Words)
    pivot: Pivot = field(default_factory=Pivot)
    adapter: Adapter = field(default_factory=Adapter)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=lambda: Train(steps=1000))
    loss: Loss = field(default_factory=Loss)
    samples: Samples = field(default_factory=Samples)
    measure: Measure = field(default_factory=Measure)


def main(config: Config) -> None:
    # What can be refused is refused before a model is loaded.
    run = ft.Run(config, config.output, config.train, config.optim)
    report = ft.data.require(config.data, config.captions, config.framing, config.model, run.batch, run.seed)
    examples, held_out = ft.data.read(config.data, config.captions, run.seed)
    words = ft.words.names(run.settings)
    ft.words.check(words, config.words, examples, config.model, run.accelerator)
    ft.priors.check(config.prior, config.data, examples)
    ft.objective.check(config.loss)
    ft.adapters.check(config.adapter, config.optim, config.model, run.accelerator)
    ft.adapters.check_pivot(config.pivot, config.optim)
    measured = ft.Measured(run, config, examples, held_out)
    run.hold()

    # The base, frozen. It draws the class pictures before anything is added to it.
    source = ft.Source(**vars(config.model))
    family = ft.load(source, run.dtype, run.device)
    sides = config.framing.resolution or (family.resolution(),)
    beside = ft.priors.examples(family, source, config.prior, config.data, examples, run.seed, max(sides), run.track)
    ft.sampling.as_trained(family, config.loss)

    # How each picture is scaled and cropped, and its captions varied.
    how = config.framing, sides, family.multiple(), config.captions, run.seed
    subjects, companions, held = (ft.data.plan(each, *how) for each in (examples, beside, held_out))

    # What trains, and when: first the vectors of the new words, then the adapter, unless they overlap.
    rates, captions = config.optim, [caption for item in subjects for caption in item.captions]
    adapted = ft.adapters.adapt(family, config.adapter, rates.lr, rates.text_encoder_lr, run.seed)
    taught = ft.adapters.teach(family, words, config.words, config.pivot.word_lr, run.seed, captions)
    groups = ft.adapters.in_turn(adapted, taught, config.pivot, config.train.steps)
    run.begin(family, groups, subjects, companions, held, report.warnings)

    # Latents, computed once; captions are encoded in each step. The VAE then leaves the memory.
    encodings = ft.encode(family, subjects, companions, held, config.data, config.captions, run.track, run.turn)
    run.say(encodings.said())

    settings = run.settings | {"words": run.settings["words"] | {"word": words}}
    names = [f"{word}.safetensors" for word in words]

    def save(name: str) -> tuple[str, list[str]]:
        """The adapter, and what its prompts' words mean."""
        file = run.fresh(name)
        files = {word: run.fresh(name.replace("adapter", word)) for word in words}
        ft.export.adapter(family, file, settings=settings, examples=examples)
        ft.export.embeddings(family, source, files, settings=settings, examples=examples)
        return str(file), [str(each) for each in files.values()]

    prompts = config.samples.sample_prompts or ft.data.prompts(examples)
    training = ft.Training(family, groups, encodings, config.train, config.optim, config.loss, run.accelerator)
    run.resume(training, source)
    for step in run.steps(training, measured):
        if ft.due(step, config.train.save_every) and step < config.train.steps:
            with training.settled():
                if run.leads:
                    save(f"adapter-{step:06d}.safetensors")
        if ft.due(step, config.samples.sample_every):
            with training.settled():
                ft.preview(run, family, source, config.samples, prompts, max(sides), step)

    # Written, loaded back and compared with the live model before it counts as done.
    if run.leads:
        file, files = save("adapter.safetensors")
        run.keep_best(training, "adapter.safetensors", save, *names)
        use = f"--adapter {file} --embedding {' '.join(files)}"
        said = f'--prompt "{prompts[0]}"{ft.sampling.asks(family)}'
        run.finish(f"finetune generate --model {source.model} {use} {said}")
