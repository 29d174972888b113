"""What must not be sent: access tokens, and what is known only on this machine. Looked for in all that would be sent.

Of a find its file and kind are said, never the find itself.
"""

from __future__ import annotations

import getpass
import html
import netrc
import os
import platform
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finetune import weights
from finetune.publishing.facts import Facts

TOKENS = {
    "an access token (Hugging Face)": r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}",
    "an access token (GitHub)": r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,})",
    "an access token (sk-...)": r"(?<![A-Za-z0-9])sk-[\w-]{20,}",
    "an access token (Slack)": r"(?<![A-Za-z0-9])xox[abprs]-[\w-]{20,}",
    "an access token (JWT)": r"(?<![\w-])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "an access key (AWS)": r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])",
    "an access key (Google)": r"(?<![\w-])AIza[\w-]{35}(?![\w-])",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
"""What a token looks like, in whatever file."""
TOLD = {
    "a password or key": r"(?i)(?:api[_-]?key|secret|token|passw(?:or)?d)[\"']?\s*[:=]\s*[\"']?[\w./+-]{12,}",
    "40 hexadecimal digits, as a key of Weights & Biases": r"(?<![0-9A-Za-z])[0-9a-f]{40}(?![0-9A-Za-z])",
    "an absolute path": r"(?<![\w/.:~)\]>&;-])/(?:[\w.@+~-]+/)+[\w.@+~-]*",
    "a path below a home folder": r"(?<![\w~])~\w*/[\w.]",
    "a path of Windows": r"\b[A-Za-z]:\\{1,2}\w|\\\\\w[\w.-]*\\\w",
    "a file's address": r"(?i)file://",
}
"""The same in text."""
SECRET = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
"""Names of environment variables whose values are kept to oneself."""
ORDINARY = frozenset(
    ("data", "dataset", "datasets", "train", "training", "images", "image", "pictures", "picture", "photos", "photo",
     "samples", "sample", "class", "masks", "mask", "run", "runs", "output", "model", "models", "lora", "adapter",
     "prompt", "prompts", "step", "seed", "base", "publish")
)  # fmt: skip
"""Names of folders and files that tell nothing, and may stand in a card by chance."""
VOCABULARIES = ("vocab.json", "merges.txt", "tokenizer.json")
"""A tokenizer's lists of all words there are."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
PIECE, OVERLAP = 1 << 22, 1 << 12
MANY = 20_000
"""Files of a training folder whose names are looked for, at most."""


@dataclass(frozen=True)
class Known:
    """What is looked for besides what looks like a token or path."""

    secrets: Mapping[str, str]
    """Kind by value. Found in whatever file."""
    names: Mapping[str, str]
    """Kind by name: found in text, as a word of its own."""
    commits: frozenset[str]
    """Revisions of the base: 40 hexadecimal digits that may be told."""


def known(facts: Facts, signed: Iterable[str | None], said: Iterable[str | None], told: Iterable[str]) -> Known:
    """What there is to look for, but for what is told on purpose.

    `signed`: names that it is published under, which may be the user's. `said`: prompts and texts, which may hold the
    words that pictures are called by. `told`: local names that may be told.
    """
    own = "\n".join([str(facts.flat.get("author") or ""), *filter(None, signed), *told])
    on_purpose = "\n".join([own, facts.spoken, *filter(None, said)])
    names: dict[str, str] = {}
    for kind, (found, allowed) in {
        "a name from the training data": (set(_training(facts)), on_purpose),
        "the host's name": (set(_hosts()), own),
        "the user's name": (set(_users()), own),
    }.items():
        names |= {name: kind for name in found if len(name) > 2 and not _word(name).search(allowed)}
    revision = str(facts.flat.get("revision") or "")
    return Known(dict(_secrets()), names, frozenset({revision}))


def in_texts(texts: Mapping[str, str], known: Known) -> list[str]:
    """Finds in texts, by what those are called."""
    return [f"{name}: {kind}" for name, text in texts.items() for kind in _kinds(_in_text(text, known))]


def in_files(folder: Path, files: Iterable[Path], known: Known) -> list[str]:
    """Finds in files below the folder: their names, their text, what pictures and weights carry, all their bytes."""
    finds = []
    for file in files:
        name = file.relative_to(folder).as_posix()
        finds += [f"a file's name: {kind}" for kind in _kinds(_in_text(name, known))]
        finds += [f"{name}: {kind}" for kind in _kinds(_in_file(file, known))]
    return finds


def _kinds(found: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(found))


def _in_file(file: Path, known: Known) -> Iterator[str]:
    yield from _in_bytes(file, known)
    if file.suffix in PICTURES:
        yield from _in_picture(file, known)
    elif file.suffix == weights.SUFFIX:
        entries, metadata, _ = weights.read_header(file)
        yield from _in_text("\n".join([*entries, *metadata, *metadata.values()]), known)
    elif file.name not in VOCABULARIES:
        with suppress(UnicodeDecodeError):
            yield from _in_text(file.read_text(encoding="utf-8"), known)


def _in_picture(file: Path, known: Known) -> Iterator[str]:
    """Texts, and the data of cameras."""
    from PIL import Image

    with Image.open(file) as image:
        image.load()
        if image.getexif() or any(name in image.info for name in ("exif", "xmp", "XML:com.adobe.xmp")):
            yield "EXIF or XMP data, which may tell a place and a camera"
        texts = [f"{name}\n{value}" for name, value in image.info.items() if isinstance(value, str)]
    yield from _in_text("\n".join(texts), known)


def _in_text(text: str, known: Known) -> Iterator[str]:
    """Looked through as it is, and as it is read where HTML or Markdown is escaped in it."""
    for read in dict.fromkeys((text, html.unescape(text), re.sub(r"\\([^\w\s])", r"\1", html.unescape(text)))):
        for kind, pattern in {**TOKENS, **TOLD}.items():
            if any(found[0] not in known.commits for found in re.finditer(pattern, read)):
                yield kind
        yield from (kind for value, kind in known.secrets.items() if value in read)
        yield from (kind for name, kind in known.names.items() if _word(name).search(read))


def _in_bytes(file: Path, known: Known) -> Iterator[str]:
    patterns = {kind: re.compile(pattern.encode()) for kind, pattern in TOKENS.items()}
    secrets = {value.encode(): kind for value, kind in known.secrets.items()}
    with file.open("rb") as handle:
        before = b""
        while piece := handle.read(PIECE):
            window = before + piece
            yield from (kind for kind, pattern in patterns.items() if pattern.search(window))
            yield from (kind for value, kind in secrets.items() if value in window)
            before = window[-OVERLAP:]


def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", re.IGNORECASE)


def _secrets() -> Iterator[tuple[str, str]]:
    """Values of tokens and of places, each long enough not to be met by chance."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import get_stored_tokens

    home = str(Path.home())
    for value, kind in ((home, "the home folder"), (str(Path.home().resolve()), "the home folder")):
        if value.count("/") + value.count("\\") > 1:  # not `/` or `/root`, which the patterns of paths know
            yield value, kind
    stored = [get_token(), *get_stored_tokens().values()]
    yield from ((token, "an access token (of the hub's store)") for token in stored if token)
    with suppress(OSError, netrc.NetrcParseError):
        for _, _, password in netrc.netrc().hosts.values():
            if password and len(password) >= 8:
                yield password, "a password of .netrc"
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 8 and not os.path.exists(value):
            yield value, f"the value of {name}"


def _users() -> Iterator[str]:
    with suppress(OSError, KeyError, ImportError):
        yield getpass.getuser()
    yield Path.home().name
    yield from (os.environ[name] for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER") if os.environ.get(name))


def _hosts() -> Iterator[str]:
    for name in (socket.gethostname(), platform.node(), os.environ.get("HOSTNAME", "")):
        yield from (one for one in (name, name.partition(".")[0]) if one != "localhost")


def _training(facts: Facts) -> Iterator[str]:
    """Names of the folders, and of the files in them."""
    yield from _telling(facts.run.absolute().name)
    for table in (*facts.concepts, facts.settings.get("prior") or {}):
        for place in (table.get("data"), table.get("class_data"), table.get("masks"), table.get("sources")):
            if place and not str(place).startswith("hf:"):
                yield from _telling(Path(place).absolute().name)
                yield from _below(Path(place))


def _below(folder: Path) -> Iterator[str]:
    for number, path in enumerate(folder.rglob("*")):
        if number == MANY:
            return
        if path.is_dir() or not re.fullmatch("[a-z]+", path.stem):  # `sofa.png` is called by a word of its caption
            yield from _telling(path.stem)
        if path.is_file():
            yield path.name


def _telling(name: str) -> Iterator[str]:
    """The name, unless it is a number or says nothing."""
    if len(name) > 3 and not re.fullmatch(r"[\d\W_]*", name) and name.lower() not in ORDINARY:
        yield name
