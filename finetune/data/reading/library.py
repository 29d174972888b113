"""A data set that the library `datasets` reads, from the hub or a folder: `hf:NAME`. Its rows become picture files.

A row's picture is kept once below the cache, named by its content and without metadata; from there on it is a file like
any other. Files that lie on this machine are used where they are. Rows are counted from 0, as the library does.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any

from finetune import home
from finetune.data.reading import pictures
from finetune.data.reading.bare import bare
from finetune.data.reading.found import Found, Picture, Problem, listed, one_line
from finetune.data.reading.metadata import CAPTIONS
from finetune.data.reading.pictures import BadPicture, printable
from finetune.errors import Fault
from finetune.settings import Data

PREFIX = "hf:"


def find(data: Data, several: bool = True) -> Found:
    """The data set's pictures with their captions, by row. `several` as for caption files: each line is a caption.

    Raises Fault when the data set, its split or one of its columns is not there.
    """
    name = (data.data or "").removeprefix(PREFIX)
    if data.limit is not None and data.limit < 1:
        raise Fault(f"--limit {data.limit}: a number of rows, 1 or more.")
    rows = _rows(name, data)
    first = next(rows, None)
    if first is None:
        raise Fault(f"{PREFIX}{name}: no rows in split {data.split}.")
    caption = _columns(name, data, list(first))
    found, skipped = Found(), set[str]()
    for number, row in enumerate(chain([first], rows)):
        title = f"row {number}"
        if title in data.skip:
            skipped.add(title)
            continue
        try:
            path = _file(row[data.image_column], name, title)
        except BadPicture as error:
            found.problems.append(Problem("picture", f"{title}: {error.reason}", (title,)))
            continue
        texts, fault = _texts(row.get(caption) if caption else None, several)
        if fault:
            found.problems.append(Problem("table", f"{title}: column {caption}: {fault}", (title,)))
        lack = f"no caption; its column {caption} is empty" if caption else f"no caption; {_none(list(first))}"
        found.pictures.append(Picture(path, title, texts, lack))
    for name in set(data.skip) - skipped:
        text = f"--skip {printable(name)}: no such row; rows of a data set are called row 0, row 1, ..."
        found.problems.append(Problem("skip", text, (name,)))
    return found


def kept() -> Path:
    """The folder of the pictures that came from data sets."""
    return home.cache("pictures")


def keep(raw: bytes, title: str) -> Path:
    """The file that holds a picture without its metadata; written if it is not there. Raises BadPicture."""
    plain = bare(raw)
    if plain is None:
        plain = _salvaged(raw, title)
    file = kept() / hashlib.sha256(plain).hexdigest()
    try:
        if not (file.is_file() and file.stat().st_size == len(plain)):
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_name(f".{file.name}.{os.getpid()}")
            beside.write_bytes(plain)
            os.replace(beside, file)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise Fault(f"{file.parent}: pictures cannot be kept there ({why}). FINETUNE_CACHE names another.") from error
    return file


def _salvaged(raw: bytes, title: str) -> bytes:
    """A picture that cannot be taken apart, decoded and written anew. Raises BadPicture when it cannot be decoded."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture"
        file.write_bytes(raw)
        try:
            picture = pictures.decode(file)[0]
        except BadPicture as error:
            raise BadPicture(Path(title), error.reason) from error
    made = io.BytesIO()
    picture.save(made, "PNG")
    return made.getvalue()


def _rows(name: str, data: Data) -> Iterator[dict[str, Any]]:
    """The rows, pictures as they are encoded. Raises Fault with what the library says."""
    import datasets

    with _Said(name, f"the split {data.split} cannot be opened"):
        source = _open(name, data)
        features = source.features or {}
        for column, feature in features.items():
            if isinstance(feature, datasets.Image):
                source = source.cast_column(column, datasets.Image(decode=False))
    rows: Iterator[dict[str, Any]] = islice(iter(source), data.limit)
    number = 0
    while True:
        with _Said(name, f"row {number} cannot be read"):
            row = next(rows, None)
        if row is None:
            return
        yield row
        number += 1


def _open(name: str, data: Data) -> Any:
    import datasets

    path = Path(name)
    if path.is_dir() and any((path / one).is_file() for one in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(name)
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if data.split not in saved:
            raise Fault(f"{PREFIX}{name}: no split {data.split}; there is: {listed(list(saved), 12)}.")
        return saved[data.split]
    if path.is_file():
        kind = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}.get(path.suffix)
        if kind is None:
            raise Fault(f"{PREFIX}{name}: a file; of files, .parquet, .arrow and .tar (webdataset) are read.")
        return datasets.load_dataset(kind, data_files={data.split: name}, split=data.split, streaming=True)
    # What lies here is read where it is: the library would copy it into a cache of its own first.
    return datasets.load_dataset(name, split=data.split, streaming=data.streaming or path.is_dir())


class _Said:
    """Whatever the library raises becomes a Fault with its first line."""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, Fault):
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise Fault(
                f"{PREFIX}{self.name}: {self.what}: {said.rstrip('.')}. Give a folder, or the name of a data set "
                "on the hub; one that is gated needs `hf auth login`."
            ) from error


def _columns(name: str, data: Data, columns: list[str]) -> str | None:
    """The column of captions. Raises Fault when a column that was asked for is not there."""
    asked = {"--image-column": data.image_column, "--caption-column": data.caption_column}
    faults = []
    for flag, column in asked.items():
        if column is not None and column not in columns:
            near = get_close_matches(column, columns, n=1)
            hint = f" Did you mean {printable(near[0])}?" if near else ""
            faults.append(f"{flag} {column}: no such column; there is: {listed(columns, 12)}.{hint}")
    if faults:
        raise Fault(f"{PREFIX}{name}: {faults[0]}", faults[1:])
    if data.caption_column is not None:
        return data.caption_column
    present = [column for column in CAPTIONS if column in columns]
    if len(present) > 1:
        raise Fault(f"{PREFIX}{name}: columns {listed(present)} may all hold captions: choose with --caption-column.")
    return present[0] if present else None


def _none(columns: Iterable[str]) -> str:
    return f"no column is called {' or '.join(CAPTIONS)}: name it with --caption-column ({listed(list(columns), 12)})"


def _texts(value: Any, several: bool) -> tuple[tuple[str, ...], str | None]:
    """The captions of a cell, and what is wrong with it."""
    cells = [value] if isinstance(value, str) else [] if value is None else value
    if not (isinstance(cells, list) and all(isinstance(cell, str) for cell in cells)):
        return (), f"expected text, or a list of texts, not {type(value).__name__}"
    lines = [line for cell in cells for line in (cell.splitlines() if several else [cell])]
    return tuple(dict.fromkeys(text for line in lines if (text := one_line(line.replace("\0", " "))))), None


def _file(value: Any, name: str, title: str) -> Path:
    """The file of a row's picture. Raises BadPicture."""
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        raw, path = value.get("bytes"), value.get("path")
        if raw is None and path:
            return _named(str(path), name, title)
        value = raw
    if value is None:
        raise BadPicture(Path(title), "no picture in it")
    if not isinstance(value, bytes | bytearray):
        raise BadPicture(Path(title), f"a picture was expected in it, not {type(value).__name__}: see --image-column")
    return keep(bytes(value), title)


def _named(path: str, name: str, title: str) -> Path:
    """The file that a row names instead of holding a picture: one of the data set's own, here or streamed."""
    import datasets
    from huggingface_hub import constants

    outer = path.split("::")[-1]
    if "://" in outer:
        if not outer.startswith(f"hf://datasets/{name}"):
            raise BadPicture(Path(title), "names a picture outside the data set, which is not read")
    else:
        own = Path(name) if Path(name).is_dir() else Path(name).parent
        roots = [own] if Path(name).exists() else [Path(datasets.config.HF_CACHE_HOME), Path(constants.HF_HUB_CACHE)]
        true = Path(outer).resolve()
        if not any(true.is_relative_to(root.resolve()) for root in roots):
            raise BadPicture(Path(title), "names a file outside the data set, which is not read")
        if outer == path:
            return Path(path)
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as handle:
        return keep(handle.read(), title)
