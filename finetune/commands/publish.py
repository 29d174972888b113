"""finetune publish RUN --repo user/name: a folder with files, pictures and card; looked through; sent as one commit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from finetune.errors import Fault
from finetune.publishing.package import Wish

if TYPE_CHECKING:
    from finetune.publishing.facts import Facts

HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Config:
    """Publish what a run has trained: a folder first, with files, pictures and card; with --yes to the hub.

    The access token is taken from HF_TOKEN or the hub's own store (`hf auth login`).
    """

    run: Positional[Path]
    """The folder of a finished run."""
    repo: str
    """What it is to be called on the hub: user/name. Its files are called after it."""
    yes: bool = False
    """Send it. Without, the folder is made and looked through, and nothing leaves this machine."""
    dry_run: bool = False
    """Do not send it, which is so without --yes anyway."""
    public: bool = False
    """Let everyone see it. Default: private."""
    output: Path | None = None
    """The folder to make. Default: `publish` in the run's. One that is there is sent as it stands, with its card as
    you have changed it."""
    overwrite: bool = False
    """Make the folder anew."""
    prompt: tuple[str, ...] = ()
    """What to draw, each in quotes. Default: the run's sample prompts, else its training prompts."""
    count: int = 2
    """Pictures for each prompt."""
    seed: int = 0
    """Seed of the first picture; the next have the next seeds, the same for every prompt."""
    steps: int = 30
    """Denoising steps."""
    guidance: float = 5.0
    """How strictly the prompt is followed."""
    size: int | None = None
    """Side of the pictures in pixels. Default: what the model was made for."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Precision of adapter files and of a single file. A whole model's folder stays as the run wrote it."""
    single_file: bool = False
    """Of a whole model (dreambooth): one checkpoint in the original layout beside the folder, for all programs."""
    base_model: str | None = None
    """Hub name of the base, where it was trained from a file or folder."""
    license: str | None = None
    """Licence. Default: the run's --license, else the base's where the hub can be asked, else none is stated."""
    title: str | None = None
    """What the card calls it. Default: the run's --title, else its name."""
    description: str | None = None
    """A sentence for the card. Default: the run's --description."""
    may_tell: tuple[str, ...] = ()
    """Names of this machine, its user or its training files that may be told: ordinary words that are refused."""


def main(config: Config) -> None:
    # What can be refused is refused before a model is loaded.
    from rich.console import Console
    from rich.progress import track

    from finetune.publishing import facts, leaks, package, upload

    _require_sense(config)
    told = facts.read(config.run)
    if config.base_model and (told.base or told.embedded):
        raise Fault(f"--base-model {config.base_model}: the run tells its base itself: {told.model}.")
    wish = _wish(config, told.prompts)
    _require_words(told, wish)
    if config.single_file and not told.whole:
        what = "an adapter. `finetune export --format single-file` merges it" if told.adapter else "new words alone"
        raise Fault(f"--single-file: the run has trained {what}.")
    folder = config.output or config.run / "publish"
    if config.yes:
        upload.require_login()
    said = (*wish.prompts, wish.title, wish.description)
    known = leaks.known(told, (config.repo, config.base_model, told.base), said, config.may_tell)
    _refuse(leaks.in_texts(_texts(wish, told.settings), known))
    console = Console(stderr=True)
    if not package.is_made(folder, wish, told, config.overwrite):
        left = package.make(folder, wish, told, lambda items, what: track(items, what, console=console))
        print(*(f"left out: {name}: {reason}" for name, reason in left.items()), sep="\n", end="\n" * bool(left))
    files = package.files(folder)
    _refuse(leaks.in_files(folder, files, known), folder)
    _list(folder, files, config)
    if not (wish.base or told.base or told.embedded):
        print("The card names no base: it was trained from a file or folder. Name what that is with --base-model.")
    if config.yes:
        print(upload.upload(folder, files, config.repo, config.public, print))
    else:
        print(
            "\nNothing was sent. Look at the folder, change its README.md as you like, then give the same command with "
            "--yes."
        )


def _wish(config: Config, prompts: Sequence[str]) -> Wish:
    asked = config.prompt or tuple(prompts)
    if not asked:
        raise Fault('--prompt: the run tells no prompt. Say what to draw, e.g. --prompt "a photo of sks dog".')
    seeds = tuple(range(config.seed, config.seed + config.count))
    return Wish(
        config.repo, asked, seeds, config.steps, config.guidance, config.size, config.dtype,
        config.base_model, config.license, config.title, config.description, config.single_file,
    )  # fmt: skip


def _require_words(facts: Facts, wish: Wish) -> None:
    """Raises Fault for a new word that no prompt says, and for one whose file would be called as the adapter's."""
    from finetune import embeddings
    from finetune.publishing import files

    embeddings.require_used([embeddings.read(path) for path in facts.embeddings], wish.prompts)
    theirs = {pattern.format(wish.name) for pattern in files.NAMES.values()} if facts.adapter else set()
    if shared := theirs & {path.name for path in facts.embeddings}:
        raise Fault(f"--repo {wish.repo}: both the adapter and a new word would be {shared.pop()}. Take another name.")


def _texts(wish: Wish, settings: Any) -> dict[str, str]:
    """What goes into card, headers and pictures word by word, by what it is called."""
    from finetune import provenance

    given = {name: getattr(wish, name) for name in ("repo", "prompts", "base", "license", "title", "description")}
    given |= {f"the run's {name}": value for name, value in provenance.public(settings).items()}
    texts = {name: "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
             for name, value in given.items() if value is not None}  # fmt: skip
    return texts


def _refuse(finds: Iterable[str], folder: Path | None = None) -> None:
    """Raises Fault that tells where what is private stands."""
    if finds := list(finds):
        where = f"{folder}: not" if folder else "Not"
        raise Fault(
            f"{where} to be published: it tells what belongs to you or this machine alone. Nothing was sent. Take it "
            "out; a name that is an ordinary word may be told with --may-tell WORD.",
            finds,
        )


def _list(folder: Path, files: Sequence[Path], config: Config) -> None:
    from finetune import weights

    rows = [(file.relative_to(folder).as_posix(), weights.said(file.stat().st_size)) for file in files]
    width = max(len(name) for name, _ in rows)
    print(f"{folder}, for {config.repo} ({'public' if config.public else 'private'}):")
    print("\n".join(f"  {name:{width}}  {size}" for name, size in rows))
    print(f"Looked through {len(files)} files for tokens, names and paths of this machine: none is there.")


def _require_sense(config: Config) -> None:
    if config.yes and config.dry_run:
        raise Fault("--yes and --dry-run: give the one or the other.")
    for name in ("repo", "base_model"):
        if (value := getattr(config, name)) is not None and not HUB.fullmatch(value):
            raise Fault(f"--{name.replace('_', '-')} {value}: a name on the hub looks like user/name.")
    for name in ("count", "steps"):
        if getattr(config, name) < 1:
            raise Fault(f"--{name} {getattr(config, name)}: at least 1.")
    if config.seed < 0:
        raise Fault(f"--seed {config.seed}: a seed is 0 or more.")
    if not all(prompt.strip() for prompt in config.prompt):
        raise Fault("--prompt: an empty one says nothing.")
