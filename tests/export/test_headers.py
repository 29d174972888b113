"""What headers tell: what clients read, hashes that verify, and nothing local."""

from __future__ import annotations

import getpass
import hashlib
import json
import socket
import struct
from pathlib import Path
from typing import Any

import live
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune import cli, export, families, weights
from finetune.export import formats, hashes, metadata, stream
from finetune.families import Source

SETTINGS: dict[str, Any] = {
    "model": {"model": "toybox"},
    "data": {"data": "/home/mary/dogs", "trigger": "sks", "prompt": "a photo of sks dog"},
    "framing": {"resolution": [64]},
    "output": {"output": "/home/mary/run", "title": "Sks the dog", "license": "cc0-1.0", "tags": ["dog", "pet"]},
    "adapter": {"rank": 4, "alpha": 2.0},
}


def header(file: Path) -> dict[str, str]:
    """As the format's own documentation has it: 8 bytes of length, then JSON."""
    raw = file.read_bytes()
    return dict(json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"])


def behind_header(file: Path) -> bytes:
    raw = file.read_bytes()
    return raw[8 + struct.unpack("<Q", raw[:8])[0] :]


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("kind", "version", "architecture", "prediction"),
    [
        ("sd", "sd_v1", "stable-diffusion-v1/lora", "epsilon"),
        ("sd-v", "sd_v1", "stable-diffusion-v1/lora", "v"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "epsilon"),
    ],
)
def test_what_clients_read(
    form: str,
    kind: str,
    version: str,
    architecture: str,
    prediction: str,
    tiny_models: dict[str, Path],
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.safetensors"
    export.adapter(live.adapted(tiny_models[kind], text=True), file, settings=SETTINGS, form=form)
    said = header(file)
    assert said["modelspec.sai_model_spec"] == "1.0.1"
    assert said["modelspec.architecture"] == architecture
    assert said["modelspec.prediction_type"] == prediction
    assert (said["modelspec.title"], said["ss_output_name"]) == ("Sks the dog", "Sks the dog")
    assert (said["modelspec.trigger_phrase"], said["modelspec.tags"]) == ("sks", "dog, pet")
    assert (said["modelspec.resolution"], said["ss_resolution"]) == ("64x64", "(64, 64)")
    assert (said["ss_base_model_version"], said["ss_v2"]) == (version, "False")
    assert (said["ss_network_module"], said["ss_network_dim"]) == ("networks.lora", "4")
    assert float(said["ss_network_alpha"]) == 2 and said["ss_sd_model_name"] == "toybox"
    assert ("lora_adapter_metadata" in said) == (form == "diffusers"), "diffusers refuses it beside kohya's names"
    assert said.get("ss_clip_skip") == (None if kind == "sdxl" else "1")
    assert "modelspec.date" not in said and "ss_tag_frequency" not in said
    own = json.loads(said["finetune"])
    assert (own["trigger"], own["rank"], own["resolution"]) == ("sks", 4, [64])
    digest = hashlib.sha256(behind_header(file)).hexdigest()
    assert said["sshs_model_hash"] == digest and said["modelspec.hash_sha256"] == f"0x{digest}"
    assert said["sshs_legacy_hash"] == legacy(file)
    assert all(claim.holds for claim in hashes.claims(file)) and len(hashes.claims(file)) == 3


def legacy(file: Path) -> str:
    """As sd-scripts has it: the library's own bytes with the `ss_*` alone, 64 KiB at 1 MiB."""
    told = {name: value for name, value in header(file).items() if name.startswith("ss_")}
    raw = safetensors.torch.save(load_file(file), told)
    return hashlib.sha256(raw[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]


def test_the_short_hash_of_a_large_file(tmp_path: Path) -> None:
    """(Files of less than a mebibyte all have the same.)"""
    torch.manual_seed(0)
    tensors = {f"t{n}": torch.randn(300, 400 + n) for n in range(4)}
    entries = {name: stream.Entry(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
    stream.write(tmp_path / "a.safetensors", entries, {"ss_v2": "False", "format": "pt"}, hashed=hashes.BLANKS)
    said = header(tmp_path / "a.safetensors")
    assert said["sshs_legacy_hash"] == legacy(tmp_path / "a.safetensors") != "e3b0c442"
    assert all(claim.holds for claim in hashes.claims(tmp_path / "a.safetensors"))
    raw = bytearray((tmp_path / "a.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(raw)
    assert [claim.holds for claim in hashes.claims(tmp_path / "a.safetensors")] == [False, False, True]


def test_a_date_only_where_one_is_given(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    export.adapter(live.adapted(tiny_models["sd"]), tmp_path / "a.safetensors", settings={})
    assert header(tmp_path / "a.safetensors")["modelspec.date"] == "2023-11-14T22:13:20Z"


def test_what_belongs_to_one_file_is_not_passed_on(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Written again in another format: alpha's place, the hashes and the rank are the new file's."""
    export.adapter(live.adapted(tiny_models["sdxl"]), tmp_path / "a.safetensors", settings=SETTINGS)
    adapter = formats.read(tmp_path / "a.safetensors")
    formats.write(tmp_path / "b.safetensors", adapter, "kohya", {**adapter.metadata, "ss_network_dim": "99"})
    one, other = header(tmp_path / "a.safetensors"), header(tmp_path / "b.safetensors")
    assert "lora_adapter_metadata" in one and "lora_adapter_metadata" not in other
    assert one["sshs_model_hash"] != other["sshs_model_hash"] and other["ss_network_dim"] == "4"
    assert all(claim.holds for claim in hashes.claims(tmp_path / "b.safetensors"))
    assert other["modelspec.title"] == "Sks the dog" and other["ss_base_model_version"] == "sdxl_base_v1-0"


@pytest.mark.parametrize(
    ("said", "width", "expected"),
    [({}, 768, "sd_v1"), ({}, 1024, "sd_v2"), ({"ss_base_model_version": "sd_v2_v"}, 1024, "sd_v2_v"),
     ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, None, "sd_v2_v"), ({}, None, "sd_v1")],
)  # fmt: skip
def test_the_base_without_a_pipeline(said: dict[str, str], width: int | None, expected: str) -> None:
    published = families.FAMILIES["StableDiffusionPipeline"].published
    assert published.edition(said, width).version == expected


def test_whole_checkpoints_have_the_same_header_without_a_kind(tiny_models: dict[str, Path]) -> None:
    said = metadata.of_edition(families.load(Source(str(tiny_models["sdxl"]))).edition(), kind=None)
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert said["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"


def test_a_training_tells_its_header_and_nothing_local(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, user, host, folders, file names; captions only when asked."""
    secrets = ["hf_plantedtoken", "marys-secret-folder", "IMG_mary_0001", "marys caption", str(tmp_path)]
    secrets += [name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 4]
    monkeypatch.setenv("HF_TOKEN", "hf_plantedtoken")
    folder = tmp_path / "marys-secret-folder"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), "teal").save(folder / f"IMG_mary_0001_{number}.png")
        (folder / f"IMG_mary_0001_{number}.txt").write_text("marys caption, on  grass")
    words = ["--model", str(tiny_models["sd"]), "--data", str(folder), "--trigger", "sks", "--no-prior", "--steps", "1",
             "--tracker", "none", "--title", "Sks"]  # fmt: skip
    cli.main(["train", "lora", *words, "--output", str(tmp_path / "run")])
    raw = (tmp_path / "run" / "adapter.safetensors").read_bytes()
    assert [secret for secret in secrets if secret.encode() in raw] == []
    said = header(tmp_path / "run" / "adapter.safetensors")
    assert (said["modelspec.trigger_phrase"], said["ss_num_train_images"]) == ("sks", "2")
    cli.main(["train", "lora", *words, "--tell-captions", "--output", str(tmp_path / "told")])
    tags = json.loads(header(tmp_path / "told" / "adapter.safetensors")["ss_tag_frequency"])
    assert tags == {"captions": {"sks": 2, "marys caption": 2, "on grass": 2}}


def test_triggers_of_concepts_and_prompts() -> None:
    assert metadata.triggers({"data": {"concepts": [{"trigger": "sks"}, {"trigger": "zwx"}]}}) == ["sks", "zwx"]
    assert metadata.triggers({"data": {"prompt": "a photo of sks dog"}}) == ["a photo of sks dog"]
    assert metadata.triggers({}) == []


def test_a_foreign_file_claims_nothing(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert hashes.claims(tmp_path / "a.safetensors") == [] and weights.read_metadata(tmp_path / "a.safetensors") == {}
