"""The store: what goes in comes out, whoever writes at the same time, whatever is killed or damaged."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from finetune.data import cache
from finetune.data.cache import Built, Lost, Memory, Shards, build, fingerprint, key
from finetune.errors import Failure, Fault

in_one_folder = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def entry(number: int, size: int = 6) -> dict[str, Tensor]:
    return {"mean": torch.full((2, size), float(number)), "std": torch.arange(size) + number}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name].reshape(-1).view(torch.uint8).equal(second[name].reshape(-1).view(torch.uint8))
        for name in first
    )


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def filled(folder: Path, numbers: range, **limits: float) -> list[Path]:
    """A folder with these entries, and the shards that came to be."""
    before = set(shards(folder))
    with Shards(folder, **limits) as store:  # type: ignore[arg-type]
        for number in numbers:
            store.add(key(number), entry(number))
    return sorted(set(shards(folder)) - before)


# --- keys ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    crop: tuple[int, int]


def test_a_key_is_what_its_parts_say() -> None:
    assert key("a", 1) == key("a", 1) and len(key()) == 64
    assert key(View((1, 2))) == key(View((1, 2))) != key(View((2, 1)))
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})
    different = [(), ("a",), ("a", ""), ("", "a"), (("a",),), (1,), (1.0,), (True,), ("1",), (None,), ("\ud800",)]
    assert len({key(*parts) for parts in different}) == len(different)


def test_keys_stay_as_they_are() -> None:
    """Another key for the same parts would make everybody's cache be computed again."""
    assert key("latents", View((1, 2)), 0.5, None) == "dd1b9ae7299a7e239d3c722c38baced47904bf39d1a3d36e3b60e06967520167"


@pytest.mark.parametrize("part", [Path("a"), b"a", object(), torch.float32, {1, 2}, float("nan")])
def test_what_has_no_lasting_value_is_no_part_of_a_key(part: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        key("a", part)


def test_a_fingerprint_is_that_of_the_weights() -> None:
    torch.manual_seed(0)
    module, other = nn.Linear(3, 2), nn.Linear(3, 2)
    first = fingerprint(module, 0.18, None)
    assert fingerprint(other, 0.18, None) != first
    other.load_state_dict(module.state_dict())
    assert fingerprint(other, 0.18, None) == first == fingerprint(module, 0.18, None)
    assert first not in (fingerprint(module, 0.19, None), fingerprint(module))
    assert fingerprint(module.half(), 0.18, None) != first
    with torch.no_grad():
        other.bias[0] += 1
    changed = fingerprint(other, 0.18, None)
    assert changed != first
    nn.init.zeros_(other.weight)
    assert fingerprint(other, 0.18, None) not in (changed, first)


def test_a_module_without_values_has_no_fingerprint() -> None:
    with pytest.raises(ValueError, match="has no values"):
        fingerprint(nn.Linear(2, 2, device="meta"))


# --- round trips ---------------------------------------------------------------------------------------------------


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.text(max_size=8), min_size=1, max_size=4, unique=True))
    made = {}
    for name in names:
        dtype = draw(st.sampled_from(list(cache.NAMES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
        made[name] = raw.view(dtype).reshape(shape)  # NaN and infinities among them
    return made


@in_one_folder
@given(made=st.lists(entries(), max_size=8), limit=st.integers(1, 4), size=st.sampled_from([1, 40, 10**6]))
def test_what_goes_in_comes_out(made: list[dict[str, Tensor]], limit: int, size: int, tmp_path: Path) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    with Shards(folder, entries=limit, size=size) as store, Memory() as memory:
        for number, one in enumerate(made):
            for each in (store, memory):
                assert key(number) not in each
                each.add(key(number), one)
                assert key(number) in each and same(each.get(key(number)), one)
    again = Shards(folder)
    assert len(again) == len(made)
    for number, one in enumerate(made):
        assert same(again.get(key(number)), one)
        with pytest.raises(KeyError):
            again.get(key("not there", number))
    for shard in shards(folder):  # any reader of the format can read them
        safetensors.torch.load_file(shard)


@pytest.mark.parametrize("kind", ["memory", "pending", "disk"])
def test_what_is_got_and_what_was_added_belong_to_the_caller(tmp_path: Path, kind: str) -> None:
    store = Memory() if kind == "memory" else Shards(tmp_path)
    mine = torch.zeros(8)[::2]
    store.add(key(1), {"a": mine})
    store.add(key(1), {"a": mine + 5})  # what is there stays
    mine += 1
    if kind == "disk":
        store.flush()
    store.get(key(1))["a"].add_(2)
    assert store.get(key(1))["a"].eq(0).all()


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    store = Shards(tmp_path)
    for tensors in ({}, {"a": torch.zeros(2, dtype=torch.complex64)}):
        with pytest.raises(ValueError, match="cannot be kept"):
            store.add(key(1), tensors)
    with pytest.raises(ValueError, match="not a key"):
        store.add("a/b", entry(1))
    store.close()
    assert not shards(tmp_path)


def test_nothing_is_made_before_something_is_kept(tmp_path: Path) -> None:
    with Shards(tmp_path / "new") as store:
        assert key(1) not in store and len(store) == 0
    assert not (tmp_path / "new").exists()


# --- shards --------------------------------------------------------------------------------------------------------


def test_a_shard_is_written_when_it_is_full_or_its_entries_have_waited(tmp_path: Path) -> None:
    assert len(filled(tmp_path / "count", range(10), entries=4)) == 3
    assert len(filled(tmp_path / "size", range(10), size=96 * 5)) == 2
    assert len(filled(tmp_path / "time", range(10), seconds=0)) == 10
    assert len(filled(tmp_path / "all", range(10))) == 1


def test_names_and_bytes_say_nothing_local(tmp_path: Path) -> None:
    [shard] = filled(tmp_path / "someone", range(3))
    assert cache.SHARD.fullmatch(shard.name)
    for word in ("someone", str(os.getpid()), os.environ.get("USER") or "/root", str(tmp_path)):
        assert word.encode() not in shard.read_bytes()[:600] or word.isdigit()


def test_shards_of_others_are_seen_after_a_refresh(tmp_path: Path) -> None:
    store = Shards(tmp_path)
    [first] = filled(tmp_path, range(3))
    filled(tmp_path, range(3, 6))
    assert key(1) not in store
    store.refresh()
    assert all(same(store.get(key(number)), entry(number)) for number in range(6))
    first.unlink()
    store.refresh()
    assert [key(number) in store for number in range(6)] == [False] * 3 + [True] * 3


def test_what_another_has_written_meanwhile_is_not_written_twice(tmp_path: Path) -> None:
    with Shards(tmp_path) as store:
        for number in range(6):
            store.add(key(number), entry(number))
        filled(tmp_path, range(4))
    assert [len(safetensors.torch.load_file(shard)) for shard in shards(tmp_path)] in ([8, 4], [4, 8])
    assert len(Shards(tmp_path)) == 6


def test_threads_add_and_read_at_once(tmp_path: Path) -> None:
    with Shards(tmp_path, entries=7) as store:

        def work(worker: int) -> None:
            for number in range(worker % 2, 60, 2):  # every key comes from two threads
                store.add(key(number), entry(number))
                assert same(store.get(key(number)), entry(number))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    again = Shards(tmp_path)
    assert len(again) == 60 and all(same(again.get(key(number)), entry(number)) for number in range(60))


WORKER = """
import sys, torch
from finetune.data.cache import Shards, build, key
folder, first, last, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
import time, pathlib
def encode(number):
    time.sleep(pause)
    return {"mean": torch.full((2, 6), float(number)), "std": torch.arange(6) + number}
with Shards(pathlib.Path(folder), entries=5) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    built = build(store, ((key(n), n) for n in range(first, last)), lambda n: n, encode)
    store.flush()
    print(built.found, built.built, flush=True)
"""


def started(folder: Path, first: int, last: int, pause: float = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(folder), str(first), str(last), str(pause)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_build_one_store(tmp_path: Path) -> None:
    """Their shares overlap: what both computed is kept once."""
    both = [started(tmp_path, 0, 60, 0.002), started(tmp_path, 30, 90, 0.002)]
    assert [said(one) for one in both] == ["ready", "ready"]
    for one in both:
        go(one)
    assert all(sum(map(int, said(one).split())) == 60 for one in both)
    assert [one.wait(60) for one in both] == [0, 0]
    store = Shards(tmp_path)
    assert len(store) == 90 and all(same(store.get(key(number)), entry(number)) for number in range(90))


def test_a_kill_loses_what_was_pending_and_the_rest_is_found(tmp_path: Path) -> None:
    process = started(tmp_path, 0, 1000, 0.01)
    assert said(process) == "ready"
    go(process)
    deadline = time.monotonic() + 60
    while len(shards(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    whole = len(shards(tmp_path)) * 5
    made: list[int] = []

    def encode(number: int) -> dict[str, Tensor]:
        made.append(number)
        return entry(number)

    with Shards(tmp_path) as store:
        assert 20 <= len(store) == whole
        built = build(store, ((key(number), number) for number in range(whole + 50)), lambda number: number, encode)
    assert built == Built(found=whole, built=50) and made == list(range(whole, whole + 50))
    assert all(same(Shards(tmp_path).get(key(number)), entry(number)) for number in (0, whole - 1, whole, whole + 49))


def test_a_kill_while_a_shard_is_written_leaves_none(tmp_path: Path) -> None:
    """Killed with all bytes written and before the rename; the part is removed when nobody writes."""
    code = """
    import os, signal, sys, pathlib, torch
    from finetune.data import cache
    store = cache.Shards(pathlib.Path(sys.argv[1]))
    store.add(cache.key(1), {"a": torch.zeros(1000)})
    os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store.close()
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], timeout=120)
    [part] = tmp_path.glob(".*.part")
    assert run.returncode == -signal.SIGKILL and not shards(tmp_path) and part.stat().st_size > 4000
    assert key(1) not in Shards(tmp_path)
    assert not part.exists()


def test_the_part_of_one_who_writes_is_left(tmp_path: Path) -> None:
    part = tmp_path / ".1-ab.part"
    part.write_bytes(b"half")
    with cache.FileLock(tmp_path / cache.LOCK):
        Shards(tmp_path)
        assert part.exists()
    Shards(tmp_path)
    assert not part.exists()


# --- damage --------------------------------------------------------------------------------------------------------


def _cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def _longer(raw: bytes) -> bytes:
    return raw + b"\0" * 8


def _empty(raw: bytes) -> bytes:
    return b""


def _foreign(raw: bytes) -> bytes:
    return safetensors.torch.save({"unet.conv.weight": torch.zeros(4)})


def _marked_and_foreign(raw: bytes) -> bytes:
    return safetensors.torch.save({"a": torch.zeros(4)}, {"format": cache.MARK, "crc32": "00000000"})


@pytest.mark.parametrize("damage", [_cut, _longer, _empty, _foreign, _marked_and_foreign])
def test_a_damaged_shard_is_set_aside_and_built_again(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    [first] = filled(tmp_path, range(3))
    filled(tmp_path, range(3, 6))
    broken = damage(first.read_bytes())  # type: ignore[operator]
    first.write_bytes(broken)
    (tmp_path / "mine.safetensors").write_bytes(b"not ours")
    with caplog.at_level(logging.WARNING), Shards(tmp_path) as store:
        assert [key(number) in store for number in range(6)] == [False] * 3 + [True] * 3
        assert build(store, [(key(n), n) for n in range(6)], lambda n: n, entry) == Built(3, 3)
    assert "damaged" in caplog.text and first.name in caplog.text
    assert first.with_name(first.name + ".damaged").read_bytes() == broken and not first.exists()
    assert (tmp_path / "mine.safetensors").read_bytes() == b"not ours"
    assert len(Shards(tmp_path)) == 6


def test_what_another_version_wrote_is_left_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    [shard] = filled(tmp_path, range(3))
    shard.write_bytes(shard.read_bytes().replace(cache.MARK.encode(), b"finetune cache 0"))
    assert key(1) not in Shards(tmp_path) and shard.exists() and not caplog.text


def test_what_cannot_be_read_now_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    [shard] = filled(tmp_path, range(3))
    opened = Shards(tmp_path)
    path_open = Path.open

    def refused(path: Path, *mode: str, **options: object) -> object:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied")
        return path_open(path, *mode, **options)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        assert key(1) not in Shards(tmp_path)
        with pytest.raises(Lost, match="Permission denied"):
            opened.get(key(1))
    assert "cannot be read" in caplog.text
    assert shard.exists() and same(Shards(tmp_path).get(key(1)), entry(1))


@in_one_folder
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_is_believed(where: float, bit: int, tmp_path: Path) -> None:
    """In the header or in the values: an entry comes out as it went in, or not at all."""
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    [shard] = filled(folder, range(3))
    raw = bytearray(shard.read_bytes())
    raw[int(where * len(raw))] ^= 1 << bit
    shard.write_bytes(raw)
    store = Shards(folder)
    for number in range(3):
        try:
            found = store.get(key(number))
        except KeyError:
            continue
        assert same(found, entry(number))


def test_values_that_change_while_they_are_used_are_lost_and_said(tmp_path: Path) -> None:
    [shard] = filled(tmp_path, range(3))
    store = Shards(tmp_path)
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert same(store.get(key(0)), entry(0))
    with pytest.raises(Lost, match=r"cannot be read any more.*not those that were written.*Start again"):
        store.get(key(2))
    assert not shards(tmp_path) and len(list(tmp_path.glob("*.damaged"))) == 1
    assert key(0) not in store and issubclass(Lost, Failure) and issubclass(Lost, KeyError)


def test_an_entry_that_another_shard_holds_too_is_read_from_there(tmp_path: Path) -> None:
    filled(tmp_path / "a", range(3))
    [twin] = filled(tmp_path / "b", range(3))
    (tmp_path / "a" / twin.name).write_bytes(twin.read_bytes())
    store = Shards(tmp_path / "a")
    shards(tmp_path / "a")[0].unlink()
    assert all(same(store.get(key(number)), entry(number)) for number in range(3))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_read(tmp_path: Path) -> None:
    filled(tmp_path / "shared", range(3))
    (tmp_path / "shared").chmod(0o555)
    store = Shards(tmp_path / "shared")
    assert same(store.get(key(1)), entry(1))


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    filled(tmp_path, range(3))
    store = Shards(tmp_path)
    store.add(key(7), entry(7))
    with monkeypatch.context() as patch, pytest.raises(Failure, match=r"No space left on device.*--no-use-cache"):
        patch.setattr(os, "fsync", full)
        store.flush()
    assert not list(tmp_path.glob(".*.part")) and len(shards(tmp_path)) == 1
    assert same(store.get(key(7)), entry(7)) and same(store.get(key(1)), entry(1))
    store.close()
    assert same(Shards(tmp_path).get(key(7)), entry(7))


def test_a_file_in_the_folder_s_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Fault, match="the cache cannot be read"):
        Shards(tmp_path / "file")


# --- building ------------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_built_in_order_and_in_this_thread() -> None:
    store, loaded, encoded = Memory(), [], []
    store.add(key(2), entry(2))

    def load(number: int) -> int:
        loaded.append((number, threading.current_thread()))
        time.sleep(0.01 * (number % 3))
        return number

    def encode(number: int) -> dict[str, Tensor]:
        encoded.append(number)
        assert threading.current_thread() is threading.main_thread()
        return entry(number)

    done: list[str] = []

    def track(keys: Iterator[str]) -> Iterator[str]:
        for one in keys:
            assert one in store
            done.append(one)
            yield one

    numbers = [0, 1, 2, 3, 3, 4, 5, 0]
    built = build(store, ((key(n), n) for n in numbers), load, encode, workers=3, track=track)  # type: ignore[arg-type]
    assert built == Built(found=3, built=5)
    assert encoded == [0, 1, 3, 4, 5] and done == [key(n) for n in numbers]
    assert threading.main_thread() not in {thread for _, thread in loaded}
    assert build(store, ((key(n), n) for n in numbers), load, encode) == Built(8, 0)


def test_no_more_is_loaded_ahead_than_two_a_worker() -> None:
    ahead, most = 0, 0

    def load(number: int) -> int:
        nonlocal ahead, most
        ahead += 1
        most = max(most, ahead)
        return number

    def encode(number: int) -> dict[str, Tensor]:
        nonlocal ahead
        time.sleep(0.003)
        ahead -= 1
        return entry(number)

    build(Memory(), ((key(n), n) for n in range(60)), load, encode, workers=2)
    assert 2 <= most <= 5  # the four, and the one that is being encoded


def test_what_was_built_before_a_fault_stays(tmp_path: Path) -> None:
    def load(number: int) -> int:
        if number == 5:
            raise Fault("picture 5 cannot be read")
        return number

    with pytest.raises(Fault, match="picture 5"), Shards(tmp_path) as store:
        build(store, ((key(n), n) for n in range(1000)), load, entry, workers=2)
    assert len(Shards(tmp_path)) == 5


# --- size ----------------------------------------------------------------------------------------------------------


def test_the_index_takes_52_bytes_an_entry(tmp_path: Path) -> None:
    filled(tmp_path, range(2000))
    assert Shards(tmp_path).index_bytes == 2000 * 52
