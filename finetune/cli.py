"""The command `finetune`: a table of verbs. Nothing heavy is imported before a verb's work begins."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro

from finetune import __version__, config, disk, peers, shelf
from finetune.errors import Fault, Stopped
from finetune.signals import Watch

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

ABOUT = "DreamBooth and LoRA for Stable Diffusion: a handful of pictures to a file that was proven to load."
MORE = "`finetune COMMAND --help` lists a command's options. FINETUNE_DEBUG=1 shows where a fault came from."


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. An expected fault is said on stderr in a paragraph, and its status is the exit status."""
    # What the libraries have to say about themselves does not stand between what we say.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with disk.written():
            _dispatch(list(sys.argv[1:] if argv is None else argv))
    except (Fault, KeyboardInterrupt) as stop:
        if os.environ.get("FINETUNE_DEBUG"):
            raise
        status = stop.status if isinstance(stop, Fault) else INTERRUPTED
        with Watch():  # a launcher asks those to stop that another's end has ended already: they say why first
            if peers.first_to_say(str(stop), isinstance(stop, Stopped | peers.PeerLost)):
                _say(str(stop) or "Stopped.", "red" if status else "green")
        sys.exit(status)


def _dispatch(words: list[str]) -> None:
    if words[:1] in ([], ["-h"], ["--help"]):
        print(_table(f"usage: finetune COMMAND [OPTIONS]\n\n{ABOUT}\n", VERBS), MORE, sep="\n\n")
        return
    if words == ["--version"]:
        print(f"finetune {__version__}")
        return
    for name in (" ".join(words[:2]), words[0]):
        if name in VERBS:
            return VERBS[name].run(words[len(name.split()) :], f"finetune {name}")
    verb, groups = words[0], {name.split()[0] for name in VERBS}
    below = {name: row for name, row in VERBS.items() if name.startswith(f"{verb} ")}
    if below and words[1:] in (["-h"], ["--help"]):
        print(_table(f"usage: finetune {verb} COMMAND [OPTIONS]\n", below))
        return
    if verb in groups:
        raise Fault(f"finetune {verb}: which one? {shelf.nearest(' '.join(words[:2]), below)}")
    raise Fault(f"finetune {verb}: there is no such command. {shelf.nearest(verb, groups)}")


def _page(module: str) -> Callable[[list[str], str], None]:
    """A command that is a module with `Config` and `main(config)`, as recipes are."""

    def run(words: list[str], prog: str) -> None:
        page = importlib.import_module(module)
        _work(page, config.parse(page.Config, words, prog))

    return run


def _gently(module: str) -> Callable[[list[str], str], None]:
    """The same, for one that heeds signals while it works."""

    def run(words: list[str], prog: str) -> None:
        with Watch():
            _page(module)(words, prog)

    return run


def _train(words: list[str], prog: str) -> None:
    """`train RECIPE ...`. Without RECIPE, the one that the TOML file of --config is made for."""
    if words[:1] in (["-h"], ["--help"]):
        found = {name: shelf.describe(path) for name, path in shelf.recipes().items()}
        print(_table(f"usage: {prog} RECIPE [OPTIONS]\n", found))
        print(f"\nRECIPE may be a file of your own: ./my_recipe.py. `{prog} RECIPE --help` lists a recipe's options.")
        print("`--vram 8GB` chooses what makes the training fit into so much memory, see `finetune plan`.")
        return
    if "--resume" in words and not config.file_of(words):
        words = _of_the_run(words)
    if words and not words[0].startswith("-"):
        recipe, words = words[0], words[1:]
    else:
        file = config.file_of(words)
        recipe = (config.recipe_of(file) if file else None) or ""
    if not recipe:
        raise Fault(f"{prog}: which recipe? `{prog} RECIPE ...`, with one of: {', '.join(shelf.recipes())}.")
    own, words = config.parted(words, {"--vram": 1})
    vram = own[0].partition("=")[2] or " ".join(own[1:]) if own else None
    page = shelf.load(recipe)
    asked = config.parse(page.Config, words, f"{prog} {recipe}")
    with Watch(), peers.lost():
        _work(page, asked if vram is None else _fitted(asked, vram, recipe))


def _fitted(asked: Any, vram: str, recipe: str) -> Any:
    """The settings as they fit into so much memory (`--vram`), by `finetune plan`."""
    if asked.output.resume or asked.output.resume_or_begin:
        raise Fault("--vram: a run goes on by the settings that it was begun with, which its plan has changed then.")
    from finetune import planning

    plan = planning.make(asked, vram, cpu=planning.on_cpu(), timed=planning.timing())
    if peers.leads():
        print(plan.text(recipe))
    plan.require()
    return plan.config


def _plan(words: list[str], prog: str) -> None:
    from finetune.commands import plan

    plan.run(words, prog)


def _work(page: Any, asked: Any) -> None:
    from finetune import memory

    with memory.told(asked):
        page.main(asked)


def _of_the_run(words: list[str]) -> list[str]:
    """What is resumed has its settings in its folder; what is given here wins over them, as over any TOML file."""
    from finetune.ledger import settings_of

    folders = [following for word, following in pairwise(words) if word == "--output"]
    folders += [word.removeprefix("--output=") for word in words if word.startswith("--output=")]
    if not folders:
        raise Fault("--resume: which run? Name its folder: --output DIR --resume.")
    return [*words, "--config", str(settings_of(Path(folders[0])))]


def _recipes(words: list[str], prog: str) -> None:
    @dataclass(frozen=True)
    class Recipes:
        """List the recipes, and the ready settings that come with them."""

    tyro.cli(Recipes, args=words, prog=prog)
    print(_table("Recipes: `finetune train NAME ...`\n", {n: shelf.describe(p) for n, p in shelf.recipes().items()}))
    print(_table("\nReady settings: `finetune train RECIPE --config NAME ...`\n",
                 {n: shelf.describe(p) for n, p in shelf.settings().items()}))  # fmt: skip
    print("\n`finetune copy NAME FILE` gives you any of them to change.")


def _copy(words: list[str], prog: str) -> None:
    @dataclass(frozen=True)
    class Copy:
        """Copy a recipe, or ready settings, to a file of your own to change. Never over a file that is there."""

        name: tyro.conf.Positional[str]
        """A recipe (`lora`) or ready settings (`lora-sd15-subject`)."""
        file: tyro.conf.Positional[Path]
        """The file to write, e.g. my_recipe.py."""

    asked = tyro.cli(Copy, args=words, prog=prog)
    shelf.copy(asked.name, asked.file)
    how = f"{asked.file}" if asked.file.suffix == ".py" else f"--config {asked.file}"
    print(f"Wrote {asked.file}. Change it, then run it: `finetune train {how} ...`")


def _table(title: str, rows: dict[str, str] | dict[str, Verb]) -> str:
    width = max((len(name) for name in rows), default=0)
    texts = {name: row.help if isinstance(row, Verb) else row for name, row in rows.items()}
    return "\n".join([title, *(f"  {name:{width}}  {text}" for name, text in texts.items())])


def _say(message: str, colour: str) -> None:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    console.print(message, style=colour, markup=False, soft_wrap=not console.is_terminal)


@dataclass(frozen=True)
class Verb:
    help: str
    run: Callable[[list[str], str], None]
    """Called with the words after the verb, and with those up to it (`finetune train`)."""


VERBS = {
    "demo": Verb("see it work: a subject learned in minutes, before and after in one picture", _page("finetune.demo")),
    "train": Verb("train a recipe on your pictures", _train),
    "plan": Verb("what a training takes of memory, and what makes it fit", _plan),
    "generate": Verb("draw pictures with a model and adapters", _page("finetune.generate")),
    "grid": Verb("a table of pictures: prompts, checkpoints, strengths, ...", _page("finetune.commands.grid")),
    "animate": Verb("from prompt to prompt, or along a path: GIF, WebP, MP4", _page("finetune.commands.animate")),
    "explain": Verb("a film strip of how a picture comes to be, word by word", _page("finetune.commands.explain")),
    "evaluate": Verb("how good a run is: figures, copies, a verdict", _gently("finetune.commands.evaluate")),
    "compare": Verb("evaluated runs side by side", _page("finetune.commands.compare")),
    "report": Verb("one HTML page of a run: verdict, pictures, curves, files", _page("finetune.commands.report")),
    "runs": Verb("list the runs in a folder and how far they are", _page("finetune.commands.runs")),
    "data check": Verb("look a data set over: every problem at once", _page("finetune.commands.check")),
    "data preview": Verb("a sheet of the pictures with their crops", _page("finetune.commands.preview")),
    "data caption": Verb("write captions with a vision-language model", _gently("finetune.commands.caption")),
    "data cache": Verb("compute ahead what a training needs", _gently("finetune.commands.cache")),
    "export": Verb("write what was trained in the formats that programs read", _page("finetune.commands.export")),
    "inspect": Verb("what a weight file is: kind, ranks, trigger, metadata", _page("finetune.commands.inspect")),
    "verify": Verb("is an adapter whole, and what does each program load of it", _page("finetune.commands.verify")),
    "convert": Verb("an adapter file in another format", _page("finetune.commands.convert")),
    "merge": Verb("several adapters as one, or into their base", _page("finetune.commands.merge")),
    "resize": Verb("an adapter at a lower rank", _page("finetune.commands.resize")),
    "extract": Verb("the difference of two models as an adapter", _page("finetune.commands.extract")),
    "publish": Verb("make a folder of a run with card and pictures, and send it", _page("finetune.commands.publish")),
    "bench": Verb("a step's time and memory beside another trainer's", _gently("finetune.commands.bench")),
    "recipes": Verb("list the recipes and their ready settings", _recipes),
    "copy": Verb("copy a recipe or settings to change them", _copy),
    "toybox train": Verb("make the embedded base model again, from nothing", _page("finetune.toybox.train")),
    "toybox measure": Verb("measure the embedded base model with its judge", _page("finetune.toybox.measure")),
    "toybox inpainting": Verb("make an inpainting checkpoint of it", _gently("finetune.toybox.inpainting")),
    "toybox fill": Verb("see what that fills masks with once it was tuned", _gently("finetune.toybox.filling")),
    "toybox methods": Verb("measure all methods beside each other on it", _gently("finetune.toybox.methods")),
}
