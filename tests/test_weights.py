"""Faults rows 38 and 40: which weight files are refused before anything is loaded."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from finetune import weights
from finetune.errors import Fault

TENSORS = {"b.lora_A.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    save_file(TENSORS, path, {"format": "pt", "finetune": "settings"})
    return path


def altered(path: Path, header: dict[str, object] | bytes, body: bytes = b"\0" * 8) -> Path:
    """A file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def entry(begin: int = 0, end: int = 8, dtype: str = "F32", shape: tuple[object, ...] = (2,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_whole_file_passes_and_is_read(good: Path) -> None:
    weights.check_file(good)
    assert weights.read_metadata(good) == {"format": "pt", "finetune": "settings"}
    loaded = weights.load_tensors(good)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".CKPT", ".pkl"])
def test_pickles_are_refused_by_name_and_never_run(tmp_path: Path, suffix: str) -> None:
    planted = tmp_path / "planted"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (planted,)

    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(Fault, match=r"can run code when they are loaded, so only \.safetensors"):
        weights.load_tensors(path)
    assert not planted.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_renamed_to_safetensors_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.safetensors"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Fault, match="its content is a pickle"):
        weights.check_file(path)


def test_truncated_at_any_byte_is_refused(good: Path, tmp_path: Path) -> None:
    whole, part = good.read_bytes(), tmp_path / "part.safetensors"
    for size in range(len(whole)):
        part.write_bytes(whole[:size])
        with pytest.raises(Fault, match="cut short"):
            weights.check_file(part)


def test_the_missing_and_the_trailing_bytes_are_counted(good: Path, tmp_path: Path) -> None:
    whole, path = good.read_bytes(), tmp_path / "other.safetensors"
    path.write_bytes(whole[:-5])
    with pytest.raises(Fault, match="5 of 32 bytes of tensors are missing"):
        weights.check_file(path)
    path.write_bytes(whole + b"hidden program")
    with pytest.raises(Fault, match="14 bytes follow the last tensor"):
        weights.check_file(path)


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_an_oversized_header_is_refused_without_reading_it(tmp_path: Path, length: int) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    with pytest.raises(Fault, match=r"its header claims .* bytes; at most 100,000,000 are allowed"):
        weights.check_file(path)


BROKEN = {
    "no JSON": b"{'a': 1}",
    "not UTF-8": b'{"\xff": 1}',
    "no table": b"[]",
    "nested beyond all measure": b"[" * 100_000,
    "a name twice": b'{"a":1,"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "unknown type": {"a": entry(dtype="OBJECT")},
    "type unhashable": {"a": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}},
    "no place": {"a": {"dtype": "F32", "shape": [2]}},
    "entry is no table": {"a": 3},
    "shape and bytes disagree": {"a": entry(shape=(3,))},
    "negative shape": {"a": entry(shape=(-1, -2))},
    "shape of texts": {"a": entry(shape=("2",))},
    "shape of truths": {"a": entry(shape=(2, True))},
    "end before begin": {"a": entry(8, 0)},
    "metadata not texts": {"__metadata__": {"a": 1}, "a": entry()},
    "metadata a list": {"__metadata__": ["a"], "a": entry()},
    "product overflows": {"a": entry(shape=(2**62, 2**62))},
}


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN.keys())
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, header: dict[str, object] | bytes) -> None:
    with pytest.raises(Fault, match="its header cannot be understood"):
        weights.check_file(altered(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("second", [entry(4, 12), entry(12, 20)], ids=["overlap", "gap"])
def test_overlaps_and_gaps_are_refused(tmp_path: Path, second: dict[str, object]) -> None:
    path = altered(tmp_path / "x.safetensors", {"a": entry(), "b": second}, b"\0" * 20)
    with pytest.raises(Fault, match="tensor b begins at byte"):
        weights.check_file(path)


@given(place=st.integers(0, 200), value=st.integers(0, 255))
def test_whatever_byte_is_changed_the_library_reads_what_we_pass(place: int, value: int, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    """What passes here loads; what does not is a Fault, not another exception."""
    folder = tmp_path_factory.getbasetemp()
    path = folder / "changed.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] = value
    path.write_bytes(raw)
    try:
        weights.check_file(path)
    except Fault:
        return
    load_file(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
    ],
)
def test_what_downloads_leave_behind_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(Fault, match=reason):
        weights.check_file(path)


def test_missing_folder_and_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="there is no such file"):
        weights.check_file(tmp_path / "none.safetensors")
    with pytest.raises(Fault, match="a folder, where"):
        weights.check_file(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(Fault, match=r"only \.safetensors files are read, not \.gguf"):
        weights.check_file(tmp_path / "model.gguf")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused_on_load(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    path = tmp_path / "nan.safetensors"
    tensor = torch.zeros(3, 4, dtype=dtype)
    tensor[1, 2] = value
    save_file({"fine": torch.ones(2), "unet.to_q.lora_A": tensor}, path)
    weights.check_file(path)
    with pytest.raises(Fault, match="NaN or infinite") as caught:
        weights.load_tensors(path)
    assert caught.value.details == ["unet.to_q.lora_A: 1 of 12 values are NaN or infinite"]


def test_modules_with_values_that_are_not_finite_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weights.check_finite({"unet": model})
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
        model[1].running_var[1] = math.inf
    with pytest.raises(Fault) as caught:
        weights.check_finite({"vae": nn.Linear(1, 1), "unet": model})
    assert [line.split(":")[0] for line in caught.value.details] == ["unet.0.weight", "unet.1.running_var"]


def test_a_model_full_of_nan_gives_a_short_list() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(20)))
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    with pytest.raises(Fault) as caught:
        weights.check_finite({"unet": model})
    assert len(caught.value.details) == 11
    assert caught.value.details[-1] == "... and 30 more"


def test_eight_bit_floats_and_meta_tensors_are_understood() -> None:
    model = nn.Module()
    model.register_buffer("eight", torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn))
    model.register_buffer("meta", torch.empty(3, device="meta"))
    model.register_buffer("whole", torch.arange(3))
    with pytest.raises(Fault, match="1 of 2 values"):
        weights.check_finite({"unet": model})


# --- a whole model folder ------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    return shutil.copytree(tiny_models["sd"], tmp_path / "model")


def test_whole_models_pass(tiny_models: dict[str, Path], model: Path) -> None:
    for folder in tiny_models.values():
        weights.check_folder(folder)
    weights.check_folder(model / "unet")
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle beside safetensors is never opened")
    (model / "checkpoint-500").mkdir()
    (model / "checkpoint-500" / "optimizer.bin").write_bytes(b"what is no part of the pipeline is not looked at")
    weights.check_folder(model)


def test_all_that_is_wrong_with_a_model_is_listed(model: Path) -> None:
    unet = model / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_suffix(".bin"))
    vae = model / "vae" / "diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-1])
    (model / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(Fault, match="pickles can run code when they are loaded") as caught:
        weights.check_folder(model)
    text_problem, unet_problem, vae_problem = caught.value.details
    assert vae_problem.startswith(f"{vae}: not a whole safetensors file: it is cut short: 1 of")
    assert text_problem == f"{model / 'text_encoder'}: no weights there"
    assert unet_problem == f"{unet.with_suffix('.bin')}: a pickle, and no .safetensors file beside it"


def test_missing_shards_are_named(model: Path) -> None:
    index = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "b.safetensors"}}))
    with pytest.raises(Fault) as caught:
        weights.check_folder(model)
    assert caught.value.details == [f"{index.parent / 'b.safetensors'}: not there, though {index.name} names it"]
    index.write_text("{}")
    with pytest.raises(Fault, match="cannot be read as an index of weights"):
        weights.check_folder(model)


def test_an_index_of_the_pipeline_that_is_no_json(model: Path) -> None:
    (model / "model_index.json").write_text("<html>")
    with pytest.raises(Fault, match="cannot be read as a pipeline's index"):
        weights.check_folder(model)
