"""Tensors that were computed once, found again by their content: a store in memory, and one on disk.

A key says all that an entry was computed from (`key`, `fingerprint`), never a file name, so an entry is never out of
date: what has changed has another key. On disk a store is a folder of safetensors files ("shards") that are written
once and never changed. Any number of processes and threads may read and add at the same time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import secrets
import struct
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeAlias, TypeVar

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from finetune.data.ahead import ahead
from finetune.errors import Failure, Fault
from finetune.weights import SUFFIX, read_header

MARK = "finetune cache 1"
"""Stands in the metadata of every shard; another number where the layout of a shard changes. Such shards are left."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types that are kept, by their names in the file"""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD = re.compile(r"[0-9a-f]{32}" + re.escape(SUFFIX))
PART, ASIDE, LOCK = ".part", ".damaged", ".writing.lock"
PATIENCE = 600
"""Seconds to wait while other processes write"""
log = logging.getLogger(__name__)

Job = TypeVar("Job")
Loaded = TypeVar("Loaded")
Entry: TypeAlias = dict[str, Tensor]
Layout: TypeAlias = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, type and shape of an entry's tensors, which lie in a shard in this order without a gap"""


class Lost(Failure, KeyError):
    """An entry that was there at the beginning and can be read no more."""

    __str__ = Exception.__str__


class Store(Protocol):
    """Entries of named tensors by key. What `get` returns is the caller's own, on the CPU."""

    def __contains__(self, key: str) -> bool: ...

    def get(self, key: str) -> Entry:
        """Raises KeyError when there is no such entry."""
        ...

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep an entry; one that is there already stays as it is."""
        ...

    def flush(self) -> None:
        """What was added is safe, and other processes can find it."""
        ...

    def refresh(self) -> None:
        """See what other processes have added."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...


def key(*parts: object) -> str:
    """SHA-256 (64 hex digits) of the parts: None, texts, numbers, lists, tuples, dicts of these by texts, dataclasses.

    Raises TypeError or ValueError for anything else (NaN, say), so that nothing is keyed by an address in memory.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(module: nn.Module, *more: object) -> str:
    """SHA-256 of a module's weights (names, types, shapes, bytes) and of `more`, settings that matter beside them.

    Equal for equal weights wherever they lie. Remembered for a module until its weights are changed.
    """
    state = sorted(module.state_dict().items())
    now = tuple((name, t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device) for name, t in state)
    known = _fingerprints.get(module)
    if known is None or known[0] != now:
        known = _fingerprints[module] = now, _hash_of_weights(state)
    return key(known[1], *more)


class Memory:
    """A store that ends with the process."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> Entry:
        return {name: tensor.clone() for name, tensor in self._entries[key].items()}

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._entries.setdefault(key, _own(tensors))

    def flush(self) -> None:
        pass

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        pass


class Shards:
    """A store in a folder, which is made when the first shard is written.

    Entries wait in memory until a shard is full (`entries` or `size` bytes) or the first of them has waited for
    `seconds`; a process that is killed loses those alone. A shard is written beside, synced and renamed under a lock
    on the folder. So one that can be seen and is not whole was damaged later: it is set aside under another name, with
    a warning, and its entries are no longer there. A checksum goes with each entry and is compared when it is read.
    """

    def __init__(self, folder: Path, entries: int = 256, size: int = 64_000_000, seconds: float = 30) -> None:
        """Raises Fault when the folder is there and cannot be read."""
        self.folder, self._limits = folder, (entries, size, seconds)
        self._pending: dict[str, Entry] = {}
        self._bytes, self._since = 0, 0.0
        self._index = _Index()
        self._unusable: set[str] = set()  # shards that were given up
        self._lock = threading.RLock()  # on what stands above; held for moments
        self._writing = threading.Lock()  # held while a shard is written
        self._clear_parts()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._pending or self._index.find(_digest(key)) is not None

    def __len__(self) -> int:
        with self._lock:
            return len(self._index) + len(self._pending)

    @property
    def index_bytes(self) -> int:
        """Memory that the index takes."""
        return self._index.nbytes

    def get(self, key: str) -> Entry:
        lost: Exception | None = None
        while True:
            with self._lock:
                if key in self._pending:
                    return {name: tensor.clone() for name, tensor in self._pending[key].items()}
                place = self._index.find(_digest(key))
            if place is None and lost is None:
                raise KeyError(key)
            if place is None:
                raise Lost(
                    f"{self.folder}: a part of the cache cannot be read any more, which could be at the beginning: "
                    f"{_why(lost)}. Start again: what is missing is computed again."
                )
            try:
                return _read_entry(self.folder / place.shard, _digest(key), place)
            except (OSError, _Damaged) as error:
                self._give_up(place.shard, error)  # another shard may hold it too
                lost = error

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Raises Failure when a shard was due and cannot be written; its entries stay readable in this process."""
        _digest(key)
        entry = _own(tensors)
        with self._lock:
            if key in self:
                return
            self._since = self._since if self._pending else time.monotonic()
            self._pending[key] = entry
            self._bytes += _size(entry)
        if self._due():
            with self._writing:
                if self._due():
                    self._write()

    def flush(self) -> None:
        """Write what is pending. Raises Failure when it cannot be written."""
        with self._writing:
            while self._pending:
                self._write()

    def refresh(self) -> None:
        """Read the headers of shards that have appeared since; forget those that have gone."""
        with self._lock:
            names = self._names()
            for name in self._index.shards.keys() - names:
                self._index.drop(name)
            found = []
            for name in sorted(names - self._index.shards.keys() - self._unusable):
                try:
                    found.append(self._index.rows(name, _read_places(self.folder / name)))
                except (OSError, Fault, ValueError) as error:
                    self._give_up(name, error)
            self._index.add(found)

    def close(self) -> None:
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _due(self) -> bool:
        entries, size, seconds = self._limits
        with self._lock:
            waited = time.monotonic() - self._since
            full = len(self._pending) >= entries or self._bytes >= size
            return bool(self._pending) and (full or waited >= seconds)

    def _write(self) -> None:
        """Write pending entries that no other process has written meanwhile, one shard of them."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / LOCK, timeout=PATIENCE):
                self.refresh()
                with self._lock:
                    batch = {key: self._pending[key] for key in list(self._pending)[: self._limits[0]]}
                    missing = {key: one for key, one in batch.items() if self._index.find(_digest(key)) is None}
                if missing:
                    _write_shard(self.folder, missing)
                    self.refresh()
        except OSError as error:
            raise Failure(
                f"{self.folder}: the cache cannot be written ({_why(error)}). Make room there, name another folder "
                "with --cache, or compute everything in memory with --no-use-cache."
            ) from error
        with self._lock:
            for key, entry in batch.items():
                del self._pending[key]
                self._bytes -= _size(entry)
            self._since = time.monotonic()

    def _names(self) -> set[str]:
        try:
            return {name for name in os.listdir(self.folder) if SHARD.fullmatch(name)}
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise Fault(
                f"{self.folder}: the cache cannot be read ({_why(error)}). Name another folder with --cache."
            ) from error

    def _give_up(self, name: str, error: Exception) -> None:
        """Use a shard no more. One that is damaged gets another name; one that others removed is nobody's fault."""
        with self._lock:
            self._index.drop(name)
            if isinstance(error, FileNotFoundError):
                return
            self._unusable.add(name)
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):  # perhaps another time
            log.warning("%s: cannot be read (%s); what it holds is computed again.", name, _why(error))
        elif not isinstance(error, _OtherVersion):
            aside = self.folder / (name + ASIDE)
            with suppress(OSError):  # in a folder that cannot be written it stays
                os.rename(self.folder / name, aside)
            log.warning("%s: damaged (%s). Set aside as %s; what it held is computed again.", name, _why(error), aside)

    def _clear_parts(self) -> None:
        """Remove shards that were never finished. Nobody writes while the lock is free: their writers are dead."""
        if not any(self.folder.glob(f".*{PART}")):
            return
        with suppress(OSError), FileLock(self.folder / LOCK, timeout=0):
            for part in self.folder.glob(f".*{PART}"):
                part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Built:
    """What became of the entries that were wanted."""

    found: int
    """Were there."""
    built: int
    """Were computed."""


def build(
    store: Store,
    wanted: Iterable[tuple[str, Job]],
    load: Callable[[Job], Loaded],
    encode: Callable[[Loaded], Mapping[str, Tensor]],
    workers: int = 2,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Built:
    """Compute those of the wanted entries (key, what it is computed from) that the store does not hold.

    `load` runs in `workers` threads, at most two jobs a worker ahead; `encode` in the calling thread, one at a time and
    in order. `track` goes through the keys as they are done. What a job raises is raised at its place in the order;
    what was computed before stays in the store.
    """
    counts = {"found": 0, "built": 0}

    def loaded(pair: tuple[str, Job]) -> tuple[str, Loaded | None]:
        key, job = pair
        return key, None if key in store else load(job)

    def work() -> Iterator[str]:
        for key, ready in ahead(loaded, wanted, workers):
            new = ready is not None and key not in store  # a key may come twice
            if new and ready is not None:
                store.add(key, encode(ready))
            counts["built" if new else "found"] += 1
            yield key

    deque(track(work()), maxlen=0)
    return Built(**counts)


# --- the index -----------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where an entry's bytes are."""

    shard: str
    begin: int
    """Byte of the file"""
    layout: Layout
    crc: int


ROW = np.dtype([("rest", "u1", 24), ("begin", "u8"), ("shard", "u4"), ("layout", "u4"), ("crc", "u4")])
"""An entry in the index; the first 8 bytes of its key stand in `_heads`. 52 bytes in all."""


class _Index:
    """Where every entry is, in sorted arrays: a dict of tuples would take five times the memory."""

    def __init__(self) -> None:
        self.shards: dict[str, int] = {}
        """Those that were read, and their numbers"""
        self._names: list[str] = []
        self._layouts: dict[Layout, int] = {}
        self._shapes: list[Layout] = []
        self._heads = np.empty(0, np.uint64)
        self._rows = np.empty(0, ROW)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        return self._heads.nbytes + self._rows.nbytes

    def find(self, digest: bytes) -> _Place | None:
        head = np.uint64(int.from_bytes(digest[:8], "big"))
        at = int(np.searchsorted(self._heads, head))
        while at < len(self._heads) and self._heads[at] == head:
            row = self._rows[at]
            if row["rest"].tobytes() == digest[8:]:
                return _Place(
                    self._names[row["shard"]], int(row["begin"]), self._shapes[row["layout"]], int(row["crc"])
                )
            at += 1
        return None

    def rows(self, shard: str, places: Iterable[tuple[bytes, int, Layout, int]]) -> tuple[Any, Any]:
        """Heads and rows of a shard's entries (key, begin, layout, checksum), for `add`. Numbers the shard."""
        listed = list(places)
        rows = np.empty(len(listed), ROW)
        rows["shard"] = len(self._names)
        digests = np.frombuffer(b"".join(digest for digest, *_ in listed), np.uint8).reshape(-1, 32)
        rows["rest"] = digests[:, 8:]
        rows["begin"] = [begin for _, begin, _, _ in listed]
        rows["layout"] = [self._number(layout) for _, _, layout, _ in listed]
        rows["crc"] = [crc for *_, crc in listed]
        self.shards[shard] = len(self._names)
        self._names.append(shard)
        return digests[:, :8].copy().view(">u8").reshape(-1).astype(np.uint64), rows

    def add(self, shards: Iterable[tuple[Any, Any]]) -> None:
        parts = list(shards)
        if parts:
            heads = np.concatenate([self._heads, *(heads for heads, _ in parts)])
            order = np.argsort(heads, kind="stable")
            self._heads = heads[order]
            self._rows = np.concatenate([self._rows, *(rows for _, rows in parts)])[order]

    def drop(self, shard: str) -> None:
        """Forget a shard's entries."""
        if shard in self.shards:
            kept = self._rows["shard"] != self.shards.pop(shard)
            self._heads, self._rows = self._heads[kept], self._rows[kept]

    def _number(self, layout: Layout) -> int:
        if layout not in self._layouts:
            self._layouts[layout] = len(self._shapes)
            self._shapes.append(layout)
        return self._layouts[layout]


# --- shards on disk ------------------------------------------------------------------------------------------------


class _Damaged(ValueError):
    """Why a shard cannot be what was written."""


class _OtherVersion(ValueError):
    """A shard that another version of this module reads."""


def _write_shard(folder: Path, entries: Mapping[str, Entry]) -> None:
    """One safetensors file, its tensors named `key/name`; the metadata holds MARK and each entry's checksum."""
    header: dict[str, Any] = {
        "__metadata__": {"format": MARK, "crc32": " ".join(_checksum(*pair) for pair in entries.items())}
    }
    place = 0
    for key, entry in entries.items():
        for name, tensor in entry.items():
            end = place + tensor.nbytes
            header[f"{key}/{name}"] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [place, end],
            }
            place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = folder / f".{os.getpid()}-{secrets.token_hex(8)}{PART}"
    try:
        with part.open("xb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for entry in entries.values():
                for tensor in entry.values():
                    file.write(_raw(tensor))
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, folder / (secrets.token_hex(16) + SUFFIX))
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    with suppress(OSError):  # the rename itself reaches the disk; not every file system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_places(path: Path) -> list[tuple[bytes, int, Layout, int]]:
    """Key, first byte, layout and checksum of each entry, from the header. Raises Fault or ValueError."""
    header, metadata, begin = read_header(path)
    mark = metadata.get("format", "")
    if mark != MARK and mark.startswith(MARK.rstrip("0123456789")):
        raise _OtherVersion(mark)
    if mark != MARK:
        raise _Damaged("not a shard of this cache")
    places: list[tuple[bytes, int, list[tuple[str, str, tuple[int, ...]]]]] = []
    keys: set[bytes] = set()
    place = 0
    for name, one in header.items():
        digest = _digest(name[:64])
        if name[64:65] != "/" or one["dtype"] not in DTYPES or one["data_offsets"][0] != place:
            raise _Damaged(f"tensor {name} is not as it was written")
        if not places or places[-1][0] != digest:
            places.append((digest, begin + place, []))
            keys.add(digest)
        places[-1][2].append((name[65:], one["dtype"], tuple(one["shape"])))
        place = one["data_offsets"][1]
    sums = metadata.get("crc32", "").split()
    if not len(places) == len(keys) == len(sums) or not all(re.fullmatch("[0-9a-f]{8}", one) for one in sums):
        raise _Damaged("its checksums do not fit its entries")
    return [(digest, at, tuple(parts), int(crc, 16)) for (digest, at, parts), crc in zip(places, sums, strict=True)]


def _read_entry(path: Path, digest: bytes, place: _Place) -> Entry:
    """Copy an entry's bytes into memory of its own. Raises OSError, or _Damaged when they are not what was written."""
    sizes = [math.prod(shape) * DTYPES[dtype].itemsize for _, dtype, shape in place.layout]
    raw = bytearray(sum(sizes))
    with path.open("rb") as file:
        file.seek(place.begin)
        length = file.readinto(raw)
    if length != len(raw) or zlib.crc32(raw, _crc_of(digest, place.layout)) != place.crc:
        raise _Damaged("its bytes are not those that were written")
    entry, at = {}, 0
    for (name, dtype, shape), size in zip(place.layout, sizes, strict=True):
        count = math.prod(shape)
        flat = torch.frombuffer(raw, dtype=DTYPES[dtype], count=count, offset=at) if count else torch.empty(0)
        entry[name] = flat.to(DTYPES[dtype]).reshape(shape)
        at += size
    return entry


def _own(tensors: Mapping[str, Tensor]) -> Entry:
    """Copies on the CPU, wide types first so that each is aligned. Raises ValueError for what cannot be kept."""
    strange = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in NAMES]
    if strange or not tensors:
        raise ValueError(f"cannot be kept: {', '.join(strange) or 'an entry without tensors'}")
    wide_first = sorted(tensors.items(), key=lambda pair: -pair[1].itemsize)
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()) for name, tensor in wide_first}


def _raw(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _size(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


def _checksum(key: str, entry: Entry) -> str:
    """CRC-32 of key, layout and bytes, so that a damaged header is found too."""
    crc = _crc_of(_digest(key), tuple((name, NAMES[one.dtype], tuple(one.shape)) for name, one in entry.items()))
    for tensor in entry.values():
        crc = zlib.crc32(_raw(tensor), crc)
    return f"{crc:08x}"


def _crc_of(digest: bytes, layout: Layout) -> int:
    return zlib.crc32(digest + json.dumps(layout).encode())


# --- keys ----------------------------------------------------------------------------------------------------------

_fingerprints: weakref.WeakKeyDictionary[nn.Module, tuple[object, str]] = weakref.WeakKeyDictionary()


def _digest(key: str) -> bytes:
    """The 32 bytes of a key. Raises ValueError for what `key` does not make."""
    if not re.fullmatch("[0-9a-f]{64}", key):
        raise ValueError(f"{key!r} is not a key, 64 hex digits")
    return bytes.fromhex(key)


def _plain(part: object) -> object:
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return {type(part).__name__: dataclasses.asdict(part)}
    raise TypeError(f"{part!r} cannot be part of a key")


def _hash_of_weights(state: Iterable[tuple[str, Tensor]]) -> str:
    hashed = hashlib.sha256()
    for name, tensor in state:
        if tensor.is_meta:
            raise ValueError(f"{name} has no values: it was not loaded")
        hashed.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        hashed.update(_raw(tensor.detach().cpu().contiguous()))
    return hashed.hexdigest()


def _why(error: Exception | None) -> str:
    return str(getattr(error, "strerror", None) or error)
