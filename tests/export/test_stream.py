"""Files of ours: what is written is what is read, the same bytes each time; nothing that is not finite."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from finetune import weights
from finetune.errors import Failure
from finetune.export import stream
from finetune.export.stream import Entry


def entries(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    return {
        name: Entry(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in tensors.items()
    }


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4),
    metadata=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1), st.text(st.characters(codec="utf-8")), min_size=1
    ),
)
def test_what_is_written_is_what_is_read(
    shapes: list[list[int]], metadata: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    numbers = [np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)]
    tensors = {f"tensor.{i}": torch.from_numpy(np.asarray(each)) for i, each in enumerate(numbers)}
    stream.write(path, entries(tensors), metadata)
    assert weights.read_metadata(path) == metadata
    for loaded in (weights.load_tensors(path), load_file(path)):
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() == metadata


def test_the_same_weights_give_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """The library's own writer puts metadata in an order that differs from process to process."""
    program = (
        "import sys, torch\nfrom pathlib import Path\nfrom finetune.export import stream\n"
        "made = {'b': stream.Entry((3,), torch.float32, lambda: torch.ones(3)),\n"
        "        'a': stream.Entry((2,), torch.float16, lambda: torch.zeros(2))}\n"
        "stream.write(Path(sys.argv[1]), made, {f'key{i}': str(i) for i in {*map(str, range(20))}})"
    )
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(here)])
        exec(program, {})
    subprocess.run([sys.executable, "-c", program, str(there)], check=True, cwd=Path(__file__).parents[2])
    assert here.read_bytes() == there.read_bytes()


def test_slices_and_tied_tensors_are_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    stream.write(tmp_path / "a.safetensors", entries({"row": whole[1], "turned": whole.T, "tied": whole}))
    loaded = load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["row"], whole[1]) and torch.equal(loaded["turned"], whole.T)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)])
def test_what_is_not_finite_is_not_written(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """Nor what the precision of the file cannot hold."""
    made = {"a": Entry((1,), dtype, lambda: torch.tensor([value]))}
    with pytest.raises(Failure, match="not written: a holds values"):
        stream.write(tmp_path / "a.safetensors", made)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stream.os, "fsync", full)
    with pytest.raises(Failure, match=r"a\.safetensors: could not be written \(the disk is full\)"):
        stream.write(tmp_path / "a.safetensors", entries({"a": torch.ones(3)}))
