"""A style set of 20,000 pictures: memory stays, and a kill half-way costs what was pending. Figures: `-m slow -s`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

WORKER = """
import json, resource, sys
from pathlib import Path
import torch
from finetune.data.cache import Shards, build, key
from finetune.data.reading.memo import facts_of
from finetune.data.reading import pictures

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

folder, count, side = Path(sys.argv[1]), int(sys.argv[2]), 16
paths = lambda: (folder / "pictures" / f"{n % 1000:03}" / f"{n:05}.bmp" for n in range(count))

def load(path):
    return torch.tensor(list(pictures.decode(path)[0].resize((16, 4)).tobytes())).float()

def encode(loaded):  # two views of (4, 16, 16): mean and std
    return {"mean": loaded[:64].repeat(16).reshape(4, 16, 16), "std": torch.ones(4, 16, 16)}

list(facts_of([]))
build(Shards(folder / "warm"), [(key("warm", n), p) for n, p in zip(range(8), paths())], load, encode)
before = peak()
digests = [one.digest[:16] for one in facts_of(paths())]
looked = peak()
with Shards(folder / "store") as store:
    wanted = ((key(digest, view), path) for digest, path in zip(digests, paths()) for view in (0, 1))
    built = build(store, wanted, load, encode)
cached = peak()
store = Shards(folder / "store")
for digest in digests:
    store.get(key(digest, 1))
print(json.dumps({"pictures": count, "found": built.found, "built": built.built, "before": before, "looked": looked,
                  "cached": cached, "read": peak(), "index": store.index_bytes, "entries": len(store)}))
"""


def plant(folder: Path, count: int) -> None:
    """Pictures that are quick to make, all different: 16 x 16 BMP files of one colour."""
    head = bytes.fromhex("424d360300000000000036000000280000001000000010000000010018000000000000030000130b0000130b0000")
    for number in range(count):
        path = folder / "pictures" / f"{number % 1000:03}" / f"{number:05}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(head + bytes(8) + number.to_bytes(3, "little") * 256)


def start(folder: Path, count: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "FINETUNE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(folder), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> dict[str, float]:
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    found: dict[str, float] = json.loads(out)
    print(found)
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path: Path) -> None:
    plant(tmp_path / "few", 2000)
    plant(tmp_path / "many", 20000)
    few = finish(start(tmp_path / "few", 2000))
    assert few["built"] == 4000
    store = tmp_path / "many" / "store"
    killed = start(tmp_path / "many", 20000)
    while len(list(store.glob("*.safetensors"))) < 78 and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    whole = 256 * len(list(store.glob("*.safetensors")))
    many = finish(start(tmp_path / "many", 20000))
    assert (many["found"], many["built"]) == (whole, 40000 - whole) and whole >= 78 * 256
    assert many["index"] == 40000 * 52
    grown = many["read"] - few["read"]
    print(f"peak RSS {few['read']:.0f} MB for 2,000 pictures, {many['read']:.0f} MB for 20,000: {grown:+.0f} MB; "
          f"on disk {sum(f.stat().st_size for f in store.iterdir()) / 1e6:.0f} MB")  # fmt: skip
    assert grown < 32, "MB: the index, and what is computed per picture in this test"
