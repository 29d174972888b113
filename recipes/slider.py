"""Slider: an adapter whose strength leads from one prompt to another, trained without pictures.

The page reads downward: load, freeze, adapt, data, fit, export. `finetune copy slider my_recipe.py` hands it to you;
change it, and run it with `finetune train ./my_recipe.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import finetune as ft
from finetune.settings import Adapter, Captions, Data, Framing, Loss, Model, Optim, Output, Samples, Slider, Train


@dataclass(frozen=True)
class Config:
    """Slider: an adapter whose strength leads from one prompt to another, trained without pictures."""

    output: Output
    slider: Slider = field(default_factory=Slider)
    model: Model = field(default_factory=Model)
    framing: Framing = field(default_factory=Framing)
    adapter: Adapter = field(default_factory=lambda: Adapter(rank=4))
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    loss: Loss = field(default_factory=Loss)
    samples: Samples = field(default_factory=Samples)


def main(config: Config) -> None:
    # What can be refused is refused before a model is loaded.
    run = ft.Run(config, config.output, config.train, config.optim)
    ft.sliders.check(config.slider, config.adapter)
    ft.objective.check(config.loss)
    ft.adapters.check(config.adapter, config.optim, config.model, run.accelerator)
    run.hold()

    # The base, frozen. It draws the pictures of the target before anything is added to it.
    source = ft.Source(**vars(config.model))
    family = ft.load(source, run.dtype, run.device)
    sides = config.framing.resolution or (family.resolution(),)
    examples = ft.sliders.examples(family, source, config.slider, run.seed, max(sides), run.track)
    ft.sampling.as_trained(family, config.loss)
    subjects = ft.data.plan(examples, config.framing, sides, family.multiple(), seed=run.seed)

    # What trains: by LoRA two thin matrices beside each attention projection.
    groups = ft.adapters.adapt(family, config.adapter, config.optim.lr, config.optim.text_encoder_lr, config.train.seed)
    run.begin(family, groups, subjects, ())

    # Latents and conditions, computed once. The VAE then leaves the memory, and the text encoders unless they train.
    kept = Data(cache=config.slider.cache, use_cache=config.slider.use_cache)
    encodings = ft.encode(family, subjects, (), (), kept, Captions(), run.track, run.turn)
    run.say(encodings.said())

    def save(name: str) -> str:
        file = run.fresh(name)
        ft.export.adapter(family, file, settings=run.settings)
        return str(file)

    prompts = config.samples.sample_prompts or (config.slider.target,)
    training = ft.Training(family, groups, encodings, config.train, config.optim, config.loss, run.accelerator)
    run.resume(training, source)
    for step in run.steps(training):
        if ft.due(step, config.train.save_every) and step < config.train.steps:
            with training.settled():
                if run.leads:
                    save(f"adapter-{step:06d}.safetensors")
        if ft.due(step, config.samples.sample_every):
            with training.settled():
                ft.preview(run, family, source, config.samples, prompts, max(sides), step, config.slider.strengths)

    # Written, loaded back and compared with the live model before it counts as done.
    if run.leads:
        file = save("adapter.safetensors")
        scales = " ".join(f"{strength:g}" for strength in config.slider.strengths)
        run.finish(
            f'finetune grid --model {source.model} --adapter {file} --prompt "{prompts[0]}" --scale {scales} '
            "--output slider.png"
        )
