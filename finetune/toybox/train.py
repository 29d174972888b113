"""Train the toybox from nothing: draw the world, then autoencoder, judge with text encoder, noise predictor, export.

The one place where the whole of Stable Diffusion is trained. Every stage goes on from its own checkpoint; a finished
stage is skipped; a larger number of pictures makes a finished stage go on.
"""

from __future__ import annotations

from finetune.toybox.plan import Config


def main(config: Config) -> None:
    """Run every stage that is not finished, then write the pipeline."""
    import torch
    from torch import nn

    from finetune.toybox import judge_training, noise, pack, parallel, text, vae
    from finetune.toybox.judge import Judge

    torch.set_num_threads(config.threads)
    parallel.start()
    folder = config.output
    folder.mkdir(parents=True, exist_ok=True)
    with parallel.first_alone():
        autoencoder = vae.train(config, folder)
        contrast = judge_training.train(config, folder, autoencoder)
        latents = noise.encoded(folder, config, autoencoder)
    decoding = vae.train_decoder(config, folder, autoencoder)
    judge, tokenizer = Judge(contrast.judge), text.new_tokenizer()

    def export(unet: nn.Module, encoder: nn.Module) -> None:
        pack.export(config.weights or folder / "export", unet, encoder, decoding, tokenizer, judge)

    sampler = noise.Sampler(decoding, tokenizer)
    trained = noise.train(config, folder, latents, contrast.encoder, sampler, judge, export)
    if parallel.rank() == 0:
        export(trained["unet"], trained["encoder"])
    parallel.stop()


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config))
