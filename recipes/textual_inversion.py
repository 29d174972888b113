"""Textual inversion: a new word of the text encoders for a subject or a style; the model stays as it is.

The page reads downward: load, freeze, teach, data, fit, export. `finetune copy textual_inversion my_recipe.py` hands it
to you; change it, and run it with `finetune train ./my_recipe.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import finetune as ft
from finetune.settings import Captions, Data, Framing, Loss, Measure, Model, Optim, Output, Samples, Train, Words


@dataclass(frozen=True)
class Config:
    """Textual inversion: a new word of the text encoders for a subject or a style; the model stays as it is."""

    data: Data
    output: Output
    model: Model = field(default_factory=Model)
    captions: Captions = field(default_factory=Captions)
    framing: Framing = field(default_factory=Framing)
    words: Words = field(default_factory=Words)
    optim: Optim = field(default_factory=lambda: Optim(lr=2e-3))
    train: Train = field(default_factory=lambda: Train(steps=3000))
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
    ft.words.require_alone(config.optim)
    ft.objective.check(config.loss)
    measured = ft.Measured(run, config, examples, held_out)
    run.hold()

    # The base, frozen. There are no class pictures: no weight moves, so the base's own words cannot drift.
    source = ft.Source(**vars(config.model))
    family = ft.load(source, run.dtype, run.device)
    sides = config.framing.resolution or (family.resolution(),)
    ft.sampling.as_trained(family, config.loss)

    # How each picture is scaled and cropped, and its captions varied.
    how = config.framing, sides, family.multiple(), config.captions, run.seed
    subjects, held = (ft.data.plan(each, *how) for each in (examples, held_out))

    # What trains: the vectors of the new words, below the text encoders' own, which stay as they are.
    captions = [caption for item in subjects for caption in item.captions]
    groups = ft.adapters.teach(family, words, config.words, config.optim.lr, run.seed, captions)
    run.begin(family, groups, subjects, (), held, report.warnings)

    # Latents, computed once; captions are encoded in each step. The VAE then leaves the memory.
    encodings = ft.encode(family, subjects, (), held, config.data, config.captions, run.track, run.turn)
    run.say(encodings.said())

    settings = run.settings | {"words": run.settings["words"] | {"word": words}}
    names = [f"{word}.safetensors" for word in words]

    def save(name: str) -> list[str]:
        files = {word: run.fresh(name.replace(words[0], word)) for word in words}
        ft.export.embeddings(family, source, files, settings=settings, examples=examples)
        return [str(file) for file in files.values()]

    prompts = config.samples.sample_prompts or ft.data.prompts(examples)
    training = ft.Training(family, groups, encodings, config.train, config.optim, config.loss, run.accelerator)
    run.resume(training, source)
    for step in run.steps(training, measured):
        if ft.due(step, config.train.save_every) and step < config.train.steps:
            with training.settled():
                if run.leads:
                    save(f"{words[0]}-{step:06d}.safetensors")
        if ft.due(step, config.samples.sample_every):
            with training.settled():
                ft.preview(run, family, source, config.samples, prompts, max(sides), step)

    # Written, loaded back by diffusers and compared with the live model before it counts as done.
    if run.leads:
        files = save(names[0])
        run.keep_best(training, names[0], save, *names[1:])
        said = f'--prompt "{prompts[0]}"{ft.sampling.asks(family)}'
        run.finish(f"finetune generate --model {source.model} --embedding {' '.join(files)} {said}")
