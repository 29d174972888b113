"""DreamBooth: the UNet, or parts of it, learns a subject, beside class pictures that keep what the base knows.

The page reads downward: load, freeze, adapt, data, fit, export. `finetune copy dreambooth my_recipe.py` hands it to
you; change it, and run it with `finetune train ./my_recipe.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import finetune as ft
from finetune.settings import Captions, Data, Framing, Full, Loss, Measure, Model, Optim, Output, Prior, Samples, Train


@dataclass(frozen=True)
class Config:
    """DreamBooth: the UNet, or parts of it, learns a subject, beside class pictures that keep what the base knows."""

    data: Data
    output: Output
    model: Model = field(default_factory=Model)
    captions: Captions = field(default_factory=Captions)
    framing: Framing = field(default_factory=Framing)
    prior: Prior = field(default_factory=Prior)
    full: Full = field(default_factory=Full)
    optim: Optim = field(default_factory=lambda: Optim(lr=5e-6))
    train: Train = field(default_factory=lambda: Train(steps=800))
    loss: Loss = field(default_factory=Loss)
    samples: Samples = field(default_factory=Samples)
    measure: Measure = field(default_factory=Measure)


def main(config: Config) -> None:
    # What can be refused is refused before a model is loaded.
    run = ft.Run(config, config.output, config.train, config.optim)
    report = ft.data.require(config.data, config.captions, config.framing, config.model, run.batch, run.seed)
    examples, held_out = ft.data.read(config.data, config.captions, run.seed)
    ft.priors.check(config.prior, config.data, examples)
    ft.objective.check(config.loss)
    ft.loop.require_no_base(config.loss)
    ft.adapters.require_whole(config.model)
    ft.optim.check_full(config.full, config.optim, config.train, run.accelerator)
    measured = ft.Measured(run, config, examples, held_out)
    run.hold()

    # The base, frozen. It draws the class pictures before it learns anything.
    source = ft.Source(**vars(config.model))
    family = ft.load(source, run.dtype, run.device)
    sides = config.framing.resolution or (family.resolution(),)
    beside = ft.priors.examples(family, source, config.prior, config.data, examples, run.seed, max(sides), run.track)
    beside = ft.priors.lessons(beside, config.prior.class_images)  # nothing can be switched off to ask the base later
    ft.sampling.as_trained(family, config.loss)

    # How each picture is scaled and cropped, and its captions varied.
    how = config.framing, sides, family.multiple(), config.captions, run.seed
    subjects, companions, held = (ft.data.plan(each, *how) for each in (examples, beside, held_out))

    # What trains: the denoiser's weights, or those of its parts, and the text encoders' where a rate is given for them.
    rates = config.optim.lr, config.optim.text_encoder_lr
    groups = ft.adapters.full(family, *rates, config.full.weights, config.full.parts)
    run.begin(family, groups, subjects, companions, held, report.warnings)

    # Latents and conditions, computed once. The VAE then leaves the memory, and the text encoders unless they train.
    encodings = ft.encode(family, subjects, companions, held, config.data, config.captions, run.track, run.turn)
    run.say(encodings.said())
    encodings = ft.ask(family, encodings, config.loss, run.seed, run.accelerator, run.track)

    def save(name: str) -> str:
        ft.families.restore(family, source, run.dtype)
        folder = run.fresh(name)
        ft.export.merged(family, folder, dtype=run.dtype)
        return str(folder)

    prompts = config.samples.sample_prompts or ft.data.prompts(examples)
    training = ft.Training(
        family, groups, encodings, config.train, config.optim, config.loss, run.accelerator, config.full
    )
    run.resume(training, source)
    for step in run.steps(training, measured):
        if ft.due(step, config.train.save_every) and step < config.train.steps:
            with training.settled():
                if run.leads:
                    save(f"model-{step:06d}")
            ft.release_frozen(family)
        if ft.due(step, config.samples.sample_every):
            with training.settled():
                ft.preview(run, family, source, config.samples, prompts, max(sides), step)

    # Written, loaded back and compared with the live model before it counts as done.
    if run.leads:
        model = save("model")
        run.keep_best(training, "model", save)
        command = f'finetune generate --model {model}{source.flags()} --prompt "{prompts[0]}"'
        run.finish(command + ft.sampling.asks(family))
