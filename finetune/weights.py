"""Weight files: safetensors only, looked at before they are loaded.

A safetensors file is 8 bytes with the header's length N (little endian), N bytes of JSON that names each tensor's
type, shape and place, and the tensors' bytes without a gap (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import Fault

if TYPE_CHECKING:
    from torch import Tensor, nn

SUFFIX = ".safetensors"
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl", ".pickle")
MAX_HEADER = 100_000_000
"""Bytes, the format's own limit: a forged length must not make the reader allocate gigabytes."""
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
        "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # fmt: skip
"""Bits an element of each of the format's types"""


def check_file(path: Path) -> None:
    """Refuse a weight file that cannot be trusted, from its header and size alone; nothing is loaded.

    Raises Fault for pickles (which can run code when loaded), and for safetensors files that are cut short, have a
    forged or broken header, gaps, overlaps, or bytes behind the last tensor.
    """
    _header(path)


def check_folder(folder: Path) -> None:
    """Refuse a diffusers folder in which a part's weights are missing, pickled or broken. Nothing is loaded.

    The parts are those that its `model_index.json` names. Raises one Fault that lists all that is wrong.
    """
    problems = [problem for part in _parts(folder) for problem in _check_part(part)]
    if problems:
        raise Fault(
            f"{folder}: not all of its weights can be read. Only {SUFFIX} files are: pickles can run code when they "
            "are loaded. Save the model with safetensors, or download what is missing or broken again.",
            problems,
        )


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header, empty when there are none. The file is checked first."""
    return _header(path)[1]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """Type, shape and place of each tensor by name; the metadata; the byte where the tensors begin.

    The file is checked: raises Fault when it is no whole safetensors file.
    """
    entries, metadata = _header(path)
    size = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries.values())
    return entries, metadata, path.stat().st_size - size


def header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """A file's bytes up to its tensors: type, shape and place of each, and the metadata, sorted."""
    header = {"__metadata__": dict(sorted(metadata.items()))} | dict(entries) if metadata else dict(entries)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return struct.pack("<Q", len(text)) + text


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU. The file is checked first; NaN and infinite values are refused."""
    import safetensors.torch

    check_file(path)
    tensors = safetensors.torch.load_file(path)
    bad = [text for name, tensor in tensors.items() if (text := _not_finite(name, tensor))]
    if bad:
        raise Fault(f"{path}: holds NaN or infinite weights: it comes from a run that failed. Take another file.", bad)
    return tensors


def check_finite(named: Mapping[str, nn.Module]) -> None:
    """Raises Fault that names the weights of these modules which hold NaN or infinite values."""
    bad = [
        text
        for part, module in named.items()
        for name, tensor in module.state_dict().items()
        if (text := _not_finite(f"{part}.{name}", tensor))
    ]
    if bad:
        listed = bad[:10] + ([f"... and {len(bad) - 10} more"] if len(bad) > 10 else [])
        raise Fault("the model holds NaN or infinite weights: its files are damaged. Take another copy.", listed)


def said(size: int) -> str:
    """A number of bytes as people read it."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _parts(folder: Path) -> list[Path]:
    """The sub-folders of the pipeline's parts; of a single model, the folder itself."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        names = [name for name, kind in index.items() if isinstance(kind, list) and kind and kind[0]]
    except OSError:
        return [folder]
    except (ValueError, AttributeError) as error:
        raise Fault(f"{folder / 'model_index.json'}: cannot be read as a pipeline's index ({error}).") from error
    return [folder / name for name in names if (folder / name).is_dir()]


def _check_part(part: Path) -> list[str]:
    """What is wrong with one part's weights. A part without `config.json` (tokenizer, scheduler) needs none."""
    files = sorted(part.glob(f"*{SUFFIX}"))
    pickles = [path for path in sorted(part.iterdir()) if path.suffix.lower() in PICKLES]
    problems = []
    if not files and pickles:
        problems = [f"{path}: a pickle, and no {SUFFIX} file beside it" for path in pickles]
    elif not files and (part / "config.json").is_file():
        problems = [f"{part}: no weights there"]
    for index in sorted(part.glob(f"*{SUFFIX}.index.json")):
        problems += _missing_shards(index)
    for file in files:
        try:
            check_file(file)
        except Fault as error:
            problems.append(error.message)
    return problems


def _missing_shards(index: Path) -> list[str]:
    """The files of a model saved in several that its index names and that are not there."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{index}: cannot be read as an index of weights ({_one_line(error)})"]
    return [f"{index.parent / name}: not there, though {index.name} names it" for name in sorted(names)
            if not (index.parent / name).is_file()]  # fmt: skip


def _header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The checked header: the tensors' entries, and the metadata."""
    _check_kind(path)
    size = path.stat().st_size
    with path.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8:
            raise _broken(path, f"it is cut short: {size} bytes, where 8 tell the length of the header")
        if length > MAX_HEADER:
            raise _broken(path, f"its header claims {length:,} bytes; at most {MAX_HEADER:,} are allowed")
        if 8 + length > size:
            raise _broken(path, f"it is cut short: the header alone needs {8 + length:,} bytes, the file has {size:,}")
        text = handle.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
        if not isinstance(header, dict):
            raise ValueError("not a table")
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds more than texts")
        spans = sorted(_span(name, entry) for name, entry in header.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _broken(path, f"its header cannot be understood ({_one_line(error)})") from error
    _check_spans(path, spans, size - 8 - length)
    return header, metadata


def _check_kind(path: Path) -> None:
    """Refuse what is no safetensors file by name or first bytes."""
    if path.suffix.lower() in PICKLES:
        raise Fault(_pickle(path))
    if path.is_dir():
        raise Fault(f"{path}: a folder, where a {SUFFIX} file is expected.")
    if not path.is_file():
        raise Fault(f"{path}: there is no such file.")
    if path.suffix.lower() != SUFFIX:
        raise Fault(f"{path}: only {SUFFIX} files are read, not {path.suffix or 'files without an ending'}.")
    try:
        with path.open("rb") as handle:
            head = handle.read(64)
    except OSError as error:
        raise Fault(f"{path}: cannot be read ({error.strerror}).") from error
    if head[8:9] == b"{":  # the rest is for files that are something else altogether
        return
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise Fault(_pickle(path) + " (Its name says otherwise; its content is a pickle.)")
    if head.startswith(b"version https://git-lfs"):
        raise Fault(f"{path}: a Git LFS pointer, not the weights themselves. Run `git lfs pull` where it comes from.")
    if head.startswith(b"<"):
        raise Fault(f"{path}: a web page, not weights: a download that asked for a login, perhaps. Download it again.")


def _pickle(path: Path) -> str:
    return (
        f"{path}: pickled weights can run code when they are loaded, so only {SUFFIX} files are read. Take the model's "
        f"{SUFFIX} file, or convert this one where you trust it (`safetensors.torch.save_file(torch.load(file, "
        "weights_only=True), ...)`)."
    )


def _broken(path: Path, what: str) -> Fault:
    return Fault(f"{path}: not a whole safetensors file: {what}. Nothing of it was loaded; download or copy it again.")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name stands there twice")
    return names


def _span(name: str, entry: dict[str, Any]) -> tuple[int, int, str]:
    """First byte, byte behind the last, and name of a tensor. Raises ValueError when shape, type and place disagree."""
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    if not whole or entry["dtype"] not in BITS:
        raise ValueError(f"{name}: type {entry['dtype']!r}, shape {shape!r}, bytes {begin!r} to {end!r}")
    if (end - begin) * 8 != math.prod(shape) * BITS[entry["dtype"]]:
        raise ValueError(f"{name}: {end - begin} bytes for {entry['dtype']} of shape {shape}")
    return begin, end, name


def _check_spans(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """The tensors fill the file from the header to the end, one behind the other."""
    place = 0
    for begin, end, name in spans:
        if begin != place:
            raise _broken(path, f"tensor {name} begins at byte {begin:,}, where the one before ends at {place:,}")
        place = end
    if size < place:
        raise _broken(path, f"it is cut short: {place - size:,} of {place:,} bytes of tensors are missing")
    if size > place:
        raise _broken(path, f"{size - place:,} bytes follow the last tensor, where nothing may be")


def _not_finite(name: str, tensor: Tensor) -> str | None:
    """Says how many values are not finite, None when all are."""
    import torch

    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    values = tensor.detach()
    values = values if values.element_size() > 1 else values.float()
    if _ends_are_finite(values):
        return None
    finite = torch.isfinite(values)
    if finite.all():
        return None
    return f"{name}: {int((~finite).sum()):,} of {tensor.numel():,} values are NaN or infinite"


def _ends_are_finite(values: Tensor) -> bool:
    """Whether the least and the greatest are, which are NaN where any is: told in a tenth of the time of `isfinite`."""
    import torch

    if values.is_complex() or not values.numel():
        return False
    return all(math.isfinite(float(end)) for end in torch.aminmax(values))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
